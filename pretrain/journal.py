"""Decisions of the clock turned into data, written before a step uses them (contract C6).

    journal/a0003-r00002.jsonl    samples that were replaced, one file per attempt and rank
    journal/growth.jsonl          from which draw on a data set that grew is used in its new length

A resumed run repeats every row it finds. Which samples the order names is not known here.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.growth import Growth
from shards.storage import fsync_folder, write_atomic

GROWTH_NAME = "growth.jsonl"


@dataclass(frozen=True, order=True)
class JournalRow:
    """At `position` the order wanted sample `wanted`; `substitute` is used instead, because of `reason`."""

    position: int
    wanted: int
    substitute: int
    reason: str


class Journal:
    """Decisions of the clock turned into data, so that a resumed run repeats them (design C6).

    Opening reads every row that any attempt and rank left in `folder`; `add` appends to this rank's own file and
    returns once the row is on disk. `folder=None` keeps the rows in memory only. Safe to use from several threads.
    """

    def __init__(self, folder: Path | None, attempt: int = 0, rank: int = 0, *, is_read_only: bool = False) -> None:
        """`is_read_only`: rows are found, what is added stays in memory. For looking at a run (replay)."""
        self.is_read_only = is_read_only
        self._folder = folder
        self._file: Path | None = None
        if folder is not None and not is_read_only:
            self._file = folder / f"a{attempt:04d}-r{rank:05d}.jsonl"
        self._lock = threading.Lock()
        self._rows = {} if folder is None else {row.position: row for row in read_journal(folder)}

    def find(self, position: int) -> JournalRow | None:
        """The row that must be obeyed at `position`; of several, the one of the latest attempt."""
        return self._rows.get(position)

    def rows(self) -> list[JournalRow]:
        """Every row that is obeyed."""
        return list(self._rows.values())

    def of_all_ranks(self) -> list[JournalRow]:
        """Every row there is by now: those of the other ranks are read anew."""
        return self.rows() if self._folder is None else read_journal(self._folder)

    def growth(self) -> list[Growth]:
        """How the data grew, as earlier starts settled it."""
        return [] if self._folder is None else read_growth(self._folder)

    def add_growth(self, settled: Sequence[Growth]) -> None:
        """Append what this start settled, and fsync it. One rank calls this, before the first sample is drawn."""
        if self._file is not None and settled:
            # Rewritten whole: all attempts share the file, and a torn end would spoil the row appended to it.
            file = self._file.with_name(GROWTH_NAME)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, _lines_of([*self.growth(), *settled]))

    def add(self, row: JournalRow) -> None:
        """Append a row and fsync it: call this before the batch that uses it is handed out."""
        with self._lock:
            if self._rows.get(row.position) == row:
                return
            if self._file is not None:
                _append(self._file, [row])
            self._rows[row.position] = row

    def digest(self, position: int) -> str:
        """sha256 (hex) over the distinct rows before `position`, those of the other ranks too (read anew)."""
        before = sorted({row for row in self.of_all_ranks() if row.position < position})
        canonical = json.dumps([list(asdict(row).values()) for row in before], separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def read_journal(folder: Path) -> list[JournalRow]:
    """Every row in the folder, by attempt, rank and line. Raises UserError for a file that is damaged."""
    rows: list[JournalRow] = []
    for file in sorted(folder.glob("a*-r*.jsonl")):
        for number, fields in enumerate(_lines(file), start=1):
            try:
                place = int(fields["position"]), int(fields["wanted"]), int(fields["substitute"])
                rows.append(JournalRow(*place, str(fields["reason"])))
            except (KeyError, ValueError, TypeError) as error:
                raise _damaged(file, number, "position, wanted, substitute and reason") from error
    return rows


def read_growth(folder: Path) -> list[Growth]:
    """Every change of the data sets, in the order in which it was settled."""
    steps: list[Growth] = []
    for number, fields in enumerate(_lines(folder / GROWTH_NAME), start=1):
        try:
            hash_, num_samples = str(fields["manifest_hash"]), int(fields["num_samples"])
            steps.append(Growth(int(fields["source"]), int(fields["first_draw"]), hash_, num_samples))
        except (KeyError, ValueError, TypeError) as error:
            raise _damaged(folder / GROWTH_NAME, number, "source, first_draw, manifest_hash, num_samples") from error
    return steps


def _lines_of(rows: Sequence[JournalRow | Growth]) -> bytes:
    return b"".join(json.dumps(asdict(row)).encode() + b"\n" for row in rows)


def _append(file: Path, rows: Sequence[JournalRow | Growth]) -> None:
    is_new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as opened:
        opened.write(_lines_of(rows))
        opened.flush()
        os.fsync(opened.fileno())
    if is_new:
        fsync_folder(file.parent)


def _lines(file: Path) -> Iterator[Any]:
    """The rows of a file. A last line torn by a kill was never used: left out."""
    try:
        *lines, _torn = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise _damaged(file, number, "its fields", line) from error


def _damaged(file: Path, number: int, fields: str, line: bytes = b"") -> UserError:
    return UserError(
        f"journal line {number} of {file} is {line[:80]!r}; it must be a JSON row with {fields}: restore the file from "
        "a backup of the run folder"
    )
