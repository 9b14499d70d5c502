from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

spec = importlib.util.spec_from_file_location("pool", Path(__file__).with_name("pool.py"))
assert spec is not None
assert spec.loader is not None
pool_module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pool_module)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Any]]:
    """ranks(world): the pool of that many ranks, started when first asked for, again if a test broke it."""
    pools: dict[int, Any] = {}
    logs = tmp_path_factory.mktemp("pools")

    def pool(world: int) -> Any:
        if world not in pools or not pools[world].is_alive:
            pools[world] = pool_module.RankPool(world, logs)
        return pools[world]

    yield pool
    for started in pools.values():
        started.close()
