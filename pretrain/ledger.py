"""What was consumed, written down so that it can be proved: the ledger and its lineage.

    ledger/a0003-s00000020-r00002.rows   one row per clip that an applied step consumed
    ledger/lineage-s00000040-a0003.json  the segments of one checkpoint interval, and the lineage file before it

A checkpoint stores the head of its lineage (name and hash). Whatever the head does not reach is abandoned work of an
attempt that died; `pretrain.audit` tells the two apart. Nothing here knows in which order samples should come:
a row holds what travelled with the pixels, so a loader that goes wrong is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from shards.storage import fsync_folder, write_atomic

if TYPE_CHECKING:
    from pretrain.batch import ClipBatch

FORMAT_VERSION = 1
AS_ORDERED, SUBSTITUTED = 0, 1

ROW_DTYPE = np.dtype(
    [
        ("step", "<u8"),  # the k-th global batch taken
        ("position", "<u8"),  # place in the one sequence of the run
        ("draw", "<u4"),  # which clip of that position
        ("wanted", "<u8"),  # sample that the order asked for
        ("sample", "<u8"),  # sample that was delivered
        ("checksum", "<u4"),  # crc32 of the bytes that were decoded
        ("reason", "u1"),  # AS_ORDERED, or SUBSTITUTED (the journal says why)
        ("crc", "<u4"),  # crc32 of the fields before it: tells a torn row from a whole one
    ]
)
_CRC_AT = ROW_DTYPE.itemsize - 4


@dataclass(frozen=True)
class Segment:
    """One closed file of rows in the ledger folder: its name, its number of rows, its hash."""

    file: str
    num_rows: int
    sha256: str


class Ledger:
    """This rank's side of the ledger: rows of applied steps, in one segment per checkpoint interval (design C4)."""

    def __init__(self, folder: Path, attempt: int, rank: int) -> None:
        self._folder, self._attempt, self._rank = folder, attempt, rank
        self._open: BinaryIO | None = None
        self._name = ""
        self._num_rows = 0
        self._hash = hashlib.sha256()

    def record(self, step: int, batches: Sequence[ClipBatch]) -> None:
        """Append what `step` consumed: call it after the step was applied, with all its micro batches.

        Fillers are left out. The rows reach the operating system before this returns (a kill loses none), the disk
        at `seal`.
        """
        if self._open is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._name = f"a{self._attempt:04d}-s{step:08d}-r{self._rank:05d}.rows"
            self._open = (self._folder / self._name).open("xb")
            self._num_rows, self._hash = 0, hashlib.sha256()
        rows = np.concatenate([_rows_of(step, batch) for batch in batches] or [np.empty(0, ROW_DTYPE)])
        data = rows.tobytes()
        self._open.write(data)
        self._open.flush()
        self._num_rows += len(rows)
        self._hash.update(data)

    def cut(self) -> OpenSegment | None:
        """End the open segment; the next `record` opens another. None if nothing was recorded since the last cut."""
        if self._open is None:
            return None
        ended = OpenSegment(self._folder, self._open, Segment(self._name, self._num_rows, self._hash.hexdigest()))
        self._open = None
        return ended

    def seal(self) -> Segment | None:
        """Cut, and bring to disk."""
        ended = self.cut()
        return None if ended is None else ended.seal()


@dataclass(frozen=True)
class OpenSegment:
    """A segment that gets no more rows and is not yet on disk: bringing it there may be another thread's work."""

    _folder: Path
    _file: BinaryIO
    _segment: Segment

    def seal(self) -> Segment:
        """Bring it to disk. Raises OSError where the disk refuses: then its rows must never be committed."""
        os.fsync(self._file.fileno())
        self._file.close()
        fsync_folder(self._folder)
        return self._segment


def _rows_of(step: int, batch: ClipBatch) -> NDArray[np.void]:
    is_real = batch.sample_B.numpy() >= 0
    rows = np.zeros(int(is_real.sum()), ROW_DTYPE)
    rows["step"] = step
    rows["position"] = batch.position_B.numpy()[is_real]
    rows["draw"] = batch.draw_B.numpy()[is_real]
    rows["wanted"] = batch.wanted_B.numpy()[is_real]
    rows["sample"] = batch.sample_B.numpy()[is_real]
    rows["checksum"] = batch.checksum_B.numpy()[is_real]
    rows["reason"] = np.where(rows["sample"] == rows["wanted"], AS_ORDERED, SUBSTITUTED)
    rows["crc"] = row_crc(rows)
    return rows


def row_crc(rows: NDArray[np.void]) -> NDArray[np.uint32]:
    """crc32 of every row without its own crc field, for the whole array at once.

    crc32 is affine over bits: the crc of a row is the crc of zeros, xor one table entry per byte.
    """
    bytes_RC = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), ROW_DTYPE.itemsize)
    tables, zeros = _crc_tables()
    crc_R = np.full(len(rows), zeros, np.uint32)
    for column in range(_CRC_AT):
        crc_R ^= tables[column][bytes_RC[:, column]]
    return crc_R


@cache
def _crc_tables() -> tuple[NDArray[np.uint32], int]:
    zeros = zlib.crc32(bytes(_CRC_AT))
    tables = np.zeros((_CRC_AT, 256), np.uint32)
    for column in range(_CRC_AT):
        for value in range(256):
            one = bytes(column) + bytes([value]) + bytes(_CRC_AT - column - 1)
            tables[column, value] = zlib.crc32(one) ^ zeros
    return tables, zeros


# ---------------------------------------------------------------------------------------------- lineage


@dataclass(frozen=True)
class LineageHead:
    """Name (in the ledger folder) and hash of a lineage file: what a checkpoint's manifest stores."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Link:
    """One lineage file: the segments of the steps from the link before it up to `step` (exclusive)."""

    step: int
    attempt: int
    previous: LineageHead | None
    segments: tuple[Segment, ...]

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {"format": FORMAT_VERSION, **asdict(self)}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Link:
        """Read a file's content back; raises ValueError when it is not one of ours."""
        try:
            if fields["format"] != FORMAT_VERSION:
                raise ValueError(f"format {fields['format']} is not {FORMAT_VERSION}")
            previous = fields["previous"]
            if fields["step"] < 0:
                raise ValueError(f"step {fields['step']} is negative")
            return Link(
                step=int(fields["step"]),
                attempt=int(fields["attempt"]),
                previous=None if previous is None else LineageHead(**previous),
                segments=tuple(Segment(**segment) for segment in fields["segments"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a lineage file: {error!r}") from error


def commit_lineage(
    folder: Path, step: int, attempt: int, segments: Sequence[Segment], previous: LineageHead | None
) -> LineageHead:
    """Write the lineage file of the checkpoint at `step`, atomically and fsynced.

    Rank 0 calls this after every rank has sealed, before the checkpoint that stores the returned head is committed.
    """
    link = Link(step, attempt, previous, tuple(sorted(segments, key=lambda segment: segment.file)))
    data = json.dumps(link.to_json(), indent=1).encode() + b"\n"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"lineage-s{step:08d}-a{attempt:04d}.json"
    write_atomic(folder / name, data)
    return LineageHead(name, hashlib.sha256(data).hexdigest())


def walk_lineage(folder: Path, head: LineageHead) -> Iterator[tuple[LineageHead, Link]]:
    """The links from the head back to the first one.

    Raises ValueError, naming the file, where a link is missing, changed, unreadable or does not lead backwards.
    """
    at: LineageHead | None = head
    step: int | None = None
    while at is not None:
        if Path(at.file).name != at.file:
            raise ValueError(f"{at.file!r} is not a plain file name")
        try:
            data = (folder / at.file).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"{at.file} is missing") from None
        if hashlib.sha256(data).hexdigest() != at.sha256:
            raise ValueError(f"{at.file} was changed after it was committed (its hash differs)")
        try:
            link = Link.from_json(cast("dict[str, Any]", json.loads(data)))
        except ValueError as error:
            raise ValueError(f"{at.file}: {error}") from error
        if step is not None and link.step > step:
            raise ValueError(f"{at.file} is of step {link.step}, after the step {step} of the file that follows it")
        yield at, link
        at, step = link.previous, link.step
