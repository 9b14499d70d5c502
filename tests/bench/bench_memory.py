"""Does the loader's memory stay flat? `python tests/bench/bench_memory.py PACKED --json FILE` (check 8).

Looked at is RssAnon of /proc/PID/status, of the process that trains and of each decode worker: memory that nothing but
these processes hold. File pages (an index that is memory-mapped) are given beside it: the kernel takes those back.

    epochs    many epochs of the packed set PACKED; RssAnon at each epoch, and its slope after a warm-up
    records   the same set with an index of 10^8 records (every row is a copy of one of its own): a loader that holds
              anything per record would need hundreds of MB

Each part runs in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Stopwatch, finish, machine, run_child, table

from pretrain.data.loader import ClipLoader
from pretrain.sections import DataConfig
from shards.layout import Manifest, Split
from shards.reader import open_split

WARM_SHARE = 0.2
FLAT_MB_PER_EPOCH = 0.05
FLAT_GROWTH_MB = 16.0
BLOCK_ROWS = 10**6


def memory_mb(pid: int | str) -> dict[str, float]:
    """RssAnon and RssFile of a process, in MB; nothing for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return {}
    values = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
    return {name: round(values.get(name, 0.0), 2) for name in ("RssAnon", "RssFile", "RssShmem")}


def look(loader: ClipLoader) -> dict[str, Any]:
    return {"trainer": memory_mb("self"), "workers": [memory_mb(pid) for pid in loader.worker_pids]}


def clips(packed: Path, workers: int, batch: int) -> ClipLoader:
    reader = open_split(str(packed), "train")
    frames = min(16, reader.split.min_frames & ~1)
    data = DataConfig(shards=str(packed), frames=frames, size=64, workers=workers, prefetch_steps=2)
    return ClipLoader(data, seed=1, global_batch=batch)


def run_epochs(packed: Path, epochs: int, workers: int, batch: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with clips(packed, workers, batch) as loader:
        step = 0
        for epoch in range(epochs):
            while step * batch < (epoch + 1) * loader.num_samples:
                next(loader)
                step += 1
            loader.stats()
            rows.append(look(loader))
    return {"rows": rows, "num_samples": loader.num_samples}


def run_records(packed: Path, steps: int, workers: int, batch: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    before = memory_mb("self")
    watch = Stopwatch()
    rows: list[dict[str, Any]] = []
    with clips(packed, workers, batch) as loader:
        opened = look(loader)
        seconds = watch.read()
        # steps all over the first epoch, the last one too
        last = loader.num_samples // batch - 1
        for part in range(20):
            state = loader.state_dict()
            state["position"] = last * part // 19 * batch
            loader.load_state_dict(state)
            for _ in range(steps // 20):
                next(loader)
            rows.append(look(loader))
    return {
        "before": before,
        "opened": opened,
        "open": seconds,
        "rows": rows,
        "num_samples": loader.num_samples,
    }


def grow(packed: Path, folder: Path, num_records: int) -> None:
    """A data set of `num_records` samples whose rows repeat those of a small one. Its tars are links."""
    reader = open_split(str(packed), "train")
    repeats = -(-BLOCK_ROWS // len(reader))
    block = np.tile(np.asarray(reader.records), repeats)
    digest = hashlib.sha256()
    with (folder / "train.index").open("wb") as file:
        left = num_records
        while left:
            part = block[: min(left, len(block))].tobytes()
            file.write(part)
            digest.update(part)
            left -= min(left, len(block))
    mean_frames = reader.split.num_frames / len(reader)
    split: Split = dataclasses.replace(
        reader.split,
        index="train.index",
        num_samples=num_records,
        num_frames=int(mean_frames * num_records),
        sha256=digest.hexdigest(),
    )
    for shard in split.shards:
        (folder / shard.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / shard.name).symlink_to((packed / shard.name).resolve())
    manifest = Manifest.make(preset=reader.manifest.preset, labels=reader.manifest.labels, splits={"train": split})
    (folder / "manifest.json").write_text(manifest.to_json())


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Slope of the sum over trainer and workers after the warm-up, growth of its peaks, and the most seen."""
    total = [row["trainer"]["RssAnon"] + sum(worker.get("RssAnon", 0.0) for worker in row["workers"]) for row in rows]
    trainer = [row["trainer"]["RssAnon"] for row in rows]
    warm = int(len(rows) * WARM_SHARE)
    half = (warm + len(rows)) // 2
    numbers = np.arange(warm, len(rows))
    slope = float(np.polyfit(numbers, total[warm:], 1)[0]) if len(numbers) > 1 else 0.0
    return {
        "first_mb": total[0],
        "warm_mb": total[warm],
        "last_mb": total[-1],
        "peak_mb": max(total),
        "trainer_last_mb": trainer[-1],
        "slope_mb_per_row": round(slope, 4),
        # One look finds a clip's buffers (about 20 MB each) in use or not: peaks are compared, not two looks.
        "growth_after_warm_up_mb": round(max(total[half:]) - max(total[warm:half]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packed", type=Path, help="a packed folder, small: its samples are read over and over")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--records", type=int, default=10**8)
    parser.add_argument("--steps", type=int, default=400, help="with the long index")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--scratch", type=Path, help="where the long index goes (48 bytes a record; removed at the end)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=("epochs", "records"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "epochs":
        print(json.dumps(run_epochs(options.packed, options.epochs, options.workers, options.batch)))
        return
    if options.part == "records":
        print(json.dumps(run_records(options.packed, options.steps, options.workers, options.batch)))
        return

    settings = ["--workers", str(options.workers), "--batch", str(options.batch)]
    before = machine()
    arguments = [__file__, str(options.packed), "--part", "epochs", "--epochs", str(options.epochs)]
    epochs = run_child([*arguments, *settings])
    result: dict[str, Any] = {
        "benchmark": "memory",
        "machine": before,
        "epochs": {"num_samples": epochs["num_samples"], "num_epochs": options.epochs, **judge(epochs["rows"])},
        "epoch_rows": epochs["rows"],
    }
    if options.records:
        need = options.records * 48
        place = options.scratch or Path(tempfile.gettempdir())
        if shutil.disk_usage(place).free < 2 * need:
            raise SystemExit(f"{place} has no room for twice the {need / 1e9:.1f} GB of the index: use --scratch")
        with tempfile.TemporaryDirectory(dir=place) as folder:
            grow(options.packed, Path(folder), options.records)
            arguments = [__file__, folder, "--part", "records", "--steps", str(options.steps)]
            records = run_child([*arguments, *settings])
        result["records"] = {
            "num_samples": records["num_samples"],
            "before_opening_mb": records["before"]["RssAnon"],
            "after_opening_mb": records["opened"]["trainer"]["RssAnon"],
            "open": records["open"],
            "rss_file_mb": records["rows"][-1]["trainer"]["RssFile"],
            **judge(records["rows"]),
        }
    rows = [
        (part, *(result[part][name] for name in ("warm_mb", "last_mb", "peak_mb", "slope_mb_per_row")))
        for part in ("epochs", "records")
        if part in result
    ]
    headings = ("part", "RssAnon after warm-up, MB", "at the end", "peak", "slope, MB per row")
    print(table(headings, rows), file=sys.stderr)
    slope = result["epochs"]["slope_mb_per_row"]
    result["flat"] = slope <= FLAT_MB_PER_EPOCH and result["epochs"]["growth_after_warm_up_mb"] <= FLAT_GROWTH_MB
    finish(result, options.json)


if __name__ == "__main__":
    main()
