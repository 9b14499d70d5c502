"""Several data sets as one stream: which source each position takes, and which draw of that source it is.

Positions come in cycles of 4,096. In a cycle source s owns q_s positions (its share of the weights, by largest
remainder), laid out in an order that is drawn anew for every cycle. The draws of a source are numbered in the order
of their positions over the whole run: draw j of a source with N_s samples is in its epoch j // N_s, whatever the
other sources do. Weights change only where a cycle begins. Everything is arithmetic: no source has a state.

Legend: K positions, L positions of a cycle, S sources.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.order import slot_order

CYCLE = 4096


@dataclass(frozen=True)
class Phase:
    """From a cycle on: how many positions of each cycle every source has."""

    first_cycle: int
    quotas: tuple[int, ...]


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Share out the positions of a cycle by weight, by the method of the largest remainder; ties go to the first.

    Raises UserError for a weight that gives a source no position at all.
    """
    if not weights or not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"data.shards has weights {list(weights)}; each must be a number above 0: change them")
    exact = [weight / sum(weights) * CYCLE for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: shares[source] - exact[source])
    for source in by_remainder[: CYCLE - sum(shares)]:
        shares[source] += 1
    for source, share in enumerate(shares):
        if share == 0:
            raise UserError(
                f"data.shards has weight {weights[source]:g} for source {source}; it must be at least 1/{CYCLE} of "
                "their sum, or the source is never drawn: raise it, or leave the source out"
            )
    return tuple(shares)


class Mixture:
    """Positions -> (source, draw), for one source or several."""

    def __init__(self, seed: int, phases: Sequence[Phase]) -> None:
        """`phases` in order of time; the first begins at cycle 0."""
        assert phases[0].first_cycle == 0
        self._seed = seed
        self.phases = tuple(phases)
        self.num_sources = len(phases[0].quotas)
        # Draws of each source before each phase.
        self._before: list[NDArray[np.int64]] = [np.zeros(self.num_sources, np.int64)]
        for phase, later in itertools.pairwise(self.phases):
            num_cycles = later.first_cycle - phase.first_cycle
            self._before.append(self._before[-1] + num_cycles * np.array(phase.quotas, dtype=np.int64))

    def places(self, positions_K: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(source, draw of that source) of each position: two int64 arrays."""
        positions_K = np.asarray(positions_K, dtype=np.int64)
        if self.num_sources == 1:
            return np.zeros_like(positions_K), positions_K
        source_K, draw_K = np.empty_like(positions_K), np.empty_like(positions_K)
        cycle_K = positions_K // CYCLE
        for cycle in np.unique(cycle_K).tolist():
            mine = cycle_K == cycle
            slot = positions_K[mine] % CYCLE
            number = self._phase_of(cycle)
            phase = self.phases[number]
            source_L, rank_L = _layout(self._seed, number, cycle, phase.quotas)
            source = source_L[slot].astype(np.int64)
            quota_S = np.array(phase.quotas, dtype=np.int64)
            first_S = self._before[number] + (cycle - phase.first_cycle) * quota_S
            source_K[mine] = source
            draw_K[mine] = first_S[source] + rank_L[slot]
        return source_K, draw_K

    def num_draws(self, source: int, position: int) -> int:
        """Draws of a source at the positions before `position`."""
        if self.num_sources == 1:
            return position
        cycle, slot = divmod(position, CYCLE)
        number = self._phase_of(cycle)
        phase = self.phases[number]
        source_L, _ = _layout(self._seed, number, cycle, phase.quotas)
        whole = int(self._before[number][source]) + (cycle - phase.first_cycle) * phase.quotas[source]
        return whole + int((source_L[:slot] == source).sum())

    def _phase_of(self, cycle: int) -> int:
        return max(number for number, phase in enumerate(self.phases) if phase.first_cycle <= cycle)


@lru_cache(maxsize=64)
def _layout(seed: int, phase: int, cycle: int, shares: tuple[int, ...]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Source of every slot of a cycle, and how many slots of the same source come before it: int16 [L] each."""
    ends_S = np.cumsum(shares)
    source_L = np.searchsorted(ends_S, slot_order(seed, phase, cycle, CYCLE), side="right").astype(np.int16)
    rank_L = np.empty(CYCLE, np.int16)
    for source, share in enumerate(shares):
        rank_L[source_L == source] = np.arange(share)
    return source_L, rank_L
