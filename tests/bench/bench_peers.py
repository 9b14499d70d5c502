"""Ours against other loaders on the same mp4 bytes: `python tests/bench/bench_peers.py FILMS --json FILE`.

FILMS is a folder of videos. They are packed with the `train` preset; each system then gets those very bytes in the
container that is its own, and all end at float32 [8, 3, 16, 224, 224] with VideoMAE's crop, normalised. Reported are
clips per second of wall time at 2 workers and process-CPU seconds per clip (with all children), after a warm-up, from
warm page caches. How to install the peers: RESULTS.md.

Legend: see peers.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import Stopwatch, finish, interleave, machine, run_child, summarize, table
from peers import BATCH, CROP_SCALES, FACTS, FRAMES, PEERS, SIZE, STRIDE, WAYS, Sample
from torch import Tensor

from pretrain.data.augment import to_model_input
from pretrain.data.loader import ClipLoader
from pretrain.sections import DataConfig
from shards.pack import PackOptions, pack
from shards.reader import open_split

ARMS = (
    "ours",
    "webdataset + decord",
    "mosaicml-streaming + decord",
    "litdata + decord",
    "spdl + own decoder, sample",
    "spdl + own decoder, select",
    "spdl + own decoder, skip",
    "webdataset + our decode",
    "mosaicml-streaming + our decode",
    "litdata + our decode",
    "spdl + our decode",
)
WARM_CLIPS = 64


def prepare(films: Path, work: Path) -> None:
    """Pack once, then hand the same bytes to everybody."""
    packed = work / "packed"
    if not packed.exists():
        pack(films, packed, PackOptions(val_fraction=0.0, stride=STRIDE, min_frames=FRAMES))
    reader = open_split(str(packed), "train")
    samples = [
        Sample(reader.read(n), {name: int(row[name]) for name in FACTS}, float(row["rate"]))
        for n, row in enumerate(reader.records)
    ]
    for name, peer in PEERS.items():
        folder, partial = work / name, work / f"{name}.partial"
        if folder.exists():
            continue
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            peer.write(samples, partial)
        except ImportError as error:
            print(f"{name} is not installed or does not import: {error}", file=sys.stderr)
            continue
        partial.rename(folder)


def ours(packed: Path, num_workers: int) -> Iterator[Tensor]:
    data = DataConfig(
        shards=str(packed), frames=FRAMES, stride=STRIDE, size=SIZE, crop_scales=CROP_SCALES, workers=num_workers
    )
    with ClipLoader(data, seed=0, global_batch=BATCH) as loader:
        for batch in loader:
            yield to_model_input(batch, SIZE)


def run_arm(arm: str, work: Path, num_workers: int, num_clips: int) -> dict[str, float]:
    torch.set_num_threads(1)
    if arm == "ours":
        batches = ours(work / "packed", num_workers)
    else:
        peer, _, way = arm.partition(" + ")
        batches = PEERS[peer].load(work / peer, WAYS[way], num_workers)
    start_s = time.perf_counter()
    first_s = 0.0
    for _ in range(WARM_CLIPS // BATCH):
        batch = next(batches)
        first_s = first_s or time.perf_counter() - start_s
        assert batch.shape == (BATCH, 3, FRAMES, SIZE, SIZE), batch.shape
        assert batch.dtype == torch.float32
    watch = Stopwatch()
    num_steps = num_clips // BATCH
    mean = 0.0
    for _ in range(num_steps):
        mean += float(next(batches).mean()) / num_steps  # all arms must see pictures of about the same brightness
    used = watch.read()
    clips = num_steps * BATCH
    return {
        "clips_per_s": clips / used["wall_s"],
        "cpu_ms_per_clip": used["cpu_s"] / clips * 1000,
        "first_batch_s": first_s,
        "mean": mean,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("films", type=Path, help="folder of videos (or, with --arm, the work folder)")
    parser.add_argument("--work", type=Path, default=Path("data/bench_peers"), help="where containers are kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clips", type=int, default=320, help="measured per run, after the warm-up")
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.films, options.workers, options.clips)), flush=True)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options.films, options.work)

    def run(arm: str, _: int) -> dict[str, float] | None:
        if arm != "ours" and not (options.work / arm.partition(" + ")[0]).exists():
            return None
        size = ["--workers", str(options.workers), "--clips", str(options.clips)]
        try:
            return run_child([__file__, str(options.work), "--arm", arm, *size])
        except RuntimeError as error:
            print(f"{arm} does not run: {error}", file=sys.stderr)
            return None

    before = machine()
    summary = summarize(interleave(list(options.arms), options.repeats, run))
    ours_ms = summary["ours"]["cpu_ms_per_clip"]["median"]
    ours_rate = summary["ours"]["clips_per_s"]["median"]
    rows = []
    for arm, figures in summary.items():
        cpu_ms, rate = figures["cpu_ms_per_clip"], figures["clips_per_s"]
        figures["cpu_over_ours"] = round(cpu_ms["median"] / ours_ms, 2)
        figures["wall_over_ours"] = round(ours_rate / rate["median"], 2)
        rows.append(
            (
                arm,
                f"{cpu_ms['median']:.1f} ({cpu_ms['min']:.1f} to {cpu_ms['max']:.1f})",
                f"{rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f})",
                figures["cpu_over_ours"],
                figures["wall_over_ours"],
            )
        )
    headings = ("arm", "CPU ms per clip", "clips/s", "CPU / ours", "wall / ours")
    print(table(headings, rows), file=sys.stderr)
    with_own = [figures["cpu_over_ours"] for arm, figures in summary.items() if arm != "ours" and "our" not in arm]
    result = {
        "benchmark": "peers",
        "machine": before,
        "settings": {"workers": options.workers, "clips": options.clips, "batch": BATCH, "repeats": options.repeats},
        "arms": summary,
        "best_peer_cpu_over_ours": min(with_own, default=None),
        "target": 2.0,
    }
    finish(result, options.json)


if __name__ == "__main__":
    main()
