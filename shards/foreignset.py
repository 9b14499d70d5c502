"""The index, the manifest and the list of refusals over tars made by others, written from what each of them holds.

An index that is there already is copied to the front of the new one, whatever its length in a few blocks of memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from shards import storage
from shards.errors import UserError
from shards.layout import MANIFEST_NAME, RECORD_BYTES, REJECTED_NAME, Manifest, Records, Shard, Split, index_name
from shards.manifest import sort_labels
from shards.names import NamesWriter, names_name
from shards.rejected import Rejection
from shards.tarscan import Refusal, Tar, TarScan

PRESET = "index"
"""`Manifest.preset` of tars made by others."""
VAL = "val"
COPY_BYTES = 8 << 20
SPREAD = np.uint32(2654435761)
"""Knuth's multiplier: neighbouring numbers end up far apart."""


@dataclass(frozen=True)
class Grown:
    """What a folder's index lists before it grows."""

    manifest: Manifest | None
    urls: dict[str, Shard]


@dataclass(frozen=True)
class Written:
    """What was written, with counts over all tars of the index."""

    manifest: Manifest
    rejected: dict[str, int]
    num_ignored: int
    num_unread: int


def write_set(
    folder: Path,
    grown: Grown,
    tars: list[Tar],
    read: Callable[[Tar], TarScan],
    *,
    split: str,
    val_fraction: float,
) -> Written:
    """Add `tars` to what `grown` lists and write SPLIT.index, rejected.jsonl and, last, manifest.json.

    Samples go to `split`, but for the share `val_fraction` of the groups, which goes to val. Raises UserError if no
    sample is usable.
    """
    if grown.manifest is not None and not tars:
        return Written(grown.manifest, _count_rejected(folder), 0, 0)
    old = grown.manifest
    known = list(old.labels) if old is not None else []
    found = {label for tar in tars for label in read(tar).labels}
    labels = known + sort_labels(found.difference(known))
    numbers = {label: number for number, label in enumerate(labels)}
    splits = dict(old.splits) if old is not None else {}
    num_ignored = num_unread = 0
    names = [split, VAL] if val_fraction else [split]
    with _writers(folder, {name: splits.get(name) for name in names}) as writers, _Refusals(folder, tars) as refusals:
        for tar in tars:
            scan = read(tar)
            name = tar_name(tar, folder)
            rows = _with_labels(scan, numbers)
            is_val = is_held_out(rows["group"], val_fraction)
            tag = tar.tag if storage.local_path(tar.url) is None else ""
            for writer, chosen in zip(writers.values(), (~is_val, is_val), strict=False):
                if chosen.any() or writer is writers[split]:
                    num_samples = int(np.count_nonzero(chosen))
                    writer.add(
                        Shard(name, tar.num_bytes, num_samples, scan.sha256, tag),
                        rows[chosen],
                        [scan.names[row] for row in np.flatnonzero(chosen).tolist()],
                    )
            refusals.add(name, scan.refusals)
            num_ignored, num_unread = num_ignored + scan.num_ignored, num_unread + scan.num_unread
        rejected = refusals.counts()
        _check_some(writers, split, rejected)
        splits.update({name: writer.publish(old is not None) for name, writer in writers.items() if writer.num_samples})
        refusals.publish()
    history = () if old is None else (*old.history, old.version())
    manifest = Manifest.make(preset=PRESET, labels=tuple(labels), splits=splits, history=history)
    storage.write_atomic(folder / MANIFEST_NAME, manifest.to_json().encode())
    return Written(manifest, rejected, num_ignored, num_unread)


def tar_name(tar: Tar, folder: Path) -> str:
    """What the manifest calls a tar: relative where it lies in the folder, else its full URL."""
    path = storage.local_path(tar.url)
    if path is None:
        return tar.url
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else f"file://{path}"


def is_held_out(groups: NDArray[np.uint32], fraction: float) -> NDArray[np.bool_]:
    """Which rows belong to val: a function of the group alone, so that no group is on both sides, also later."""
    return (groups.astype(np.uint32) * SPREAD) < fraction * 2**32


def _with_labels(scan: TarScan, numbers: dict[str, int]) -> Records:
    rows = scan.rows.copy()
    table = np.array([*(numbers[label] for label in scan.labels), -1], np.int32)  # -1 finds the last one
    rows["label"] = table[rows["label"]]
    return rows


def _check_some(writers: dict[str, _Writer], split: str, rejected: dict[str, int]) -> None:
    if writers[split].num_samples:
        return
    if any(writer.num_samples for writer in writers.values()):
        raise UserError(f"--val-fraction leaves no sample for {split}; it must leave some: choose a smaller one")
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(rejected.items())) or "they are empty"
    raise UserError(f"these tars hold no usable video ({counts}); they must hold videos: check the URL")


class _Writer:
    """The new index of one split, beside the old one until `publish`."""

    def __init__(self, folder: Path, name: str, old: Split | None, file: BinaryIO) -> None:
        self._folder, self._name, self._file = folder, name, file
        self._names = NamesWriter(folder / f".{name}.names.tmp")
        self._hash = hashlib.sha256()
        self._shards: list[Shard] = []
        self.num_samples = self._num_frames = self._max_frames = self._max_pixels = self._max_bytes = 0
        self._min_frames = 2**32
        if old is not None:
            self._copy(folder / old.index, old)

    def _copy(self, path: Path, old: Split) -> None:
        missing = old.num_samples * RECORD_BYTES
        with path.open("rb") as file:
            while part := file.read(min(COPY_BYTES, missing)):
                self._write(part)
                missing -= len(part)
        if self._hash.hexdigest() != old.sha256:
            raise UserError(
                f"{path} is not the index that its manifest names; it must stay as it was written: copy the folder "
                "again, or index anew into another folder with --to"
            )
        self._names.copy(path.with_name(names_name(old.index)))
        self._shards = list(old.shards)
        self.num_samples, self._num_frames = old.num_samples, old.num_frames
        self._min_frames, self._max_frames = old.min_frames, old.max_frames
        self._max_pixels, self._max_bytes = old.max_pixels, old.max_bytes

    def add(self, shard: Shard, rows: Records, names: list[tuple[str, ...]]) -> None:
        rows["shard"] = len(self._shards)
        self._shards.append(shard)
        if not len(rows):
            return
        self._write(rows.tobytes())
        self._names.add(names)
        frames = rows["num_frames"]
        pixels = rows["width"].astype(np.int64) * rows["height"]
        self.num_samples += len(rows)
        self._num_frames += int(frames.sum(dtype=np.int64))
        self._min_frames = min(self._min_frames, int(frames.min()))
        self._max_frames = max(self._max_frames, int(frames.max()))
        self._max_pixels = max(self._max_pixels, int(pixels.max()))
        self._max_bytes = max(self._max_bytes, int(rows["size"].max()))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def close(self) -> None:
        """Remove what was not published."""
        self._names.close()
        self._names.path.unlink(missing_ok=True)

    def publish(self, is_grown: bool) -> Split:
        """Give the index its name: one of its own where it follows another, which may be in use."""
        self._file.flush()
        os.fsync(self._file.fileno())
        name = index_name(self._name, self._hash.hexdigest() if is_grown else "")
        self._names.close()
        self._names.path.replace(self._folder / names_name(name))
        Path(self._file.name).replace(self._folder / name)
        storage.fsync_folder(self._folder)
        return Split(
            index=name,
            num_samples=self.num_samples,
            num_frames=self._num_frames,
            min_frames=self._min_frames,
            max_frames=self._max_frames,
            max_pixels=self._max_pixels,
            max_bytes=self._max_bytes,
            sha256=self._hash.hexdigest(),
            shards=tuple(self._shards),
        )


@contextmanager
def _writers(folder: Path, splits: dict[str, Split | None]) -> Generator[dict[str, _Writer]]:
    files = {name: (folder / f".{index_name(name)}.tmp").open("wb") for name in splits}
    writers: dict[str, _Writer] = {}
    try:
        for name, old in splits.items():
            writers[name] = _Writer(folder, name, old, files[name])
        yield writers
    finally:
        for writer in writers.values():
            writer.close()
        for file in files.values():
            file.close()
            Path(file.name).unlink(missing_ok=True)


class _Refusals:
    """The new rejected.jsonl: what the old one says of tars that were known, then what is added."""

    def __init__(self, folder: Path, new: list[Tar]) -> None:
        self._final = folder / REJECTED_NAME
        self._new = {tar_name(tar, folder) for tar in new}
        self._counts: Counter[str] = Counter()
        self._file = (folder / f".{REJECTED_NAME}.tmp").open("wb")

    def __enter__(self) -> _Refusals:
        for line, row in _rejected(self._final):
            if not self._is_new(row["path"]):  # else it was written by a call that died before its manifest was
                self._file.write(line)
                self._counts[row["reason"]] += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        Path(self._file.name).unlink(missing_ok=True)

    def add(self, tar: str, refusals: tuple[Refusal, ...]) -> None:
        for refusal in refusals:
            row = Rejection(f"{tar}/{refusal.key}", refusal.reason, refusal.detail)
            self._file.write(row.to_json().encode() + b"\n")
            self._counts[refusal.reason] += 1

    def _is_new(self, path: str) -> bool:
        """Whether a row is about one of the new tars."""
        ends = (found.end() - 1 for found in re.finditer(r"\.tar/", path))
        return any(path[:end] in self._new for end in ends)

    def counts(self) -> dict[str, int]:
        return dict(self._counts)

    def publish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        Path(self._file.name).replace(self._final)


def _count_rejected(folder: Path) -> dict[str, int]:
    """Reason -> number, of the list that is there."""
    return dict(Counter(str(row["reason"]) for _, row in _rejected(folder / REJECTED_NAME)))


def _rejected(path: Path) -> Generator[tuple[bytes, dict[str, str]]]:
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                yield line, json.loads(line)
