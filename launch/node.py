"""Slurm's variables -> the variables that name a rank; then become the trainer.

`srun python -m launch.node CONFIG key=value …` runs once per rank. The only file that knows how Slurm counts.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from launch import cores, outcome
from launch.interface import LOOPBACK, check_interface, interface_to
from launch.job import ask, hostnames
from pretrain.redact import without_secrets
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
        print(without_secrets(str(error)), file=sys.stderr)
        sys.exit(outcome.PERSON_NEEDED)
    local_rank, local_size = int(env["LOCAL_RANK"]), int(env["LOCAL_SIZE"])
    mine, words = cores.choose(cores.allowed_cores(), os.environ, local_rank, local_size)
    if mine is not None:
        os.sched_setaffinity(0, mine)
    if local_rank == 0:
        network = env.get("GLOO_SOCKET_IFNAME") or "left to gloo and NCCL (no interface found)"
        plural = "s" * (local_size > 1)
        print(
            f"node     {env['TUBELET_NODE']}: {local_size} rank{plural}, network {network}, cores {words}", flush=True
        )
    is_doctor = list(arguments[:1]) == ["--doctor"]
    config, overrides = split_arguments(arguments[1:] if is_doctor else arguments)
    module = "pretrain.doctor" if is_doctor else "pretrain.train"
    if is_doctor and env["RANK"] == "0":
        env |= doctor_facts(os.environ)
    # Slurm signals every process of a step. Until the trainer has its handlers, the signal waits and does not kill.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.execve(sys.executable, [sys.executable, "-u", "-m", module, config, *overrides], env)


def doctor_facts(slurm: Mapping[str, str]) -> dict[str, str]:
    """What rank 0 of a check-up is told of Slurm."""
    from launch.doctor import slurm_facts  # a start of the trainer does without it

    names = hostnames(slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST") or "")
    counts = slurm.get("SLURM_STEP_TASKS_PER_NODE") or slurm.get("SLURM_TASKS_PER_NODE") or slurm["SLURM_NTASKS"]
    return slurm_facts(slurm, names, [tasks_on_node(counts, number) for number in range(len(names))])


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
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR, MASTER_PORT, OMP_NUM_THREADS, TUBELET_NODE of this task,
    and the network interface where the user has named none.

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
    if "TUBELET_HOSTS" in slurm:  # the batch script has asked once for all: inside a container there is no scontrol
        hosts = slurm["TUBELET_HOSTS"].split("/")
    else:
        hosts = meeting_hosts(hostnames(slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST") or ""))
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_SIZE": str(local_size),
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": slurm.get("TUBELET_PORT") or str(master_port(slurm)),
        "OMP_NUM_THREADS": slurm.get("OMP_NUM_THREADS") or slurm.get("SLURM_CPUS_PER_TASK") or "1",
        "TUBELET_NODE": slurm.get("SLURMD_NODENAME") or socket.gethostname(),
        **network(hosts, slurm),
    }


def network(hosts: Sequence[str], slurm: Mapping[str, str]) -> dict[str, str]:
    """The variables that tell gloo and NCCL their interface; empty where none can be told. What the user has set stays.

    That of launch.interface, else the one that packets to the first node leave by. The first node asks for the way to
    the second: its own name often means loopback to itself (127.0.1.1), where nobody else can reach it.
    """
    if name := slurm.get("TUBELET_INTERFACE"):
        found: str | None = check_interface(name)
    elif len(hosts) == 1:
        found = LOOPBACK
    else:
        found = interface_to(hosts[1] if slurm.get("SLURM_NODEID", "0") == "0" else hosts[0])
    chosen = {name: slurm.get(name) or found for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    return {name: value for name, value in chosen.items() if value}


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


def resolves(name: str) -> bool:
    """Whether this machine can turn the name into an address."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def free_port(first: int) -> int:
    """The first port from this one on that nobody on this machine listens at: somebody may have taken ours."""
    for port in (_FIRST_PORT + (first - _FIRST_PORT + step) % _NUM_PORTS for step in range(_NUM_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise UserError(f"no port from {_FIRST_PORT} to {_FIRST_PORT + _NUM_PORTS} is free here: end what takes them")


def meeting_hosts(names: Sequence[str], *, known: Callable[[str], bool] = resolves) -> list[str]:
    """How the others reach the first node, where rank 0 listens, and the second; of one node alone, loopback."""
    return [address_of(name, known=known) for name in names[:2]] if len(names) > 1 else ["127.0.0.1"]


def address_of(name: str, *, known: Callable[[str], bool] = resolves) -> str:
    """The name of a node, or its NodeAddr where the name does not resolve. Raises `UserError` if neither does."""
    if known(name):
        return name
    found = re.search(r"\bNodeAddr=(\S+)", ask("scontrol", "show", "node", name, "--oneliner").stdout)
    if found and known(found[1]):
        return found[1]
    raise UserError(
        f"one of the first nodes is {name!r}; the other nodes must be able to resolve it: add it to DNS or /etc/hosts, "
        "or give it a NodeAddr in slurm.conf"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
