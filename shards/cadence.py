"""Which frames of a film are kept for the training encode, and how many a second that makes."""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from shards.probe import Facts, keep_evenly

MOST_B_FRAMES = 7
RATE_SNAP = 0.02
NEAT_TOLERANCE = 2e-4
NTSC_TOLERANCE = 2e-3
"""29.97 frames/s count as 30."""


@dataclass(frozen=True)
class Cadence:
    """The frames of a film that are kept."""

    kept: list[int]
    """Their numbers."""
    rate: Fraction
    """Frames/s, where the film is even."""
    stride: int
    """Distance of the frames of a training clip."""
    grid: int
    """Distance of reference frames."""
    is_thinned: bool
    """Frames were picked by time for `rate`, so that the distances between them say nothing about it."""

    def rate_between(self, times_s: list[float], first: int, last: int) -> Fraction:
        """Frames/s of one piece, frames `first` to `last` of the film: the film's, unless the piece is really slower or
        faster (variable rate).
        """
        if self.is_thinned:
            rate = _typical_rate(times_s[first : last + 1])
            return self.rate if rate >= float(self.rate) * (1 - RATE_SNAP) else _neat(rate)
        rate = _typical_rate([times_s[number] for number in self.kept if first <= number <= last])
        return self.rate if abs(rate - float(self.rate)) <= RATE_SNAP * rate else _neat(rate)


def find_cadence(facts: Facts, *, max_rate: float, stride: int, for_rate: float | None) -> Cadence:
    """Decide which frames to keep, for clips of every `stride`-th frame or of `for_rate` frames a second."""
    even = keep_evenly(facts.times_s, max_rate)
    if len(even) < 2:
        return Cadence(even, Fraction(1), stride, grid_of(stride), is_thinned=False)
    even_rate = _film_rate([facts.times_s[number] for number in even], facts.nominal_rate)
    if for_rate is None:
        return Cadence(even, even_rate, stride, grid_of(stride), is_thinned=False)
    source_rate = min(float(_film_rate(facts.times_s, facts.nominal_rate)), max_rate)
    grid = min(int(source_rate * (1 + NTSC_TOLERANCE) / for_rate), MOST_B_FRAMES + 1)
    rate = Fraction(for_rate).limit_denominator(1001) * max(grid, 1)
    if grid < 1 or abs(even_rate - rate) <= NTSC_TOLERANCE * rate:
        return Cadence(even, even_rate, max(grid, 1), max(grid, 1), is_thinned=False)
    return Cadence(keep_nearest(facts.times_s, float(rate)), rate, grid, grid, is_thinned=True)


def keep_nearest(times_s: list[float], rate: float) -> list[int]:
    """Numbers of the frames that are nearest to times 1 / rate apart. None twice: what is slower stays as it is."""
    middles_s = [(left + right) / 2 for left, right in itertools.pairwise(times_s)]
    num_wanted = int((times_s[-1] - times_s[0]) * rate + 0.5) + 1
    return sorted({bisect.bisect_left(middles_s, times_s[0] + number / rate) for number in range(num_wanted)})


def grid_of(stride: int) -> int:
    """Distance of reference frames for a training stride: its largest divisor that needs at most 7 B frames."""
    return max(divisor for divisor in range(1, MOST_B_FRAMES + 2) if stride % divisor == 0)


def _film_rate(times_s: list[float], nominal_rate: float) -> Fraction:
    """Frames/s of these frames: the container's rate over a whole number where that fits, else as measured."""
    rate = _typical_rate(times_s)
    if nominal_rate > 0:
        snapped = nominal_rate / max(1, round(nominal_rate / rate))
        if abs(snapped - rate) <= RATE_SNAP * rate:
            rate = snapped
    return _neat(rate)


def _neat(rate: float) -> Fraction:
    """The whole or NTSC rate (30000/1001) that a measured one means, if it is close to one."""
    for base in (Fraction(1), Fraction(1000, 1001)):
        if abs(round(rate / base) * base - rate) < NEAT_TOLERANCE * rate:
            return round(rate / base) * base
    return Fraction(rate).limit_denominator(1001)


def _typical_rate(times_s: list[float]) -> float:
    """Frames/s over the usual distance between frames: a hole in the film does not count, jitter averages out."""
    gaps_s = np.diff(times_s)
    median_s = float(np.median(gaps_s))
    usual_s = float(gaps_s[np.abs(gaps_s - median_s) <= median_s / 2].mean())
    return 1 / usual_s
