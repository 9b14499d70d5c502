"""What all ranks decided together, as data (C6): steps that were not applied, and ranges that a roll-back steps over.

    journal/decisions.jsonl    written by rank 0, fsynced before training goes on

A row is obeyed for ever: no later attempt trains on a step that is named here, and the audit lists its samples as
withheld.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.storage import fsync_folder

NAME = "decisions.jsonl"


@dataclass(frozen=True)
class Skipped:
    """Step `step` was taken and not applied."""

    step: int
    reason: str
    samples: tuple[int, ...] = ()
    """Samples whose loss was not finite, where that is what was wrong."""


@dataclass(frozen=True)
class RolledBack:
    """After step `at` the run went back to the checkpoint of step `to`; steps [first, stop) are stepped over."""

    at: int
    to: int
    first: int
    stop: int
    reason: str
    attempt: int
    """The attempt that decided it: its later checkpoints, and those of attempts before it, are void."""


class Decisions:
    """Those of a run folder, in the order in which they were made."""

    def __init__(self, folder: Path, *, is_writer: bool) -> None:
        """Read what is there. `is_writer`: rank 0, the only one that writes."""
        self._file = folder / NAME
        self._is_writer = is_writer
        rows = list(read_decisions(folder))
        self.skips = [row for row in rows if isinstance(row, Skipped)]
        self.rollbacks = [row for row in rows if isinstance(row, RolledBack)]

    def is_withheld(self, step: int) -> bool:
        """Whether this step is stepped over."""
        return any(skip.step == step for skip in self.skips) or any(r.first <= step < r.stop for r in self.rollbacks)

    def skips_before(self, step: int) -> list[int]:
        """Steps before this one that were skipped, and not rolled back over: what the failure ladder goes on from."""
        over = [range(back.first, back.stop) for back in self.rollbacks]
        return [s.step for s in self.skips if s.step < step and not any(s.step in steps for steps in over)]

    def add(self, row: Skipped | RolledBack) -> None:
        """Make a decision. Every rank calls this; on rank 0 it is on disk afterwards."""
        if self._is_writer:
            _append(self._file, row)
        if isinstance(row, Skipped):
            self.skips.append(row)
        else:
            self.rollbacks.append(row)

    def is_void(self, step: int, attempt: int) -> bool:
        """Whether a checkpoint, by its step and the attempt that wrote it, holds what was rolled back."""
        return any(attempt <= r.attempt and step > r.to for r in self.rollbacks)


def read_decisions(folder: Path) -> Iterator[Skipped | RolledBack]:
    """Every row, in order. Raises UserError for a file that is damaged; an end torn by a kill was never obeyed."""
    file = folder / NAME
    try:
        *lines, _torn = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, start=1):
        try:
            yield _row_of(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"line {number} of {file} is {line[:80]!r}; it must be a decision as tubelet writes them: restore the "
                "file from a backup of the run folder"
            ) from error


def withheld_steps(folder: Path) -> list[tuple[int, int, str]]:
    """(first, stop, reason) of every range of steps that is stepped over."""
    return [
        (row.step, row.step + 1, row.reason) if isinstance(row, Skipped) else (row.first, row.stop, row.reason)
        for row in read_decisions(folder)
    ]


def _row_of(fields: dict[str, Any]) -> Skipped | RolledBack:
    kind = fields.pop("kind")
    if kind == "skipped":
        return Skipped(int(fields["step"]), str(fields["reason"]), tuple(int(s) for s in fields["samples"]))
    if kind == "rolled_back":
        at, to, first, stop = (int(fields[name]) for name in ("at", "to", "first", "stop"))
        return RolledBack(at, to, first, stop, str(fields["reason"]), int(fields["attempt"]))
    raise ValueError(f"no decision of kind {kind!r}")


def _append(file: Path, row: Skipped | RolledBack) -> None:
    kind = "skipped" if isinstance(row, Skipped) else "rolled_back"
    is_new = not file.exists()
    with file.open("ab+") as opened:
        end = _end_of_last_line(opened.seek(0, os.SEEK_END), opened)
        opened.truncate(end)  # what a kill tore was never obeyed
        opened.write(json.dumps({"kind": kind, **asdict(row)}).encode() + b"\n")
        opened.flush()
        os.fsync(opened.fileno())
    if is_new:
        fsync_folder(file.parent)


def _end_of_last_line(num_bytes: int, opened: Any) -> int:
    opened.seek(0)
    data: bytes = opened.read(num_bytes)
    return data.rfind(b"\n") + 1


def describe(rollbacks: Sequence[RolledBack]) -> str:
    """One sentence about each, for the person who is asked."""
    return "; ".join(f"at step {r.at} back to {r.to}, over {r.first} to {r.stop - 1}: {r.reason}" for r in rollbacks)
