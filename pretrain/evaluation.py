"""The held-out loss: the same clips with the same masks every time. It touches no cursor."""

from __future__ import annotations

import itertools

from pretrain.data.loader import ClipLoader
from pretrain.engine import Engine
from pretrain.sections import DataConfig, EvalConfig, LimitsConfig
from pretrain.world import World


class Evaluation:
    """Runs the first `eval.num_clips` clips of the held-out data (see `data.source.held_out`) through the engine."""

    def __init__(
        self,
        held_out: DataConfig,
        settings: EvalConfig,
        *,
        micro_batch: int,
        seed: int,
        world: World,
        limits: LimitsConfig,
    ) -> None:
        self._limits = limits
        self._data, self._micro_batch, self._seed, self._world = held_out, micro_batch, seed, world
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
            num_clips=self._num_clips,
            limits=self._limits,
        ) as loader:
            batches = itertools.islice(loader, loader.num_micro_steps)
            return engine.totals(engine.evaluate(batches))
