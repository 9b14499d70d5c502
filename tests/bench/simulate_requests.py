"""A large run on paper: `python tests/bench/simulate_requests.py --json FILE` (check 7, second half).

4,096 ranks take steps from 10^8 samples by the real arithmetic (shards/order.py), nothing is read. For steps drawn at
random, the first and last of the run among them, and for the same steps with other world sizes:

    every clip of the step is owned by one rank and place, and by no other
    the positions of the step are the same whatever the world size
    two steps of one epoch share no sample; each sample lies in [0, N)

and for each run length: requests per second, per shard and per prefix of the bucket (S3 begins to refuse above 5,500
reads per second and prefix), given the time of a step.

Legend: K positions of a step, S requests.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from measure import Stopwatch, finish, machine, table

from shards.order import FILLER, clip_places, num_micro_steps, rank_clips, sample_numbers

S3_READS_PER_S = 5500
SEED = 20_261_122


def owned_clips(step: int, *, global_batch: int, micro_batch: int, world_size: int) -> np.ndarray:
    """All clips of a step as the ranks take them, fillers left out."""
    micro_steps = num_micro_steps(global_batch, micro_batch, world_size)
    settings = {"global_batch": global_batch, "micro_batch": micro_batch, "world_size": world_size}
    parts = [rank_clips(step, m, rank=rank, **settings) for m in range(micro_steps) for rank in range(world_size)]
    clips = np.concatenate(parts)
    return clips[clips != FILLER]


def rank_requests(
    step: int, run_length: int, samples_K: np.ndarray, shard_samples: int, *, global_batch: int, world_size: int
) -> np.ndarray:
    """The tar of every request of a step: a rank reads neighbours that lie in one tar with one request."""
    per_rank = -(-global_batch // world_size)
    rank_K = np.arange(len(samples_K)) // per_rank
    shard_K = samples_K // shard_samples
    begins_K = np.ones(len(samples_K), dtype=bool)
    begins_K[1:] = (np.diff(samples_K) != 1) | (np.diff(rank_K) != 0) | (np.diff(shard_K) != 0)
    # a read of many neighbours is cut at the run length
    number_K = np.arange(len(samples_K))
    since_K = number_K - np.maximum.accumulate(np.where(begins_K, number_K, 0))
    return shard_K[begins_K | (since_K % run_length == 0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=10**8)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--clips-per-rank", type=int, default=32, help="of a global batch")
    parser.add_argument("--clips-per-video", type=int, default=1)
    parser.add_argument("--step-s", type=float, default=1.0)
    parser.add_argument("--run-lengths", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--shard-samples", type=int, default=1000)
    parser.add_argument("--prefixes", type=int, default=16, help="prefixes that shard keys are spread over")
    parser.add_argument("--steps", type=int, default=40, help="steps looked at")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    batch = options.ranks * options.clips_per_rank
    positions = batch // options.clips_per_video
    steps_per_epoch = options.samples // positions
    rng = np.random.default_rng(SEED)
    drawn = rng.choice(steps_per_epoch - 2, size=max(options.steps - 2, 1), replace=False) + 1
    steps = [0, *sorted(drawn.tolist()), steps_per_epoch - 1]
    watch = Stopwatch()

    for step in steps:
        reference = np.arange(step * batch, (step + 1) * batch)
        for world_size in (options.ranks, options.ranks // 2, options.ranks * 3 // 4):
            clips = owned_clips(
                step, global_batch=batch, micro_batch=max(8, options.clips_per_video), world_size=world_size
            )
            if not np.array_equal(np.sort(clips), reference):
                raise SystemExit(f"step {step}, {world_size} ranks: a clip is owned by none or by two")
    rows: list[tuple[Any, ...]] = []
    figures: dict[str, Any] = {}
    for run_length in options.run_lengths:
        seen: list[np.ndarray] = []
        per_shard: list[int] = []
        per_prefix: list[int] = []
        num_requests: list[int] = []
        for step in steps:
            clips = np.arange(step * batch, (step + 1) * batch, options.clips_per_video)
            position_K, _ = clip_places(clips, options.clips_per_video)
            epoch_K, sample_K = sample_numbers(SEED, options.samples, position_K, run_length=run_length)
            if epoch_K.any() or sample_K.min() < 0 or sample_K.max() >= options.samples:
                raise SystemExit(f"step {step}: a sample outside the data set or the epoch")
            seen.append(sample_K)
            shard_S = rank_requests(
                step,
                run_length,
                sample_K,
                options.shard_samples,
                global_batch=positions,
                world_size=options.ranks,
            )
            num_requests.append(len(shard_S))
            per_shard.append(max(Counter(shard_S.tolist()).values()))
            per_prefix.append(int(np.bincount(shard_S % options.prefixes).max()))
        taken = np.concatenate(seen)
        if len(np.unique(taken)) != len(taken):
            raise SystemExit(f"run length {run_length}: a sample is taken twice within an epoch")
        rate = float(np.mean(num_requests)) / options.step_s
        prefix_rate = max(per_prefix) / options.step_s
        figures[str(run_length)] = {
            "requests_per_step": float(np.mean(num_requests)),
            "requests_per_sample": float(np.mean(num_requests)) / positions,
            "requests_per_s": rate,
            "busiest_shard_requests_per_s": max(per_shard) / options.step_s,
            "busiest_prefix_requests_per_s": prefix_rate,
            "prefixes_needed": int(np.ceil(rate / S3_READS_PER_S)),
            "samples_checked": len(taken),
        }
        rows.append(
            (
                run_length,
                f"{np.mean(num_requests):,.0f}",
                f"{np.mean(num_requests) / positions:.3f}",
                f"{rate:,.0f}",
                f"{max(per_shard) / options.step_s:.0f}",
                f"{prefix_rate:,.0f}",
                int(np.ceil(rate / S3_READS_PER_S)),
            )
        )
    headings = ("run length", "requests per step", "per sample", "per s", "busiest shard, per s")
    headings = (*headings, f"busiest of {options.prefixes} prefixes, per s", "prefixes needed")
    print(table(headings, rows))
    finish(
        {
            "benchmark": "simulate_requests",
            "machine": machine(),
            "settings": {key: str(value) for key, value in vars(options).items()},
            "steps_checked": len(steps),
            "owned_once": True,
            "run_lengths": figures,
            **watch.read(),
        },
        options.json,
    )


if __name__ == "__main__":
    main()
