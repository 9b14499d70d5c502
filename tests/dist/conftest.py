from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.dist.pool import RankPool


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    """ranks(world): the pool of that many ranks, started when first asked for, again if a test broke it."""
    pools: dict[int, RankPool] = {}
    logs = tmp_path_factory.mktemp("pools")

    def pool(world: int) -> RankPool:
        if world not in pools or not pools[world].is_alive:
            pools[world] = RankPool(world, logs)
        return pools[world]

    yield pool
    for started in pools.values():
        started.close()
