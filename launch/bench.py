"""What measuring has in common: CPU seconds of other processes, repeats and their spread, advice with its figures.

Every comparison is interleaved: all variants in each round, and a ratio counts only where the spreads do not touch.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

NUM_REPEATS = 5
WIDTH = 80
BUSY_MACHINE = 0.5
"""Load per core from which on other work disturbs a measurement."""
WORTH_SAYING = 1.15
"""A gain below this is no advice."""

Progress = Callable[[int, int], None]
"""Told how many of how many measurements are done."""


@dataclass(frozen=True)
class Spread:
    """One figure, measured several times."""

    values: tuple[float, ...]

    @property
    def middle(self) -> float:
        """The median."""
        return median(self.values)

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)

    def to_json(self) -> dict[str, Any]:
        """Median, extremes and every value."""
        return {"median": self.middle, "low": self.low, "high": self.high, "values": list(self.values)}

    def __str__(self) -> str:
        return f"{short(self.middle)} ({short(self.low)}-{short(self.high)})"


@dataclass(frozen=True)
class Advice:
    """One thing to change, and what was measured that speaks for it."""

    change: str
    because: str

    def lines(self) -> list[str]:
        """For a person: the change in one piece, since it may be typed."""
        indent = 4 * " "
        return [
            f"  {self.change}",
            *textwrap.wrap(self.because, WIDTH, initial_indent=indent, subsequent_indent=indent),
        ]

    def to_json(self) -> dict[str, str]:
        """For a machine."""
        return {"change": self.change, "because": self.because}


def advice_lines(advice: Sequence[Advice], otherwise: str) -> list[str]:
    """The part of a report that says what to change."""
    if not advice:
        return [f"change    nothing: {otherwise}"]
    return ["change", *(line for item in advice for line in item.lines())]


def gain(new: Spread, old: Spread) -> float | None:
    """How many times `new` is `old` (both rates); None where that is too little, or within the spread."""
    ratio = new.middle / old.middle if old.middle > 0 else float("inf")
    return ratio if ratio >= WORTH_SAYING and new.low > old.high else None


def cpu_s(pids: Iterable[int]) -> dict[int, float]:
    """CPU seconds that running processes have used so far, all threads; one that is gone is left out.

    The clock number is the one that clock_getcpuclockid(3) makes of a process number. Elsewhere than on Linux it is
    the wall clock, which is right only for processes that do nothing but compute.
    """
    found: dict[int, float] = {}
    for pid in pids:
        with suppress(OSError):
            found[pid] = time.clock_gettime((~pid << 3) | 2) if sys.platform == "linux" else time.perf_counter()
    return found


def cpu_used_s(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """CPU seconds between two looks; a process that was not there before began at 0."""
    return sum(now_s - before.get(pid, 0.0) for pid, now_s in after.items())


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def others_load() -> float:
    """Processes that wanted a core during the last minute, per core: ask before measuring."""
    return os.getloadavg()[0] / num_cores()


def load_lines(load: float) -> list[str]:
    """A warning where the machine had other work to do."""
    if load < BUSY_MACHINE:
        return []
    return [f"note      other work wanted {load:.1f}x the cores there are: speeds came out too low"]


def short(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def num_bytes(value: float) -> str:
    """A number of bytes for people."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{short(value / size)} {unit}"
    return f"{value:.0f} B"
