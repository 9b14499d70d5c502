"""C10 in full: every world, stage, offload and micro batch, against one rank without sharding. `make test-full`.

Result of the last run: RESULTS.md beside this file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.dist.pool import RankPool
from tests.dist.test_parity import GLOBAL_BATCH, RELATIVE, assert_close, tensors

PRODUCT = [
    (world, stage, micro_batch, offload)
    for world, stage, micro_batch, offload in itertools.product((1, 2, 3, 4), (0, 1, 2, 3), range(1, 7), (False, True))
    if stage or not offload
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    pools: dict[int, RankPool] = {}
    logs = tmp_path_factory.mktemp("pools")

    def pool(world: int) -> RankPool:
        if world not in pools or not pools[world].is_alive:
            pools[world] = RankPool(world, logs)
        return pools[world]

    yield pool
    for started in pools.values():
        started.close()


@pytest.fixture(scope="module")
def reference(
    ranks: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    run = tmp_path_factory.mktemp("reference")
    [answer] = ranks(1).run(
        "train", steps=[0], stage=0, global_batch=GLOBAL_BATCH, micro_batch=GLOBAL_BATCH, save=str(run), clip_norm=0.0
    )
    return answer["losses"][0], tensors(run / "checkpoints" / "step-000001", "exp_avg")


@pytest.mark.parametrize(("world", "stage", "micro_batch", "offload"), PRODUCT)
def test_every_split(
    ranks: Callable[[int], RankPool],
    tmp_path: Path,
    reference: tuple[dict[str, float], dict[str, torch.Tensor]],
    world: int,
    stage: int,
    micro_batch: int,
    offload: bool,
) -> None:
    answers = ranks(world).run(
        "train",
        steps=[0],
        stage=stage,
        offload=offload,
        global_batch=GLOBAL_BATCH,
        micro_batch=micro_batch,
        save=str(tmp_path),
        clip_norm=0.0,
    )
    losses, gradients = reference
    for answer in answers:
        assert answer["losses"][0] == pytest.approx(losses, rel=RELATIVE)
    assert_close(tensors(tmp_path / "checkpoints" / "step-000001", "exp_avg"), gradients, RELATIVE)
