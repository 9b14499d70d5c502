"""SPLIT.names.gz: under which names the samples of tars made by others are known, one line per row of the index.

    ["train/000017", "street", "film 3"]        the key, then group and source where the description names them

Written while the tars are indexed, as every byte is read then. Reading the names out of the tars later would take two
requests per sample. Packed data needs no such list: its keys are numbers, and content.jsonl knows its sources.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from shards import storage
from shards.errors import UserError

SUFFIX = ".names.gz"
COPY_BYTES = 8 << 20


def names_name(index: str) -> str:
    """File name of the names that belong to an index."""
    return index.removesuffix(".index") + SUFFIX


def read_names(folder: str, index: str, num_samples: int) -> Iterator[list[str]]:
    """The names of each row, in order. Raises UserError if they are not there, or not those of this index."""
    url = storage.join(folder, names_name(index))
    num_lines = 0
    try:
        path = storage.local_path(url)
        with (
            path.open("rb") if path is not None else io.BytesIO(storage.read_bytes(url)) as file,
            gzip.open(file, "rt", encoding="utf-8") as lines,
        ):
            for line in lines:
                yield cast("list[str]", json.loads(line))
                num_lines += 1
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(
            f"{url} cannot be read ({error}); it must lie beside the index: copy it again, or index anew"
        ) from error
    if num_lines != num_samples:
        raise UserError(
            f"{url} has {num_lines} lines; it must have one for each of {num_samples} samples: copy it again"
        )


class NamesWriter:
    """The names of one split, beside the final place until they are renamed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")

    def copy(self, old: Path) -> None:
        """Begin with the names of an older index: compressed files may be joined."""
        with old.open("rb") as file:
            while part := file.read(COPY_BYTES):
                self._file.write(part)

    def add(self, rows: Sequence[Sequence[str]]) -> None:
        """Append the names of these rows."""
        text = "".join(f"{json.dumps(list(names), ensure_ascii=False)}\n" for names in rows)
        self._file.write(gzip.compress(text.encode(), 6, mtime=0))

    def close(self) -> None:
        """The file is whole then."""
        self._file.close()
