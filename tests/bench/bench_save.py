"""How long training waits for a checkpoint: `python tests/bench/bench_save.py [--repeats 5] [--ranks 1] --json FILE`.

Two arms take turns on the same engine (ViT-L with its decoder, more than 300 M parameters, fp32, AdamW: 12 bytes per
parameter), each with fsync:

    background  `Saver.begin`: copy at the boundary; a thread writes, hashes, fsyncs, commits
    plain       every state written straight from its memory into one file per rank, fsync, a barrier: no copy, no
                hash, no manifest, the least that a synchronous save can do

Blocking time runs from the end of a step to the beginning of the next, on the slowest rank. Steps during the
background write are compared with steps when nothing is written. The first save of each arm is reported apart; the
memory of the copies is taken before, as training does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import REPO, machine, spread

WARM_STEPS = 2


def child(folder: Path, repeats: int, size: str) -> dict[str, Any]:
    """One rank: build, step, save in turns; returns seconds by arm."""
    import torch

    from pretrain.agree import Agreement
    from pretrain.checkpoint import Facts
    from pretrain.config import load_config
    from pretrain.engine import Engine, join_ranks
    from pretrain.ledger import Ledger
    from pretrain.objective import Pretraining
    from pretrain.optim import build_optimizer
    from pretrain.saver import Saver
    from pretrain.world import world_from_environment

    world = world_from_environment()
    torch.set_num_threads(1)
    device = join_ranks(world, 600)
    agreement = Agreement(600)
    config = load_config(
        None,
        [
            f"run.dir={folder}", "data.shards=none", "data.frames=4", "data.size=32", f"model.size={size}",
            "objective.masked_frame.mask_ratio=0.5", "train.steps=100", f"train.global_batch={world.size}",
            "train.micro_batch=1", "train.precision=fp32", "zero.stage=2", "optim.lr=1e-4",
        ],
    )  # fmt: skip
    model = Pretraining(config.model.size, config.objective, frames=4, size=32, seed=0)
    num_parameters = sum(p.numel() for p in model.parameters())
    optimizer = build_optimizer(model, config.optim)
    engine = Engine(model, optimizer, train=config.train, zero=config.zero, world=world, device=device, size=32, seed=0)
    for name in ("attempts", "ledger", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    saver = Saver(folder, 1, world, config.checkpoint)
    ledger = Ledger(folder / "ledger", 1, world.rank)

    def step() -> float:
        """The arithmetic of a step without its data: forward-sized matrices, then the optimizer."""
        start_s = time.perf_counter()
        a = torch.randn(1024, 1024)
        for _ in range(20):
            a = torch.tanh(a @ a.T * 1e-3)
        agreement.wait()
        return time.perf_counter() - start_s

    def slices() -> list[tuple[str, str, int, torch.Tensor]]:
        return list(engine.states.slices())

    shapes = engine.states.shapes()
    rows: dict[str, list[float]] = {"background": [], "plain": [], "step": [], "step while writing": [], "write": []}
    for _ in range(WARM_STEPS):
        step()
    saver.reserve(slices())
    for number in range(1, repeats + 2):
        rows["step"] += [step() for _ in range(5)]
        agreement.wait()
        start_s = time.perf_counter()
        facts = Facts(number, number, 1, {}, {}, shapes, {}, [])
        saver.begin(number, slices(), ledger.cut(), facts if world.is_first else None)
        agreement.wait()
        rows["background"].append(time.perf_counter() - start_s)
        begun_s = time.perf_counter()
        while saver.step_in_flight is not None:
            rows["step while writing"].append(step())
            settled = saver.settle(agreement.start_maxima(saver.news()).result())
            assert settled is None or settled.is_committed
        rows["write"].append(time.perf_counter() - begun_s)

        agreement.wait()
        start_s = time.perf_counter()
        path = folder / f"plain-{world.rank}.bin"
        with path.open("wb") as file:
            for _, _, _, values_K in slices():
                file.write(values_K.detach().reshape(-1).numpy().data.cast("B"))
            file.flush()
            os.fsync(file.fileno())
        agreement.wait()
        rows["plain"].append(time.perf_counter() - start_s)
        path.unlink()
    of_ranks = [json.loads(text) for text in agreement.gather_texts(json.dumps(rows))]
    slowest = {name: [max(values) for values in zip(*(of[name] for of in of_ranks), strict=True)] for name in rows}
    return {"parameters": num_parameters, "bytes": 12 * num_parameters, **slowest}


def main() -> None:
    """Start the ranks, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--size", default="large")
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        found = child(options.child, options.repeats, options.size)
        if os.environ["RANK"] == "0":
            print("RESULT " + json.dumps(found), flush=True)
        return
    scratch = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        found = _run(scratch, options)
    finally:
        shutil.rmtree(scratch)
    arms = {name: found[name][1:] for name in ("background", "plain", "write")}
    arms |= {name: found[name] for name in ("step", "step while writing")}
    result = {
        "parameters": found["parameters"],
        "bytes": found["bytes"],
        "ranks": options.ranks,
        "ratio": statistics.median(arms["background"]) / statistics.median(arms["plain"]),
        "ratio_of_first": found["background"][0] / found["plain"][0],
        "slow_down": statistics.median(arms["step while writing"]) / statistics.median(arms["step"]),
        "seconds": {name: spread(values) for name, values in arms.items()},
        "first": {name: found[name][0] for name in ("background", "plain")},
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "save", "machine": machine(), **result}))


def _run(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(REPO), "WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(options.ranks), "OMP_NUM_THREADS": "1"}
    words = ["--child", str(scratch / "run"), "--repeats", str(options.repeats), "--size", options.size]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *words],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(options.ranks)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"a rank failed: {[rank.returncode for rank in ranks]}")
    [line] = [line for line in outputs[0].splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


if __name__ == "__main__":
    main()
