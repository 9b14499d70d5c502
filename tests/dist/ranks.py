"""Start the ranks of a run without a launcher, in a session of their own, so that a test can kill them all at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 20.0


def environments(world: int) -> list[dict[str, str]]:
    """What a launcher would set for each rank, with a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def start(program: Sequence[str], world: int) -> list[subprocess.Popen[str]]:
    """`world` processes of `python PROGRAM…`, all in the process group of the first."""
    started: list[subprocess.Popen[str]] = []
    for environment in environments(world):
        group = started[0].pid if started else 0
        started.append(
            subprocess.Popen(
                [sys.executable, *program],
                env=environment,
                cwd=ROOT,
                process_group=group,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def train(config: Path, world: int, *arguments: str, program: Sequence[str] = ("-m", "pretrain.train")) -> list[str]:
    """Run to the end; the output of each rank. Fails if a rank does not return 0."""
    codes, outputs = finish(start([*program, str(config), *arguments], world))
    assert codes == [0] * world, f"{codes}\n" + "\n".join(outputs)
    return outputs


def finish(ranks: Sequence[subprocess.Popen[str]], timeout_s: float = 300) -> tuple[list[int], list[str]]:
    """Wait for all: return codes and outputs. After one that fails the others have GRACE_S, as with a launcher."""
    deadline_s = time.monotonic() + timeout_s
    failed_s: float | None = None
    while any(rank.poll() is None for rank in ranks):
        now_s = time.monotonic()
        if failed_s is None and any(rank.returncode for rank in ranks):
            failed_s = now_s
        if now_s > deadline_s or (failed_s is not None and now_s > failed_s + GRACE_S):
            kill(ranks)
        time.sleep(0.05)
    return [rank.returncode for rank in ranks], [rank.communicate()[0] for rank in ranks]


def kill(ranks: Sequence[subprocess.Popen[str]]) -> None:
    """SIGKILL to the whole process group, from outside."""
    try:
        os.killpg(ranks[0].pid, signal.SIGKILL)
    except ProcessLookupError:
        return
