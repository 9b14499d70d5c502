"""Start the ranks of a run on this machine, pass signals on, and say how it ended.

One rank is a plain child process; several go through the `deepspeed` launcher, as they would on a cluster with ssh:

    tubelet ── deepspeed runner ── deepspeed launch ── rank 0, rank 1, …

All of them stay in one process group, so that killing the group from outside kills everything. Signals sent to
tubelet alone go to the ranks and not to the launcher in between, which would give them 30 seconds and then kill them.
The processes of a start are found by a mark in their environment: it survives the death of any process in the chain.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launch import outcome
from pretrain.attempt import newest_attempt
from pretrain.config import load_config
from shards.errors import UserError

MARK = "TUBELET_START"
"""Environment variable `PID:TOKEN`: the process id of tubelet, which ranks watch, and a token for this one start."""

ORPHAN_GRACE_S = 60.0
"""Ranks whose launcher died end by themselves; those that have not after this long are killed."""

_RANKS = (b"\0-m\0pretrain.train\0", b"\0-m\0pretrain.doctor\0")


def pretrain(
    config: str | Path, overrides: Sequence[str] = (), ranks: int | None = None, *, allow_change: bool = False
) -> int:
    """Run the config on `ranks` processes (default: the GPUs of this machine, else 1); returns 0, 75 or 93.

    `allow_change` lets a resumed run change what may change (steps, schedule, weights); it is recorded.

    Raises `UserError` for a config with problems and for more ranks than clips, before any process starts.
    """
    loaded = load_config(config, overrides)
    num_ranks = default_ranks() if ranks is None else ranks
    if not 1 <= num_ranks <= loaded.train.global_batch:
        raise UserError(
            f"--ranks is {num_ranks}; it must lie between 1 and train.global_batch "
            f"({loaded.train.global_batch}), so that every rank has a clip: change one of the two"
        )
    run_dir = Path(loaded.run.dir)
    since = newest_attempt(run_dir)
    arguments = [str(config), *overrides, *(["--change"] if allow_change else [])]
    command = one_rank(arguments) if num_ranks == 1 else several_ranks(arguments, num_ranks, free_port())
    token = secrets.token_hex(8)
    code = run_marked(command, environment(num_ranks), token)
    return outcome.exit_code(run_dir, token=token, since=since, launcher_code=code)


def default_ranks() -> int:
    """One rank per GPU of this machine; 1 where there is none."""
    return max(1, num_gpus())


def num_gpus() -> int:
    """NVIDIA GPUs this process may use. Asks the driver, so that torch need not be imported."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def one_rank(arguments: Sequence[str], *, module: str = "pretrain.train") -> list[str]:
    """The command of a single rank: no launcher in between."""
    return [sys.executable, "-u", "-m", module, *arguments]


def several_ranks(arguments: Sequence[str], num_ranks: int, port: int, *, module: str = "pretrain.train") -> list[str]:
    """The command that starts several ranks on this machine through the deepspeed launcher."""
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        "--quiet",
        "--hostfile=",  # /job/hostfile, the default, would send a local start to other machines
        *("--num_gpus", str(num_ranks)),
        *("--master_addr", "127.0.0.1"),
        *("--master_port", str(port)),
        "--no_local_rank",  # LOCAL_RANK is in the environment; our command line takes keys only
        *("--module", module),
        *arguments,
    ]


def free_port() -> int:
    """A port that is free now: a new one per start, so that runs on one machine never meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(num_ranks: int) -> dict[str, str]:
    """What the ranks inherit. Whatever the user has set wins."""
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(_usable_cores()) // num_ranks)))
    if num_gpus() == 0:
        env.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)  # a start inside another job must not think that it is a rank of it
    return env


def _usable_cores() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def run_marked(command: Sequence[str], env: dict[str, str], token: str) -> int:
    """Start the command under the mark of this token, wait until none of its ranks is left, and return its exit code.

    First SIGTERM or SIGINT: the ranks are told to stop (they save and end). Second: everything is killed, which a run
    survives by design.
    """
    mark = f"{os.getpid()}:{token}"
    num_signals = 0

    def pass_on(signum: int, frame: FrameType | None) -> None:
        nonlocal num_signals
        num_signals += 1
        ranks = marked(mark, only_ranks=True)
        if num_signals == 1 and ranks:
            print("tubelet: asking the ranks to save and stop (once more to kill them)", file=sys.stderr)
            _send(ranks, signal.SIGTERM)
        else:
            _kill_all(mark)

    # The runner inherits "ignored": a Ctrl-C reaches the whole group, and it must outlive its ranks.
    previous_int = signal.signal(signal.SIGINT, signal.SIG_IGN)
    previous_term = signal.signal(signal.SIGTERM, pass_on)
    try:
        child = subprocess.Popen(command, env={**env, MARK: mark})
        signal.signal(signal.SIGINT, pass_on)
        if num_signals:  # it came while the child was being started and found nothing to pass it on to
            child.kill()
            _kill_all(mark)
        code = child.wait()
        deadline_s = time.monotonic() + ORPHAN_GRACE_S
        while marked(mark, only_ranks=True):
            if num_signals == 0 and time.monotonic() > deadline_s:
                _kill_all(mark)
            time.sleep(0.1)
        return code
    finally:
        signal.signal(signal.SIGINT, previous_int)
        signal.signal(signal.SIGTERM, previous_term)


def marked(mark: str, *, only_ranks: bool = False) -> list[int]:
    """Process ids of what carries this mark and is alive; empty where there is no /proc."""
    wanted = f"{MARK}={mark}".encode()
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted not in (folder / "environ").read_bytes().split(b"\0"):
                continue  # a zombie reads as empty
            if only_ranks and not any(rank in (folder / "cmdline").read_bytes() for rank in _RANKS):
                continue
        except OSError:
            continue  # ended meanwhile, or another user's
        found.append(int(folder.name))
    return found


def _send(pids: Sequence[int], signum: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue  # ended meanwhile, which is what was wanted


def _kill_all(mark: str) -> None:
    """SIGKILL until nothing is left: a process may start another one between two looks."""
    while pids := marked(mark):
        _send(pids, signal.SIGKILL)
        time.sleep(0.05)
