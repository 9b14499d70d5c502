"""Samples -> tars: shuffled, so that neighbours are not of one film; those of a split are about equally large."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.convert import Piece
from shards.errors import UserError
from shards.layout import sample_key, shard_name, spread_name
from shards.options import PackOptions
from shards.sources import Source


@dataclass(frozen=True)
class Item:
    """One sample on its way into a tar."""

    source: Source
    sha256: str
    """Of the source's bytes."""
    number: int
    """Of the piece within its file."""
    piece: Piece


def write_tars(
    out: Path, items: Sequence[Item], split_of: dict[str, str], options: PackOptions, *, part: str, spread: bool
) -> Iterator[int]:
    """Write the tars of every split into a folder; yields the number of samples written so far, after every tar.

    `part` goes into the keys, so that they stay unique when parts are joined. `spread` puts the tars into folders by a
    hash of their names: object stores serve so many requests per second per prefix.
    """
    num_done = 0
    for split in sorted({split_of[item.source.name] for item in items}):
        chosen = [item for item in items if split_of[item.source.name] == split]
        chosen.sort(key=lambda item: _shuffle_key(options.seed, item))
        sizes = [Path(item.piece.file).stat().st_size for item in chosen]
        first = 0
        for shard, end in enumerate(shard_ends(sizes, options.shard_bytes)):
            name = shard_name(split, shard)
            path = out / (spread_name(name) if spread else name)
            path.parent.mkdir(exist_ok=True)
            keys = [sample_key(split, number, part) for number in range(first, end)]
            _write_tar(path, split, keys, chosen[first:end], is_copy=options.preset == "copy")
            num_done += end - first
            first = end
            yield num_done


def shard_ends(sizes: Sequence[int], shard_bytes: int) -> list[int]:
    """Where each tar ends when samples of these sizes go into the fewest tars of about `shard_bytes`, evenly."""
    total = sum(sizes)
    num_shards = min(max(1, -(-total // shard_bytes)), len(sizes))
    ends: list[int] = []
    filled = 0
    for number, size in enumerate(sizes, 1):
        filled += size
        if filled * num_shards >= total * (len(ends) + 1):
            ends.append(number)
    return ends


def _write_tar(path: Path, split: str, keys: list[str], items: Sequence[Item], *, is_copy: bool) -> None:
    # Imports torch, so not at the top of a module.
    from webdataset.writer import TarWriter  # pyright: ignore[reportUnknownVariableType]  # no stubs

    with path.open("wb") as file:
        tar: Any = TarWriter(file, encoder=False, mtime=0, user="", group="")
        for key, item in zip(keys, items, strict=True):
            video = Path(item.piece.file)
            data = video.read_bytes()
            if is_copy and hashlib.sha256(data).hexdigest() != item.sha256:
                raise UserError(f"{video} was changed while it was packed; sources must stay as they are: start again")
            tar.write({"__key__": key, video.suffix[1:].lower(): data})
            tar.write({"__key__": key, "json": json.dumps(_describe(item, split), sort_keys=True).encode()})
        tar.close()
        file.flush()
        os.fsync(file.fileno())


def _describe(item: Item, split: str) -> dict[str, Any]:
    """KEY.json: all that the index is made from, and where the sample comes from."""
    source = item.source
    facts = {name: value for name, value in vars(item.piece).items() if name != "file"}
    return {
        **facts,
        "label": source.label,
        "split": split,
        "group": source.group,
        "source": source.name,
        "source_sha256": item.sha256,
    }


def _shuffle_key(seed: int, item: Item) -> bytes:
    return hashlib.blake2b(f"{seed}:{item.number}:{item.source.name}".encode(), digest_size=16).digest()
