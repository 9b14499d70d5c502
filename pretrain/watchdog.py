"""Hangs end (C9, C13): each part of a rank's work has a limit, and who passes it is named.

    limit passed ─ stacks of all threads ─ attempts/NNNN.hang-R.json: which part, waiting for others or not
                 ─ a moment for the other ranks to say the same ─ who is at fault ─ outcome ─ exit 75

At fault are the ranks that do not wait for another rank, and those that cannot even say so. A thread of this process
watches; should that thread be held too (the interpreter lock kept by a library), a timer of the C library ends the
rank a little later, and the other ranks miss its word.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from pretrain.attempt import Outcome, record_outcome
from pretrain.sections import LimitsConfig
from pretrain.stop import die
from pretrain.world import World
from shards.storage import write_atomic

log = logging.getLogger(__name__)

Part = Literal["setup", "first_step", "step", "save", "eval"]
GRACE_S = 3.0
"""How long a rank waits for the others' word before it decides who hangs."""
WAITS = tuple(
    os.sep.join(place)
    for place in (("torch", "distributed"), ("deepspeed", "comm"), ("pretrain", "agree"), ("pretrain", "rounds"))
)
"""A stack with one of these files in it waits for other ranks, or for a disk that all share."""


@dataclass(frozen=True)
class Hang:
    """What a rank whose limit has passed says."""

    rank: int
    part: str
    limit_s: float
    is_waiting: bool
    """Inside a collective: another rank keeps it."""
    place: str
    """Innermost line of the main thread."""


class Watchdog:
    """Watches the main thread of one rank."""

    def __init__(self, run_dir: Path, attempt: int, world: World, limits: LimitsConfig) -> None:
        self._folder, self._run_dir, self._attempt = run_dir / "attempts", run_dir, attempt
        self._world, self._limits = world, limits
        self._main = threading.get_ident()
        self._changed = threading.Condition()
        self._part: tuple[Part, float, float] | None = None
        """What the main thread does, its limit, and when that passes."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def part(self, name: Part) -> Generator[None]:
        """Around one part of the work; parts do not nest."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: Part) -> None:
        """The main thread begins a part; ends by `leave` or the next `enter`."""
        limit_s = self._limits.of_section(name)
        faulthandler.dump_traceback_later(limit_s + 2 * GRACE_S, exit=True)
        with self._changed:
            self._part = name, limit_s, time.monotonic() + limit_s
            self._changed.notify()

    def leave(self) -> None:
        """The main thread has finished its part."""
        faulthandler.cancel_dump_traceback_later()
        with self._changed:
            self._part = None

    def _watch(self) -> None:
        with self._changed:
            while True:
                if self._part is None:
                    self._changed.wait()
                    continue
                name, limit_s, end_s = self._part
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    self._expire(name, limit_s)
                self._changed.wait(left_s)

    def _expire(self, part: Part, limit_s: float) -> NoReturn:
        reason = f"rank {self._world.rank} passed limits.{part}_limit_s ({limit_s:g} s)"
        try:
            mine = Hang(self._world.rank, part, limit_s, *self._main_thread())
            log.error("%s, at %s", reason, mine.place)
            write_atomic(self._file(self._world.rank), json.dumps(asdict(mine)).encode())
            time.sleep(GRACE_S)
            told = [hang for rank in range(self._world.size) if (hang := self._read(rank)) is not None]
            reason, blamed = verdict(told, self._world.size)
            record_outcome(self._run_dir, self._attempt, Outcome("failed", 0, reason, blamed))
        finally:
            die(reason)

    def _main_thread(self) -> tuple[bool, str]:
        frame = sys._current_frames().get(self._main)  # pyright: ignore[reportPrivateUsage]  # documented by Python
        stack = traceback.extract_stack(frame)
        is_waiting = any(wait in entry.filename for entry in stack for wait in WAITS)
        own = [entry for entry in stack if f"{os.sep}pretrain{os.sep}" in entry.filename] or stack
        return is_waiting, f"{Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name}"

    def _file(self, rank: int) -> Path:
        return self._folder / f"{self._attempt:04d}.hang-{rank:05d}.json"

    def _read(self, rank: int) -> Hang | None:
        try:
            fields: dict[str, Any] = json.loads(self._file(rank).read_bytes())
            return Hang(**fields)
        except (OSError, ValueError, TypeError):
            return None


def verdict(told: list[Hang], world_size: int) -> tuple[str, tuple[int, ...]]:
    """A sentence, and the ranks at fault: those that wait for nobody, else those without a word, else nobody."""
    busy = [hang for hang in told if not hang.is_waiting]
    silent = sorted(set(range(world_size)) - {hang.rank for hang in told})
    if busy:
        places = ", ".join(f"rank {hang.rank} at {hang.place}" for hang in busy)
        limits = " and ".join(sorted({f"limits.{hang.part}_limit_s ({hang.limit_s:g} s)" for hang in busy}))
        # Where all are busy, each may wait for a device in its own way: nobody is singled out.
        blamed = tuple(hang.rank for hang in busy) if len(busy) < world_size or world_size == 1 else ()
        return f"a hang: {limits} passed; {places}; {len(told) - len(busy)} others wait; stacks in logs/", blamed
    part, limit_s = told[0].part, told[0].limit_s
    if silent:
        ranks = ", ".join(str(rank) for rank in silent)
        return f"a hang: all wait in {part} ({limit_s:g} s) but rank {ranks}, without a word", tuple(silent)
    return f"a hang: every rank waits for the others in {part} ({limit_s:g} s): the network?", ()
