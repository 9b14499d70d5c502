"""The held-out loss: the same clips with the same masks every time. It touches no cursor."""

from __future__ import annotations

import itertools

from pretrain.config import DataConfig, EvalConfig, LimitsConfig
from pretrain.data.loader import ClipLoader
from pretrain.engine import Engine
from pretrain.world import World
from shards.errors import UserError
from shards.manifest import load_manifest


class Evaluation:
    """Runs the first `eval.num_clips` clips of the held-out split through the engine."""

    def __init__(
        self,
        data: DataConfig,
        settings: EvalConfig,
        *,
        micro_batch: int,
        seed: int,
        world: World,
        limits: LimitsConfig,
    ) -> None:
        self._limits = limits
        self._data, self._micro_batch, self._seed, self._world = data, micro_batch, seed, world
        found = held_out_shards(data)
        assert found is not None, "only made where something is held out"
        self._shards, self._split = found
        self._num_clips = settings.num_clips

    def run(self, engine: Engine) -> dict[str, float]:
        """Mean losses over all ranks, and beside them what trivial predictors would lose. A collective."""
        with ClipLoader(
            self._data,
            seed=self._seed,
            global_batch=self._num_clips,
            micro_batch=self._micro_batch,
            rank=self._world.rank,
            world_size=self._world.size,
            split=self._split,
            shards=self._shards,
            num_clips=self._num_clips,
            limits=self._limits,
        ) as loader:
            batches = itertools.islice(loader, loader.num_micro_steps)
            return engine.totals(engine.evaluate(batches))


def held_out_shards(data: DataConfig) -> tuple[str, str] | None:
    """(shards, split) of the held-out data; None where `data.shards` holds nothing out and nothing else is named.

    Raises `UserError` where `data.eval_shards` is named and has no such split.
    """
    shards = data.eval_shards or data.shards
    splits = load_manifest(shards).splits
    if data.eval_split in splits:
        return shards, data.eval_split
    if data.eval_shards is None:
        return None
    raise UserError(
        f"data.eval_split is {data.eval_split}; {shards} has {', '.join(sorted(splits))}: "
        "name one of these, or set eval.every_steps=0"
    )
