"""Real gloo ranks that tell what they hold and send: `zero_states.py OUT WORLD,WORLD…` writes OUT/WORLD-RANK.json.

torch and DeepSpeed are imported once; the ranks of all worlds are forked from there, one world after the other. Each
rank builds the engine at every stage and precision and takes accumulated steps. What lives is looked up by unique
storage at two kinds of moments, around backward passes and just before the optimizer's updates; a category's figure is
its largest. All other tensors that live then, activations gone, are summed up as unexplained.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # like the next, for every rank before it is forked
import torch
import torch._dynamo
from torch import distributed

from tests.dist.jobs import made_up_batches, make_engine
from tests.dist.ranks import environments

PRECISIONS = ("fp32", "bf16")
STAGES = (0, 1, 2, 3)
MICRO_BATCH, NUM_MICRO_STEPS = 2, 2
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor")

Held = dict[int, int]
"""Address of a storage -> its bytes."""


def storages(*roots: Any) -> Held:
    """Every storage below some tensors, lists and dictionaries."""
    found: Held = {}
    for root in roots:
        if isinstance(root, torch.Tensor):
            storage = root.untyped_storage()
            if root.device.type == "cpu" and storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(root, dict):
            found |= storages(*root.values())
        elif isinstance(root, list | tuple):
            found |= storages(*root)
    return found


def held(engine: Any) -> dict[str, Held]:
    """What the engine holds by category; a storage counts where it is found first."""
    sharded, parameters = engine.states._sharded, list(engine.module.parameters())
    flats = engine.states._flat_states()
    roots: dict[str, list[Any]] = {
        "parameters": [*parameters, *(getattr(p, "ds_tensor", None) for p in parameters)],
        "optimizer": [*flats, *(state for flat in flats for state in engine.states._optimizer.state[flat].values())],
        "gradients": [
            *(p.grad for p in parameters if p.grad is not None),
            *(getattr(p, "grad_accum", None) for p in parameters),
            *(flat.grad for flat in flats if flat.grad is not None),
            *(getattr(sharded, name, None) for name in ("averaged_gradients", "all_grad_tensors")),
            *(getattr(sharded, name, None) for name in ("grad_partitions_flat_buffer", "fp32_groups_gradients_flat")),
        ],
        "buckets": [bucket.buffer for bucket in (getattr(sharded, "ipg_buckets", None) or {}).values()],
    }
    seen: set[int] = set()
    found: dict[str, Held] = {}
    for name, tensors in roots.items():
        found[name] = {at: size for at, size in storages(tensors).items() if at not in seen}
        seen |= found[name].keys()
    return found


LOOKS, LOOK_S = 5, 0.02


def every_tensor() -> list[torch.Tensor]:
    """All that Python knows of. `type` and not isinstance: lazy objects would import what they stand for."""
    found = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return [tensor for tensor in found if tensor.device.type == "cpu"]


class Peaks:
    """The largest figure of each category over the moments of one kind."""

    def __init__(self, engine: Any, before: set[int]) -> None:
        self.engine, self.before = engine, before
        self.bytes: dict[str, Counter[str]] = {"backward": Counter(), "update": Counter()}
        self.unexplained = 0

    def look(self, moment: str, *, everywhere: bool = False) -> None:
        found = held(self.engine)
        for name, sizes in found.items():
            self.bytes[moment][name] = max(self.bytes[moment][name], sum(sizes.values()))
        if everywhere:
            known = {at for sizes in found.values() for at in sizes} | self.before
            # A thread of gloo may hold a finished collective's tensor a moment longer: what stays is meant.
            self.unexplained = max(self.unexplained, min(self._others(known) for _ in range(LOOKS)))

    def _others(self, known: set[int]) -> int:
        time.sleep(LOOK_S)
        return sum(size for at, size in storages(every_tensor()).items() if at not in known)


def count_collectives() -> Counter[str]:
    """Bytes of the tensors given to each collective from now on (the larger side where they differ)."""
    counted: Counter[str] = Counter()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
            counted[name] += max(tensor.nbytes for tensor in tensors)
            return original(*arguments, **named)

        return call

    for name in COLLECTIVES:
        setattr(distributed, name, counting(name, getattr(distributed, name)))
    return counted


def measure(stage: int, precision: str, world: int, counted: Counter[str]) -> dict[str, Any]:
    gc.collect()
    before = set(storages(every_tensor()))
    batch = MICRO_BATCH * NUM_MICRO_STEPS * world
    engine: Any = make_engine(
        stage=stage,
        offload=False,
        precision=precision,
        optimizer="adamw",
        global_batch=batch,
        micro_batch=MICRO_BATCH,
        seed=1,
    )
    for step in range(2 if stage == 3 else 1):  # stage 3 knows what it will need again only after a step
        engine.step(made_up_batches(step, engine, batch, MICRO_BATCH), lr=1e-3)
    peaks = Peaks(engine, before)
    backward = engine._engine.backward

    def watched(loss: Any) -> None:
        peaks.look("backward")
        backward(loss)
        peaks.look("backward", everywhere=True)

    engine._engine.backward = watched
    handle = engine.states._optimizer.register_step_pre_hook(lambda *_: peaks.look("update"))
    counted.clear()
    engine.step(made_up_batches(2, engine, batch, MICRO_BATCH), lr=1e-3)
    handle.remove()
    del engine._engine.backward
    answer = {**peaks.bytes, "unexplained": peaks.unexplained, "sent": dict(counted)}
    engine._engine.destroy()
    return answer


def rank(out: Path, world: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    from pretrain.engine import join_ranks
    from pretrain.world import world_from_environment

    torch.set_num_threads(1)
    counted = count_collectives()
    join_ranks(world_from_environment(), 300)
    answers = {f"{p}-{s}": measure(s, p, world, counted) for p in PRECISIONS for s in STAGES}
    (out / f"{world}-{environment['RANK']}.json").write_text(json.dumps(answers))


def main(out: Path, worlds: list[int]) -> None:
    gc.collect()
    gc.freeze()  # what the imports made holds no tensor of an engine; looking through it takes most of the time
    for world in worlds:
        children: list[int] = []
        for number, environment in enumerate(environments(world)):
            child = os.fork()
            if child == 0:
                with (out / f"{world}-{number}.log").open("w") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                    code = 1
                    try:
                        rank(out, world, environment)
                        code = 0
                    except Exception:  # a fork must not return into its parent's code; the parent reads the code
                        traceback.print_exc()
                    os._exit(code)
            children.append(child)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        if any(statuses):
            logs = "".join(log.read_text()[-2000:] for log in sorted(out.glob(f"{world}-*.log")))
            raise SystemExit(f"a rank of {world} failed:\n{logs}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(world) for world in sys.argv[2].split(",")])
