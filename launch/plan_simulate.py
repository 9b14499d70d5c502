"""How much of a run's time is training when machines fail: Young and Daly's interval, and a simulation.

    train ─ save (stalls) ─ train ─ … ─ failure ─▶ back to the newest durable save ─ restart (may fail again) ─ train

Effective training time ratio (ETTR, arXiv 2410.21680): training that counted over all time that passed.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


@dataclass(frozen=True)
class FailureRate:
    """How often jobs of a cluster were interrupted, as its owners report."""

    name: str
    per_gpu_hour: float
    source: str

    def mtbf_s(self, num_gpus: int) -> float:
        """Mean time between the failures of a job on so many GPUs, in seconds."""
        return HOUR_S / (self.per_gpu_hour * num_gpus)


LLAMA = FailureRate(
    "Llama 3",
    419 / (54 * 24 * 16_384),
    "419 interruptions, 54 days, 16,384 H100 (arXiv 2407.21783)",
)
OPT = FailureRate(
    "OPT-175B",
    1 / (7.5 * 992),
    "one interruption in 7.5 hours on 992 A100 (metaseq, OPT/chronicles)",
)
BLOOM = FailureRate(
    "BLOOM",
    1 / (7 * 24 * 384),
    "about one GPU a week of 384 A100 (bigscience, tr11-176B-ml)",
)
RATES = (BLOOM, LLAMA, OPT)
"""From the most to the least reliable cluster."""

SIZES = (64, 256, 1024, 4096, 16_384)
RESTART_S = 600.0
"""Assumed: from a failure to the next step, with the queue, imports, the meeting of the ranks and the restore."""
HORIZON_S = 30 * DAY_S
"""Training that a simulation is about."""
MAX_STRETCH = 20
"""A run that takes this many times longer than its training gets nowhere: it is not simulated to its end."""


def young_daly_s(save_s: float, mtbf_s: float) -> float:
    """Seconds between saves that lose the least time: sqrt(2 x cost of a save x MTBF) (Young 1974, Daly 2006)."""
    return math.sqrt(2 * save_s * mtbf_s)


@dataclass(frozen=True)
class Saving:
    """How a run saves, in seconds."""

    interval_s: float
    stall_s: float
    """How long training stands still for a save."""
    write_s: float
    """From the beginning of a save until it is durable."""
    restart_s: float = RESTART_S


@dataclass(frozen=True)
class Simulated:
    """A run with failures, in seconds."""

    trained_s: float
    wall_s: float
    lost_s: float
    """Training that was done again."""
    num_failures: int

    @property
    def ettr(self) -> float:
        """Share of the time that was training that counted."""
        return self.trained_s / self.wall_s


def simulate(saving: Saving, *, mtbf_s: float, seed: int, work_s: float = HORIZON_S) -> Simulated:
    """One run of `work_s` seconds of training; failures are independent, `mtbf_s` apart on average.

    A pure function of its arguments. Jumps from event to event: a save begins, a failure, the end.
    """
    draw = random.Random(seed)
    wall_s = lost_s = done_s = durable_s = 0.0
    pending: tuple[float, float] | None = None  # (when it becomes durable, the training it holds)
    fails_at_s = draw.expovariate(1 / mtbf_s)
    num_failures = 0
    while done_s < work_s and wall_s < MAX_STRETCH * work_s:
        segment_s = min(saving.interval_s, work_s - done_s)
        if fails_at_s >= wall_s + segment_s:
            wall_s += segment_s
            done_s += segment_s
            if pending is not None and pending[0] <= wall_s:
                durable_s, pending = pending[1], None
            if pending is None and done_s < work_s:  # one save in flight: a slow one makes the next be left out
                pending = wall_s + saving.write_s, done_s
                wall_s += saving.stall_s
            continue
        num_failures += 1
        if pending is not None and pending[0] <= fails_at_s:
            durable_s = pending[1]
        pending = None
        reached_s = done_s + max(0.0, fails_at_s - wall_s)  # it may have come while a save stalled
        lost_s += reached_s - durable_s
        done_s = durable_s
        back_at_s = fails_at_s + saving.restart_s
        fails_at_s += draw.expovariate(1 / mtbf_s)
        while fails_at_s < back_at_s:  # a restart fails too
            num_failures += 1
            back_at_s = fails_at_s + saving.restart_s
            fails_at_s += draw.expovariate(1 / mtbf_s)
        wall_s = back_at_s
    return Simulated(done_s, max(wall_s, 1e-9), lost_s, num_failures)


def ettr_table(saving: Saving, sizes: tuple[int, ...], *, seed: int) -> dict[int, dict[str, float]]:
    """Number of GPUs -> name of the failure rate -> ETTR of one simulated run of 30 days of training."""
    return {
        num_gpus: {
            rate.name: simulate(saving, mtbf_s=rate.mtbf_s(num_gpus), seed=seed + num_gpus).ettr for rate in RATES
        }
        for num_gpus in sizes
    }
