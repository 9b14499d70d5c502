"""Slurm's variables -> the variables that name a rank; then become the trainer.

`srun python -m launch.node CONFIG key=value …` runs once per rank. The only file that knows how Slurm counts.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from launch import outcome
from shards.errors import UserError
from shards.slice import Slice

DEMO_CONFIG = "configs/demo.yaml"

# Below the ports that Linux hands out by itself (from 32768), above those that services like.
_FIRST_PORT, _NUM_PORTS = 15000, 15000


def main(arguments: Sequence[str]) -> NoReturn:
    """Work out this rank's place and replace this process by the trainer; exit 93 where that is impossible."""
    try:
        env = {**os.environ, **rank_environment(os.environ), "TUBELET_START": f"0:{start_token(os.environ)}"}
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(outcome.PERSON_NEEDED)
    config, overrides = split_arguments(arguments)
    # Slurm signals every process of a step. Until the trainer has its handlers, the signal must not kill.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.execve(sys.executable, [sys.executable, "-u", "-m", "pretrain.train", config, *overrides], env)


def start_token(slurm: Mapping[str, str]) -> str:
    """Tells this start of the job from its other starts, and from other jobs on the same run."""
    return f"slurm-{slurm.get('SLURM_JOB_ID', '')}.{slurm.get('SLURM_RESTART_COUNT', '0')}"


def split_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """`[CONFIG] key=value …` -> the config, the demo's where none is named, and the overrides."""
    if arguments and "=" not in arguments[0]:
        return arguments[0], list(arguments[1:])
    return DEMO_CONFIG, list(arguments)


def parse_slice(text: str, slurm: Mapping[str, str]) -> Slice:
    """I/N as it is typed; `slurm` and `slurm/N` take the number of this task of a job array.

    Without N, the array must be whole and begin at 0, as `sbatch --array=0-15` makes it. Raises `UserError`.
    """
    name, _, count = text.partition("/")
    if name != "slurm":
        return Slice.parse(text)
    if "SLURM_ARRAY_TASK_ID" not in slurm:
        raise UserError(
            f"--slice is {text} but SLURM_ARRAY_TASK_ID is not set; it must be run in a job array: use "
            "sbatch --array=0-15 slurm/pack.sh, or give --slice I/N"
        )
    first, last = slurm.get("SLURM_ARRAY_TASK_MIN", "0"), int(slurm.get("SLURM_ARRAY_TASK_MAX", "0"))
    if not count and (first != "0" or int(slurm.get("SLURM_ARRAY_TASK_COUNT", last + 1)) != last + 1):
        raise UserError(
            f"the job array is not 0-{last} without gaps, so it does not say how many slices there are; it must begin "
            "at 0 and be whole: to pack some slices again, add --slice slurm/N"
        )
    return Slice.parse(f"{slurm['SLURM_ARRAY_TASK_ID']}/{count or last + 1}")


def task_cores(slurm: Mapping[str, str]) -> int:
    """Cores of this Slurm task, also where Slurm does not bind it to them; 0 outside of one."""
    return int(slurm.get("SLURM_CPUS_PER_TASK", "0"))


def rank_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR, MASTER_PORT and OMP_NUM_THREADS of this task.

    Ranks come from Slurm's numbers alone, never from host names: several virtual nodes may share one machine.
    Raises `UserError` outside of srun, and where a rank sees a GPU of its own only.
    """
    missing = [name for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID") if name not in slurm]
    if missing:
        raise UserError(
            f"{missing[0]} is not set; launch.node must be started by srun, once per rank: use slurm/pretrain.sh, "
            "or `tubelet pretrain` on one machine"
        )
    local_size = tasks_on_node(
        slurm.get("SLURM_STEP_TASKS_PER_NODE") or slurm.get("SLURM_TASKS_PER_NODE") or slurm["SLURM_NTASKS"],
        int(slurm.get("SLURM_NODEID", "0")),
    )
    visible = slurm.get("CUDA_VISIBLE_DEVICES")
    if visible and local_size > 1 and "," not in visible:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES is {visible}; {local_size} ranks of a node must see all GPUs of the job, so that "
            "they can reach each other: ask for --gpus-per-node instead of --gpus-per-task"
        )
    nodes = slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST") or ""
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_SIZE": str(local_size),
        "MASTER_ADDR": master_address(hostnames(nodes)),
        "MASTER_PORT": str(master_port(slurm)),
        "OMP_NUM_THREADS": slurm.get("OMP_NUM_THREADS") or slurm.get("SLURM_CPUS_PER_TASK") or "1",
    }


def tasks_on_node(counts: str, node: int) -> int:
    """Slurm's run lengths, as in "4(x2),3": how many tasks the node of this number has."""
    for run in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", run.strip())
        if found is None:
            break
        node -= int(found[2] or 1)
        if node < 0:
            return int(found[1])
    raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {counts!r}; it must look like 4(x2),3: report this Slurm version")


def master_port(slurm: Mapping[str, str]) -> int:
    """One port per job and restart: two jobs may share a node, and a rank that outlived its node must find nobody."""
    job, restart = int(slurm.get("SLURM_JOB_ID", "0")), int(slurm.get("SLURM_RESTART_COUNT", "0"))
    return _FIRST_PORT + (job + 4001 * restart) % _NUM_PORTS


def hostnames(nodes: str) -> list[str]:
    """Slurm's short list, as in "gpu[03-05]" -> its names, in rank order."""
    return _scontrol("show", "hostnames", nodes).split()


def resolves(name: str) -> bool:
    """Whether this machine can turn the name into an address."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def master_address(names: Sequence[str], *, known: Callable[[str], bool] = resolves) -> str:
    """Where rank 0 listens: the first host; its NodeAddr where the name does not resolve; loopback on one node."""
    if len(names) <= 1:
        return "127.0.0.1"
    first = names[0]
    if known(first):
        return first
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", first, "--oneliner"))
    if found and known(found[1]):
        return found[1]
    raise UserError(
        f"the first node is {first!r}; the other nodes must be able to resolve it: add it to DNS or /etc/hosts, or "
        "give it a NodeAddr in slurm.conf"
    )


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1:])
