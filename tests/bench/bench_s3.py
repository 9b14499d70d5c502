"""The loader against a real S3 server: `python tests/bench/bench_s3.py PACKED --json FILE [--parts start delay ...]`.

PACKED is a packed folder (a few hundred samples); it is uploaded to a JuiceFS gateway started for the purpose. Parts:

    start     cold start against a start in mid-epoch: seconds and bytes to the first batch; then the epoch is finished,
              and the bytes read are compared with those of the samples that were left            (check 3)
    delay     40 ms before each request: requests per sample by run length, time until no step waits   (check 4)
    bytes     bytes read over bytes of samples used, one epoch, 1, 2, 4 ranks, no hedging               (check 5)
    faults    5 % of all requests fail and one outage of 60 s: the same samples, what it costs          (check 6)
    wait      the demo's model on 2 ranks from S3: data wait, the loader's share of the CPU            (check 11)

Every measurement is a process of its own; arms that are compared take turns.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import REPO, finish, interleave, machine, run_child, spread, summarize, table
from numpy.typing import NDArray
from s3_server import Proxy, Server, s3_server

from shards.manifest import build_manifest
from shards.reader import open_split

PARTS = ("start", "delay", "bytes", "faults", "wait")
DELAY_MS = 40
DELAY_STEPS = 30
RUN_LENGTHS = (1, 8, 32)
CHILD = Path(__file__).with_name("s3_reader.py")
DEMO_WARM_STEPS = 40


@dataclass(frozen=True)
class Data:
    """A packed folder in the bucket, and the sizes of its samples."""

    url: str
    sizes_N: NDArray[np.int64]

    def read(self, environment: dict[str, str], *, epochs: float = 1, **settings: Any) -> dict[str, Any]:
        """Run s3_reader.py, one loader in a process of its own, to the end of that many epochs."""
        settings = {"num_clips": int(epochs * len(self.sizes_N)), **settings}
        row = run_child([str(CHILD), self.url, json.dumps(settings)], environment=environment)
        row["sample_bytes"] = int(self.sizes_N[row["samples"]].sum())
        row["requests_per_sample"] = (row["num_requests"] - row["open_requests"]) / len(row["samples"])
        row["bytes_over_needed"] = (row["bytes_read"] - row["open_bytes"]) / row["sample_bytes"]
        return row


def upload(server: Server, folder: Path, name: str) -> Data:
    sizes_N = np.asarray(open_split(str(folder), "train").records["size"], dtype=np.int64)
    return Data(server.upload(folder, name), sizes_N)


def enlarge(packed: Path, folder: Path, copies: int) -> Path:
    """One tar with every sample of a packed set several times: runs of neighbours then seldom meet the end of a tar."""
    members: list[tuple[str, bytes]] = []
    for path in sorted(packed.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                members.append((member.name, file.read()))
    with tarfile.open(folder / "train-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for copy in range(copies):
            for name, content in members:
                header = tarfile.TarInfo(f"c{copy:03d}-{name}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    build_manifest(folder, "train")
    return folder


def part_start(server: Server, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """A start in the middle must cost what a start at the beginning costs."""
    endings: dict[str, list[dict[str, Any]]] = {"cold": [], "mid-epoch": []}

    def run(arm: str, repeat: int) -> dict[str, float]:
        # which samples come first differs from seed to seed: both arms see as many seeds
        first_step = 0 if arm == "cold" else len(data.sizes_N) // 2 // 16
        row = data.read(server.environment(), seed=repeat, batch=16, first_step=first_step, hedge_s=0.0)
        endings[arm].append(row)
        names = ("open_s", "first_batch_s", "first_batch_bytes", "first_batch_requests", "bytes_over_needed")
        return {name: row[name] for name in names}

    summary = summarize(interleave(["cold", "mid-epoch"], options.repeats, run))
    ratios = {
        name: round(summary["mid-epoch"][name]["median"] / max(summary["cold"][name]["median"], 1e-9), 3)
        for name in ("first_batch_s", "first_batch_bytes")
    }
    rows = [
        (arm, *(f"{figure['median']:.4g} ({figure['min']:.4g} to {figure['max']:.4g})" for figure in figures.values()))
        for arm, figures in summary.items()
    ]
    print(table(("start", *summary["cold"]), rows), file=sys.stderr)
    # the samples of a run that starts in the middle are those that the run from the beginning had left
    exact = all(
        mid["samples"] == cold["samples"][len(cold["samples"]) - len(mid["samples"]) :]
        for cold, mid in zip(endings["cold"], endings["mid-epoch"], strict=True)
    )
    return {"arms": summary, "mid_over_cold": ratios, "same_samples": exact, "target": 1.2}


def part_delay(server: Server, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """A paced consumer (each step takes `step_s`) behind a proxy that holds every request back."""
    arms = [f"r={r}, {delay} ms" for r in RUN_LENGTHS for delay in (0, DELAY_MS)]
    with tempfile.TemporaryDirectory() as folder:
        data = upload(server, enlarge(options.packed, Path(folder), options.copies), "enlarged")

    def run(arm: str, repeat: int) -> dict[str, float]:
        run_length, _, delay = arm.removeprefix("r=").removesuffix(" ms").partition(", ")
        with Proxy(server, delay_ms=float(delay)) as proxy:
            row = data.read(
                server.environment(proxy.endpoint),
                seed=repeat,
                batch=32,
                run_length=int(run_length),
                step_s=options.step_s,
                num_clips=DELAY_STEPS * 32,
                hedge_s=0.0,
            )
        return {
            "requests_per_sample": row["requests_per_sample"],
            "limit": 1.1 / int(run_length),
            "first_batch_s": row["first_batch_s"],
            "steady_after_s": row["steady_after_s"],
            "steady_after_steps": row["steady_after_steps"],
            "wait_fraction_steady": row["wait_fraction_steady"],
            "most_at_a_time": proxy.counts["most_at_a_time"],
        }

    summary = summarize(interleave(arms, options.repeats, run))
    rows = [(arm, *(f"{figure['median']:.4g}" for figure in figures.values())) for arm, figures in summary.items()]
    print(table(("arm", *summary[arms[0]]), rows), file=sys.stderr)
    return {"arms": summary, "step_s": options.step_s, "delay_ms": DELAY_MS, "target": "at most 1.1 / r"}


def part_bytes(server: Server, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """All ranks of one epoch at once, each in its process; the proxy counts what went over the wire."""
    arms = [f"{world} ranks, r={r}" for world in (1, 2, 4) for r in (1, 8)]

    def run(arm: str, repeat: int) -> dict[str, float]:
        world = int(arm.split(" ")[0])
        run_length = int(arm.rpartition("=")[2])
        settings = {"seed": repeat, "batch": 32, "world_size": world, "run_length": run_length, "workers": 1}
        settings["hedge_s"] = 0.0
        with Proxy(server) as proxy, ThreadPoolExecutor(world) as threads:
            environment = server.environment(proxy.endpoint)
            calls = [threads.submit(data.read, environment, rank=rank, **settings) for rank in range(world)]
            ranks = [call.result() for call in calls]
        taken = sorted(sample for row in ranks for sample in row["samples"])
        used = sum(row["sample_bytes"] for row in ranks)
        return {
            "read_over_used": sum(row["bytes_read"] for row in ranks) / used,
            "wire_over_used": proxy.counts["bytes"] / used,
            "each_once": float(taken == list(range(len(data.sizes_N)))),
            "requests": float(proxy.counts["requests"]),
        }

    summary = summarize(interleave(arms, options.repeats, run))
    rows = [(arm, *(f"{figure['median']:.4g}" for figure in figures.values())) for arm, figures in summary.items()]
    print(table(("arm", *summary[arms[0]]), rows), file=sys.stderr)
    return {"arms": summary, "target": 1.05}


def part_faults(server: Server, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """The same run without faults, with them, and once more without but with the journal that the faults left."""
    rows: dict[str, list[dict[str, Any]]] = {"clean": [], "faulty": [], "journal obeyed": []}
    for repeat in range(options.fault_repeats):
        with tempfile.TemporaryDirectory() as journal:
            settings = {"seed": repeat, "batch": 32, "step_s": options.step_s, "epochs": options.fault_epochs}
            clean = data.read(server.environment(), **settings)
            down = {"down_after_s": clean["wall_s"] / 3, "down_s": options.outage_s}
            with Proxy(server, rate=0.05, seed=repeat, **down) as proxy:
                environment = server.environment(proxy.endpoint)
                faulty = data.read(environment, journal=journal, **settings)
            faulty["faults"] = proxy.counts
            again = data.read(server.environment(), journal=journal, **settings)
        for arm, row in zip(rows, (clean, faulty, again), strict=True):
            rows[arm].append(row)
            print(f"{repeat + 1}/{options.fault_repeats} {arm}: {row['wall_s']:.1f} s", file=sys.stderr, flush=True)
    pairs = list(zip(rows["clean"], rows["faulty"], rows["journal obeyed"], strict=True))
    return {
        "clean_wall_s": spread([row["wall_s"] for row in rows["clean"]]),
        "faulty_wall_s": spread([row["wall_s"] for row in rows["faulty"]]),
        "throughput_lost": spread([1 - clean["wall_s"] / faulty["wall_s"] for clean, faulty, _ in pairs]),
        "throughput_lost_beside_the_outage": spread(
            [1 - clean["wall_s"] / max(faulty["wall_s"] - options.outage_s, 1e-9) for clean, faulty, _ in pairs]
        ),
        "substituted": [
            {name: value for name, value in row.items() if name.startswith("substituted/")} for row in rows["faulty"]
        ],
        "retries": spread([row["num_retries"] for row in rows["faulty"]]),
        "hedges": spread([row["num_hedges"] for row in rows["faulty"]]),
        "faults": [row["faults"] for row in rows["faulty"]],
        "same_samples_given_the_journal": all(
            faulty["samples"] == again["samples"] and faulty["checksums"] == again["checksums"]
            for _, faulty, again in pairs
        ),
        "same_samples_as_clean": all(clean["samples"] == faulty["samples"] for clean, faulty, _ in pairs),
        "outage_s": options.outage_s,
        "rate": 0.05,
    }


def part_wait(server: Server, _: Data, options: argparse.Namespace) -> dict[str, Any]:
    """The demo's model itself; the loader's CPU is taken from a loader that runs alone at the same settings."""
    import psutil

    if options.demo is None:
        raise SystemExit("part wait needs --demo FOLDER: what `make demo` packed (data/demo)")
    demo = upload(server, options.demo, "demo")
    waits: list[float] = []
    shares: list[float] = []
    alone_ms: list[float] = []
    seen_ms: list[float] = []
    clip = {"frames": 8, "stride": 2, "size": 48, "crop_scales": [1.0], "workers": 1}
    for repeat in range(options.wait_repeats):
        settings = {"seed": repeat, "batch": 32, "micro_batch": 8, "num_clips": 3200, "data": clip}
        alone = demo.read(server.environment(), **settings)
        with_view = demo.read(server.environment(), augment=True, **settings)
        alone_ms.append(alone["cpu_ms_per_clip"])
        seen_ms.append(with_view["cpu_ms_per_clip"])
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder, "run")
            sets = [f"run.dir={run_dir}", f"run.seed={repeat}", f"data.shards={demo.url}", "track.wandb=off"]
            sets += [f"train.steps={options.wait_steps}", "eval.every_steps=0", "track.log_every_steps=10"]
            sets += [f"checkpoint.every_steps={options.wait_steps}"]
            command = [sys.executable, "-m", "launch.cli", "pretrain", "configs/demo.yaml", *sets, "--ranks", "2"]
            environment = {**_base_environment(), **server.environment()}
            with Path(folder, "log").open("wb") as log:
                run = subprocess.Popen(command, cwd=REPO, env=environment, stdout=log, stderr=log)
                seen = _watch(psutil.Process(run.pid), run.poll, run_dir / "metrics.jsonl")
            if run.returncode:
                raise SystemExit(
                    f"the demo's run ended with {run.returncode}: {Path(folder, 'log').read_text()[-3000:]}"
                )
            rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        warm = [row for row in rows if row["kind"] == "train" and row["step"] > DEMO_WARM_STEPS]
        waits.append(sum(row["data_wait_fraction"] for row in warm) / len(warm))
        clips = (seen["last_step"] - seen["first_step"]) * 32
        shares.append(alone["cpu_ms_per_clip"] * clips / 1000 / seen["cpu_s"])
        print(f"{repeat + 1}: data wait {waits[-1]:.4f}, loader share {shares[-1]:.4f}", file=sys.stderr, flush=True)
    return {
        "data_wait_fraction": spread(waits),
        "loader_cpu_over_total_cpu": spread(shares),
        "loader_cpu_ms_per_clip": spread(alone_ms),
        "loader_and_augmentation_cpu_ms_per_clip": spread(seen_ms),
        "steps": options.wait_steps,
        "target": 0.02,
    }


def _watch(root: Any, poll: Callable[[], int | None], metrics: Path) -> dict[str, float]:
    """CPU seconds of a run's processes between its first warm metrics row and its last."""
    import psutil

    first: tuple[int, float] | None = None
    last = (0, 0.0)
    while poll() is None:
        time.sleep(0.25)
        try:
            rows = [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
            total_s = 0.0
            for process in (root, *root.children(recursive=True)):
                times = process.cpu_times()
                total_s += times.user + times.system + times.children_user + times.children_system
        except (FileNotFoundError, psutil.NoSuchProcess):
            continue
        steps = [row["step"] for row in rows if row["kind"] == "train"]
        if steps and steps[-1] >= DEMO_WARM_STEPS and steps[-1] != last[0]:
            last = (steps[-1], total_s)
            first = first or last
    if first is None or first == last:
        raise SystemExit("the demo's run was too short to measure: raise --wait-steps")
    return {"first_step": first[0], "last_step": last[0], "cpu_s": last[1] - first[1]}


def _base_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", str(REPO))}


RUN = {"start": part_start, "delay": part_delay, "bytes": part_bytes, "faults": part_faults, "wait": part_wait}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packed", type=Path)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--step-s", type=float, default=1.0, help="a training step of the paced consumer (32 clips)")
    parser.add_argument("--copies", type=int, default=8, help="of each sample, for the part delay")
    parser.add_argument("--fault-repeats", type=int, default=1)
    parser.add_argument("--fault-epochs", type=int, default=10)
    parser.add_argument("--outage-s", type=float, default=60.0)
    parser.add_argument("--demo", type=Path, help="the packed films of `make demo`")
    parser.add_argument("--wait-repeats", type=int, default=3)
    parser.add_argument("--wait-steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "s3",
        "machine": machine(),
        "data": hashlib.sha256((options.packed / "manifest.json").read_bytes()).hexdigest()[:12],
    }
    with s3_server() as server:
        data = upload(server, options.packed, "packed")
        data.read(server.environment(), seed=0, batch=32)  # warm: the server's memory, page caches
        for part in options.parts:
            print(f"--- {part}", file=sys.stderr, flush=True)
            result[part] = RUN[part](server, data, options)
    finish(result, options.json)


if __name__ == "__main__":
    main()
