"""Durations that become metrics: steps, waits, saves; clips per second, MFU, memory. The only clock of training.

Between two rows runs  elapsed = steps + sections (eval, save);  what is not inside a section is counted as training,
so that nothing hides between steps.

    each rank: its loader's counts, wait, memory ─ gather ─ sums and maxima over the ranks ─ one row
"""

from __future__ import annotations

import re
import resource
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pretrain.data.loader import LoaderStats

PEAK_FLOPS: dict[str, tuple[float, float]] = {
    "H200 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
}
"""Dense operations per second from the maker's data sheet (bf16, fp32 without TF32), by words of the name that torch
gives; the first that fits. Not in here: MFU is null."""


RankNumbers = dict[str, float]
"""What one rank measured since the row before; gathered over ranks by `pretrain.agree`."""

COUNTS = (
    "bytes_read",
    "requests",
    "retries",
    "hedges",
    "throttled",
    "cache_hits",
    "cache_misses",
    "stride_dropped",
    "decoder_respawns",
)
"""Counts of the loader that a row sums over the ranks; `substituted/REASON` beside them."""
_SUBSTITUTED = "substituted/"
MAX_RANKS_LISTED = 64
"""Above this many ranks a row names only the slowest."""


def _alone(numbers: Mapping[str, float]) -> list[RankNumbers]:
    return [dict(numbers)]


class Meter:
    """Measures one rank, and with `gather` tells of all. Rows are about the time since the row before."""

    def __init__(
        self,
        flops_per_clip: int,
        *,
        num_clips: int,
        world_size: int,
        device: torch.device,
        precision: str = "bf16",
        clock: Callable[[], float] = time.perf_counter,
        gather: Callable[[Mapping[str, float]], list[RankNumbers]] = _alone,
    ) -> None:
        """`flops_per_clip`: matmul and attention operations, forward and backward, over the tokens that each module
        really processes (`Pretraining.training_flops`); `num_clips`: global batch of a step, without fillers.
        `gather`: every rank's numbers, in the order of ranks (`Agreement.gather`); by default this rank is all there
        is.
        """
        self._flops_per_step = flops_per_clip * num_clips
        self._num_clips, self._world_size, self._device, self._clock = num_clips, world_size, device, clock
        self._peak_flops = peak_flops(device, precision)
        self._gather = gather
        self._last_s: dict[str, float] = {}
        self._num_steps, self._section_s = 0, 0.0
        self._since_s: float | None = None

    @contextmanager
    def step(self) -> Generator[None]:
        """Around one training step, its wait for data included."""
        if self._since_s is None:  # what was built before the first step is no training
            self._since_s = self._clock()
        yield
        self._num_steps += 1

    @contextmanager
    def section(self, name: str) -> Generator[None]:
        """Around work that is no training (eval, save): left out of rates, its length kept for `seconds`."""
        start_s = self._clock()
        try:
            yield
        finally:
            self._last_s[name] = self._clock() - start_s
            if self._since_s is not None:
                self._section_s += self._last_s[name]

    def seconds(self, name: str) -> float:
        """Length of the last section of that name."""
        return self._last_s[name]

    def row(self, stats: LoaderStats, comm_wait_s: float | None = None) -> dict[str, Any]:
        """Rates since the last row; call it right after a step, on every rank: it is a collective.

        `comm_wait_s`: what this rank has waited inside collectives since the last row, where that is known. Time is
        this rank's (the ranks step together), memory the fullest rank's, everything about data of all ranks: see
        `data_numbers`, `rank_times`. `mfu` is null on hardware whose peak is unknown, `gpu_memory_bytes` (peak since
        the last row) on CPUs.
        """
        assert self._since_s is not None, "row() before the first step"
        now_s = self._clock()
        training_s = now_s - self._since_s - self._section_s
        num_steps, self._num_steps, self._section_s, self._since_s = self._num_steps, 0, 0.0, now_s
        step_s = training_s / num_steps if num_steps else None
        ranks = self._gather(
            {
                **rank_numbers(stats),
                **({} if comm_wait_s is None else {"comm_wait_s": comm_wait_s}),
                "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "gpu_memory_bytes": self._gpu_memory_bytes(),
            }
        )
        gpu_memory_bytes = max(rank["gpu_memory_bytes"] for rank in ranks)
        return {
            "step_s": step_s,
            "clips_per_s": self._num_clips / step_s if step_s else None,
            "mfu": self._mfu(step_s),
            "memory_bytes": max(rank["memory_bytes"] for rank in ranks),
            "gpu_memory_bytes": gpu_memory_bytes if self._device.type == "cuda" else None,
            **data_numbers(ranks, training_s),
            **rank_times(ranks, training_s, num_steps),
        }

    def _mfu(self, step_s: float | None) -> float | None:
        if self._peak_flops is None or not step_s:
            return None
        return self._flops_per_step / (step_s * self._peak_flops * self._world_size)

    def _gpu_memory_bytes(self) -> int:
        if self._device.type != "cuda":
            return 0
        peak_bytes = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak_bytes


def rank_numbers(stats: LoaderStats) -> RankNumbers:
    """What the loader of one rank did since the row before, by the names of `COUNTS`."""
    return {
        "wait_s": stats.wait_s,
        "decode_s": stats.decode_s,
        "num_clips": stats.num_clips,
        "bytes_read": stats.bytes_read,
        "requests": stats.num_requests,
        "retries": stats.num_retries,
        "hedges": stats.num_hedges,
        "throttled": stats.num_throttled,
        "cache_hits": stats.num_cache_hits,
        "cache_misses": stats.num_cache_misses,
        "stride_dropped": stats.stride_dropped,
        "decoder_respawns": stats.num_respawns,
        **{_SUBSTITUTED + reason: num for reason, num in stats.substituted.items()},
    }


def data_numbers(ranks: Sequence[Mapping[str, float]], training_s: float) -> dict[str, Any]:
    """The part of a row that is about data, from what every rank measured in `training_s` seconds of training.

    data_wait_fraction         share of the time that the slowest rank waited: the others wait for it in turn
    data_wait_mean_fraction    the same, as the mean of the ranks
    data_wait_max_s            how long the slowest rank waited
    slowest_rank               which one that is; null if nobody waited
    decode_ms                  time in a decoder per clip, mean over the clips of all ranks
    bytes_read, requests, …    sums over all ranks (`COUNTS`, and substituted/REASON); what an evaluation read is in
                               those of storage, which count per process
    """
    waits_s = [rank["wait_s"] for rank in ranks]
    longest_s = max(waits_s)
    num_clips = sum(rank["num_clips"] for rank in ranks)
    reasons = sorted({name for rank in ranks for name in rank if name.startswith(_SUBSTITUTED)})
    return {
        "data_wait_fraction": min(1.0, longest_s / training_s) if training_s > 0 else None,
        "data_wait_mean_fraction": min(1.0, sum(waits_s) / len(ranks) / training_s) if training_s > 0 else None,
        "data_wait_max_s": longest_s,
        "slowest_rank": waits_s.index(longest_s) if longest_s > 0 else None,
        "decode_ms": 1000 * sum(rank["decode_s"] for rank in ranks) / num_clips if num_clips else None,
        **{name: int(sum(rank[name] for rank in ranks)) for name in COUNTS},
        **{name: int(sum(rank.get(name, 0) for rank in ranks)) for name in reasons},
    }


def rank_times(ranks: Sequence[Mapping[str, float]], training_s: float, num_steps: int) -> dict[str, Any]:
    """Where a step's time goes, in seconds per step: what tells a straggler from those that wait for it.

    data_wait_s, comm_wait_s, compute_s    means over the ranks; compute is what is left of the step
    ranks/…                                each of them by rank, up to MAX_RANKS_LISTED ranks
    slowest_compute_rank                   the rank that computes longest, and
    slowest_compute_ratio                  how much longer than the median rank

    Null, and no list, where the waits inside collectives are not known (devices that run behind the host).
    """
    names = ("data_wait_s", "comm_wait_s", "compute_s")
    if not num_steps or any("comm_wait_s" not in rank for rank in ranks):
        return dict.fromkeys((*names, "slowest_compute_rank", "slowest_compute_ratio"))
    data = [rank["wait_s"] / num_steps for rank in ranks]
    comm = [rank["comm_wait_s"] / num_steps for rank in ranks]
    compute = [max(0.0, training_s / num_steps - d - c) for d, c in zip(data, comm, strict=True)]
    middle = statistics.median(compute)
    lists = dict(zip(names, (data, comm, compute), strict=True))
    return {
        **{name: statistics.fmean(values) for name, values in lists.items()},
        **({f"ranks/{name}": values for name, values in lists.items()} if len(ranks) <= MAX_RANKS_LISTED else {}),
        "slowest_compute_rank": compute.index(max(compute)),
        "slowest_compute_ratio": max(compute) / middle if middle else None,
    }


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second that the processor's maker claims; None where we do not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    has_tf32 = torch.get_float32_matmul_precision() != "highest"
    for words, (bf16, fp32) in PEAK_FLOPS.items():
        if re.search(rf"\b{words}\b", name):
            return bf16 if precision == "bf16" else None if has_tf32 else fp32
    return None
