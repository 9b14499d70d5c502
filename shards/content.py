"""content.jsonl: which file every sample of a packed folder was made from, by the hash of the file's bytes.

    {"source": "a/b.mp4", "sha256": "...", "split": "train", "samples": [["train-000000.tar", 1536]]}

Made from the tars alone. Read when parts are joined, so that no file gets in twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from shards import storage
from shards.errors import UserError
from shards.layout import CONTENT_NAME, Place


@dataclass(frozen=True)
class Content:
    """One file that was packed."""

    source: str
    sha256: str
    split: str
    samples: tuple[Place, ...]


def read_content(folder: str) -> list[Content] | None:
    """What a packed folder was made from, None if that is not known (tars made by others). Raises UserError."""
    url = storage.join(folder, CONTENT_NAME)
    try:
        lines = storage.read_bytes(url).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    rows: list[Content] = []
    for number, line in enumerate(lines, 1):
        try:
            row = cast("dict[str, Any]", json.loads(line))
            samples = tuple((str(tar), int(offset)) for tar, offset in row["samples"])
            rows.append(Content(str(row["source"]), str(row["sha256"]), str(row["split"]), samples))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{url} line {number} is damaged ({error!r}); it must be as it was packed: copy it again"
            ) from error
    return rows


def content_text(rows: Iterable[Content]) -> bytes:
    """The file."""
    return "".join(json.dumps(vars(row)) + "\n" for row in rows).encode()


def find_duplicates(hashes: Mapping[str, str], known: Mapping[bytes, str]) -> dict[str, str]:
    """Source -> the one with the same bytes that comes before it in `hashes` (source -> sha256), or that is `known`."""
    first = dict(known)
    duplicates: dict[str, str] = {}
    for source, sha256 in hashes.items():
        key = bytes.fromhex(sha256)
        if key in first:
            duplicates[source] = first[key]
        else:
            first[key] = source
    return duplicates
