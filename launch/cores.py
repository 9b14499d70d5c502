"""Which cores a rank computes on: a block of its own of those the job was given on this node.

Ranks that wander over all cores push each other out of caches and across sockets. Slurm binds tasks itself on many
clusters, and confines nobody on others: in both cases nothing is changed here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/{}"


def choose(
    allowed: Sequence[int], slurm: Mapping[str, str], local_rank: int, local_size: int
) -> tuple[list[int] | None, str]:
    """The cores to bind this rank to (None: leave it as it is), and what to say about it in the line of the node.

    Fewer cores than the job has on this node: Slurm bound the task. More: Slurm does not confine the job, and which
    of them are ours is not known; two jobs that both took the first cores would be worse than none binding.
    """
    num_given = int(slurm.get("SLURM_CPUS_ON_NODE", "0"))
    if local_size == 1:
        return None, f"{ranges(allowed)} (one rank: not divided)"
    if len(allowed) < num_given:
        return None, f"{ranges(allowed)} (bound by Slurm)"
    if len(allowed) > num_given:
        return None, f"not bound (Slurm gave {num_given} and does not say which of {len(allowed)})"
    if num_given < local_size:
        return None, f"{ranges(allowed)} (fewer than ranks: not divided)"
    mine = block(allowed, local_rank, local_size)
    return mine, f"{ranges(mine)} (rank {local_rank} of {local_size} on this node)"


def place_of(cpu: int) -> tuple[int, int]:
    """(socket, physical core) of a processor number; itself where the kernel does not tell."""
    try:
        return (
            int(Path(_TOPOLOGY.format(cpu, "physical_package_id")).read_text()),
            int(Path(_TOPOLOGY.format(cpu, "core_id")).read_text()),
        )
    except (OSError, ValueError):
        return 0, cpu


def block(
    allowed: Sequence[int],
    local_rank: int,
    local_size: int,
    *,
    place: Callable[[int], tuple[int, int]] = place_of,
) -> list[int]:
    """The share of one rank, neighbours on one socket, both threads of a core together where that comes out even."""
    ordered = sorted(allowed, key=lambda cpu: (*place(cpu), cpu))
    first, stop = (len(ordered) * rank // local_size for rank in (local_rank, local_rank + 1))
    return sorted(ordered[first:stop])


def allowed_cores() -> list[int]:
    """Processor numbers this process may use."""
    return sorted(os.sched_getaffinity(0))


def ranges(cpus: Sequence[int]) -> str:
    """[0, 1, 2, 8] -> "0-2,8"."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
