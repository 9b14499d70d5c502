"""Ranks, nodes and worker numbers, named once. Read from the environment that every launcher sets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from shards.errors import UserError


@dataclass(frozen=True)
class World:
    """Place of this process among the ranks of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once (metrics, manifests, the console)."""
        return self.rank == 0


def world_from_environment(environment: Mapping[str, str] = os.environ) -> World:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE or LOCAL_SIZE; none of them set means one rank.

    Half a set is refused: a rank that believes itself alone would train alone and overwrite the others' run.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in names if name in environment]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        return World()
    missing = [name for name in names if name not in present]
    if missing:
        raise UserError(
            f"the environment names {', '.join(present)} but not {', '.join(missing)}; a launcher must set all: "
            "start through `tubelet pretrain`, `deepspeed`, `torchrun`, or slurm/pretrain.sh"
        )
    size = int(environment["WORLD_SIZE"])
    local_size = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 1)
    world = World(int(environment["RANK"]), size, int(environment["LOCAL_RANK"]), local_size)
    if not 0 <= world.rank < world.size:
        raise UserError(f"RANK is {world.rank}; it must lie below WORLD_SIZE ({world.size}): check the launcher")
    return world
