"""One loader in a process of its own, for bench_s3.py: `python s3_reader.py URL JSON`. Prints one JSON line.

Legend: B clips.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from measure import Stopwatch

from pretrain.data.augment import to_model_input
from pretrain.data.loader import ClipLoader
from pretrain.journal import Journal
from pretrain.sections import DataConfig
from shards import storage

STEADY_WAIT_SHARE = 0.02


def num_steps_until_steady(waits_s: list[float], step_s: float) -> int:
    """Steps before the first three in a row that wait no longer than a small share of a step."""
    limit_s = max(STEADY_WAIT_SHARE * step_s, 0.005)
    is_late = [wait_s > limit_s for wait_s in waits_s]
    return next((first for first in range(len(waits_s)) if not any(is_late[first : first + 3])), len(waits_s))


def main(url: str, settings: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    clip = {"frames": 16, "stride": 4, "size": 224, "workers": 2, **settings.get("data", {})}
    clip.update({name: settings[name] for name in ("workers", "run_length", "hedge_s") if name in settings})
    step_s = settings.get("step_s", 0.0)
    batch = settings["batch"]
    counters = storage.counters

    watch = Stopwatch()
    start_s = time.perf_counter()
    data = DataConfig(shards=url, **clip)
    with ClipLoader(
        data,
        seed=settings["seed"],
        global_batch=batch,
        micro_batch=settings.get("micro_batch"),
        rank=settings.get("rank", 0),
        world_size=settings.get("world_size", 1),
        journal=Journal(Path(settings["journal"])) if "journal" in settings else None,
        num_clips=settings["num_clips"],  # so that nothing is prefetched that is never handed out
    ) as loader:
        if settings.get("first_step"):
            loader.load_state_dict({**loader.state_dict(), "position": settings["first_step"] * batch})
        row: dict[str, Any] = {
            "open_s": time.perf_counter() - start_s,
            "open_bytes": counters.num_bytes,
            "open_requests": counters.num_reads,
            "samples": [],
            "checksums": [],
        }
        waits_s: list[float] = []
        ends_s: list[float] = []
        totals: Counter[str] = Counter()
        for clips in loader:
            if not waits_s:
                row["first_batch_s"] = time.perf_counter() - start_s
                row["first_batch_bytes"] = counters.num_bytes
                row["first_batch_requests"] = counters.num_reads
            stats = loader.stats()
            waits_s.append(stats.wait_s)
            totals.update(num_retries=stats.num_retries, num_hedges=stats.num_hedges, clips=clips.num_real)
            totals.update({f"substituted/{reason}": number for reason, number in stats.substituted.items()})
            real_B = clips.sample_B >= 0
            row["samples"] += clips.sample_B[real_B].tolist()
            row["checksums"] += clips.checksum_B[real_B].tolist()
            if settings.get("augment"):
                to_model_input(clips, data.size)
            time.sleep(step_s)
            ends_s.append(time.perf_counter() - start_s)
        used = watch.read()
    steady = num_steps_until_steady(waits_s, step_s)
    after_s = waits_s[steady:]
    return {
        **row,
        **totals,
        **used,
        "bytes_read": counters.num_bytes,
        "num_requests": counters.num_reads,
        "steady_after_steps": steady,
        "steady_after_s": ends_s[steady - 1] if steady else row["first_batch_s"],
        "wait_fraction_steady": sum(after_s) / (sum(after_s) + len(after_s) * step_s) if after_s and step_s else 0.0,
        "cpu_ms_per_clip": used["cpu_s"] / max(totals["clips"], 1) * 1000,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
