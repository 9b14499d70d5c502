from __future__ import annotations

import pytest

from pretrain.world import World, world_from_environment
from shards.errors import UserError

WHOLE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_SIZE": "2"}


def test_every_launcher_sets_these() -> None:
    assert world_from_environment(WHOLE) == World(rank=3, size=4, local_rank=1, local_size=2)
    assert not world_from_environment(WHOLE).is_first


def test_nothing_set_is_one_rank() -> None:
    assert world_from_environment({"MASTER_ADDR": "left over"}) == World()


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_set_never_trains_alone(missing: str) -> None:
    with pytest.raises(UserError, match=missing):
        world_from_environment({name: value for name, value in WHOLE.items() if name != missing})


def test_a_rank_beyond_the_world_is_refused() -> None:
    with pytest.raises(UserError, match="RANK is 4; it must lie below WORLD_SIZE"):
        world_from_environment({**WHOLE, "RANK": "4"})
