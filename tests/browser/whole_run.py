"""A run folder that has everything a report can show: six starts, a kill, a roll-back, trouble with storage."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

T = 1.79e9
WORLD = 8
CONFIG = """\
run: {dir: runs/whole, seed: 0}
data: {shards: 's3://films/kinetics-400/{000..511}.tar', frames: 16, stride: 4, size: 224}
model: {size: small}
objective: {masked_frame: {weight: 1.0}, frame_order: {weight: 0.1}}
train: {steps: 1200, global_batch: 512, micro_batch: 8, precision: bf16}
checkpoint: {every_steps: 50, mirror: 's3://films/runs/whole'}
track: {wandb: offline, log_every_steps: 10}
"""
ENVIRONMENT = {"versions": {"torch": "2.13.0", "deepspeed": "0.19.8"}, "num_cpus": 96, "gpu": "NVIDIA H100 80GB HBM3"}
STARTS = [
    # number, start, last step, seconds after the run began, outcome
    (1, 0, 340, 0, None),
    (2, 300, 520, 900, ("failed", 520, "CUDA error: an illegal memory access was encountered on rank 5 (node n3)")),
    (3, 500, 700, 1500, ("stopped", 700, "a signal: saved at step 700; the same command goes on")),
    (4, 700, 910, 2400, ("rolled_back", 910, "the loss of step 905 is 9.1 sigma above its mean")),
    (5, 850, 1010, 2960, ("failed", 1010, "rank 3 was in a collective for more than 900 s")),
    (6, 1000, 1200, 3600, ("finished", 1200, "all 1200 steps are done")),
]
TITLES = {
    "Masked frame: loss",
    "Frame order: loss",
    "Weighted sum of the losses",
    "Frame order: right answers",
    "Masked frame: parts of the training loss",
    "Frame order: not asked, nothing moves",
    "Where the time went",
    "A save holds up training",
    "A save is written beside training",
    "Size of a checkpoint",
    "Age of the newest whole checkpoint",
    "Clips per second",
    "Seconds per step",
    "Where a step's time goes, mean of the ranks",
    "Waiting for data",
    "Computing time of the slowest rank",
    "Model FLOPs utilisation",
    "Memory",
    "Seconds per step, rank by rank",
    "Decoding: milliseconds per clip",
    "Bytes read, per row",
    "Requests, per row",
    "Storage trouble, per row",
    "Other incidents, per row",
    "Samples replaced, per row",
    "Learning rate",
    "Gradient norm",
}
"""Every plot that such a run has."""


def write_whole_run(folder: Path) -> Path:
    """Fill `folder`."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "attempts").mkdir()
    rows: list[dict[str, Any]] = []
    for number, start, last, begin_s, outcome in STARTS:
        ended_s = _attempt(rows, draw, number, start, last, begin_s)
        facts = {"attempt": number, "time": T + begin_s, "world_size": WORLD}
        facts["nodes"] = [f"n{rank // 2}" for rank in range(WORLD)]
        (folder / "attempts" / f"{number:04d}.json").write_text(json.dumps(facts))
        if outcome is not None:
            kind, step, reason = outcome
            told = {"outcome": kind, "step": step, "reason": reason, "time": T + ended_s}
            (folder / "attempts" / f"{number:04d}.outcome.json").write_text(json.dumps(told))
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "pictures").mkdir()
    for number in range(3):
        picture = Image.new("RGB", (480, 180), (30 + 60 * number, 90, 120))
        ImageDraw.Draw(picture).text((20, 80), f"original · masked · filled in ({number})", fill="white")
        picture.save(folder / "pictures" / f"held-out-{number}.png")
    return folder


def _attempt(
    rows: list[dict[str, Any]], draw: random.Random, number: int, start: int, last: int, begin_s: float
) -> float:
    at_s = begin_s + 40.0
    rows.append(
        {"kind": "start", "attempt": number, "time": T + at_s, "step": start, "world_size": WORLD, "zero_stage": 2}
    )
    for step in range(start + 10, last + 1, 10):
        step_s = 1.3 + 0.1 * draw.random()
        at_s += 10 * step_s
        rows.append({"kind": "train", "attempt": number, "time": T + at_s, "step": step, **_train(draw, step, step_s)})
        if step % 50 == 0:
            at_s += 6
            rows.append({"kind": "eval", "attempt": number, "time": T + at_s, "step": step, **_eval(draw, step)})
        if step % 50 == 0 and step not in (350, 600):
            at_s += 0.8
            save = {"seconds": 0.7 + 0.3 * draw.random(), "write_s": 9 + draw.random(), "bytes": 271_000_000}
            rows.append({"kind": "save", "attempt": number, "time": T + at_s, "step": step, **save})
            rows.append(_event(number, at_s + 5, step, "mirrored", "s3://films/runs/whole"))
        if step == 600:
            rows.append(_event(number, at_s, step, "save_failed", "No space left on device"))
        if step == 420:
            rows.append(_event(number, at_s, step, "skipped", "not finite: gradient on rank 2"))
    if number == 4:
        more = {"to": 850, "first": 899, "stop": 909}
        rows.append({**_event(4, at_s, last, "rolled_back", "9.1 sigma above its mean"), **more})
    return at_s + 2


def _event(attempt: int, at_s: float, step: int, event: str, reason: str) -> dict[str, Any]:
    return {"kind": "event", "attempt": attempt, "time": T + at_s, "step": step, "event": event, "reason": reason}


def _train(draw: random.Random, step: int, step_s: float) -> dict[str, Any]:
    noise = 0.03 * draw.random()
    loss = 0.45 + 0.6 * math.exp(-step / 300) + noise
    data_s = [0.02 + 0.05 * draw.random() for _ in range(WORLD)]
    compute_s = [step_s - 0.25 - 0.1 * draw.random() + (0.12 if rank == 5 else 0) for rank in range(WORLD)]
    comm_s = [max(0.0, step_s - data - compute) for data, compute in zip(data_s, compute_s, strict=True)]
    return {
        "loss": loss + 0.1, "loss/masked_frame": loss, "masked_frame/tube": loss - 0.05,
        "masked_frame/frame": loss + 0.04,
        "loss/frame_order": 1.9 - 0.3 * step / 1200 + noise, "frame_order/accuracy": 0.15 + 0.3 * step / 1200,
        "frame_order/chance": 1 / 7, "frame_order/gated": 0.06 + noise, "lr": 1e-3 * min(1.0, step / 200),
        "grad_norm": 0.8 + noise, "step_s": step_s, "clips_per_s": 512 / step_s, "mfu": 0.41 + noise / 3,
        "compute_s": sum(compute_s) / WORLD, "comm_wait_s": sum(comm_s) / WORLD, "data_wait_s": sum(data_s) / WORLD,
        "ranks/compute_s": compute_s, "ranks/comm_wait_s": comm_s, "ranks/data_wait_s": data_s,
        "slowest_compute_rank": compute_s.index(max(compute_s)), "slowest_compute_ratio": 1.1 + noise,
        "data_wait_fraction": max(data_s) / step_s, "data_wait_mean_fraction": sum(data_s) / WORLD / step_s,
        "data_wait_max_s": max(data_s), "slowest_rank": data_s.index(max(data_s)),
        "gpu_memory_bytes": 61.2e9, "memory_bytes": 21.4e9, "durable_age_s": 1.35 * (step % 50) + 2,
        "decode_ms": 21 + 4 * draw.random(), "bytes_read": int(9.1e9 + 4e8 * draw.random()), "requests": 5120,
        "cache_hits": 64, "cache_misses": 3, "retries": int(step % 170 == 0), "hedges": 2, "throttled": 0,
        "decoder_respawns": int(step == 640), "stride_dropped": 1, "substituted/io": int(step % 230 == 0),
        "substituted/checksum": 0,
    }  # fmt: skip


def _eval(draw: random.Random, step: int) -> dict[str, Any]:
    loss = 0.5 + 0.6 * math.exp(-step / 300) + 0.01 * draw.random()
    return {
        "loss": loss + 0.12, "loss/masked_frame": loss, "masked_frame/zero": 0.99, "masked_frame/copy": 0.83,
        "loss/frame_order": 1.92 - 0.25 * step / 1200, "frame_order/accuracy": 0.15 + 0.25 * step / 1200,
        "frame_order/chance": 1 / 7,
    }  # fmt: skip
