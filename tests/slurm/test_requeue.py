"""A real Slurm: what ends a job there, and that the run goes on without a person to what the uninterrupted one reaches.

Two jobs at once, each with three faults of its own, so that one works while the other waits for Slurm.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240

pytestmark = pytest.mark.slow


class Job:
    """One job of two nodes, and what its run folder says."""

    def __init__(self, slurm: Any, folder: Path, settings: list[str]) -> None:
        folder.mkdir(exist_ok=True)
        self.slurm, self.run, self.log = slurm, folder / "run", folder / "job.log"
        self.id = slurm.submit(
            *("--nodes=2", "--ntasks-per-node=1", "--time=20", f"--output={self.log}"),
            *(str(ROOT / "slurm" / "pretrain.sh"), str(ROOT / "configs" / "demo.yaml"), f"run.dir={self.run}"),
            *settings,
        )

    @property
    def facts(self) -> dict[str, str]:
        return self.slurm.job(self.id)

    def why(self) -> str:
        log = self.log.read_text() if self.log.exists() else "no log"
        return f"{self.slurm.why()}\n{self.facts}\n{log}"

    def until(self, ready: Callable[[], bool]) -> None:
        """Wait for it while the job lives; a job that has ended will not get there."""
        ended = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.slurm.wait_for(lambda: ready() or self.facts["JobState"] in ended, TIMEOUT_S, self.why)
        assert ready(), self.why()

    def at_work(self, attempt: int) -> None:
        """Wait until the attempt has saved something of its own."""
        self.until((self.run / "attempts" / f"{attempt:04d}.json").exists)
        started = newest_step(self.run)
        self.until(lambda: newest_step(self.run) > started)

    def ranks(self) -> list[int]:
        return self.slurm.processes("-m pretrain.train", job=self.id)

    def nodes(self, attempt: int) -> list[str]:
        return json.loads((self.run / "attempts" / f"{attempt:04d}.json").read_text())["nodes"]

    def ends_like(self, run: Path) -> None:
        """Finished and proved, with the parameters, moments and all of the other run, bit for bit."""
        self.until(lambda: self.facts["JobState"] == "COMPLETED")
        assert (self.facts["ExitCode"], self.facts["Restarts"]) == ("0:0", "3"), self.why()
        done = json.loads((self.run / "DONE").read_text())["step"]
        assert done == json.loads((run / "DONE").read_text())["step"]
        words = [sys.executable, "-m", "launch.cli", "audit", str(self.run)]
        audit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert audit.returncode == 0, audit.stdout + audit.stderr
        mine, wanted = tensors(self.run, done), tensors(run, done)
        assert wanted
        assert mine.keys() == wanted.keys()
        assert all(np.array_equal(mine[name], wanted[name]) for name in wanted)


def test_killed_signalled_and_requeued(slurm: Any, tmp_path: Path, settings: list[str], uninterrupted: Any) -> None:
    """Beside it, on other nodes: the time limit, a killed launcher, a killed node."""
    first, second = Job(slurm, tmp_path / "first", settings), Job(slurm, tmp_path / "second", settings)
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(told_to_go, first), pool.submit(taken_away, second)]:
            done.result()
    reference = uninterrupted.finished()
    first.ends_like(reference)
    second.ends_like(reference)


def told_to_go(job: Job) -> None:
    """All ranks SIGKILLed, on a node blamed twice; USR1 to the job and to every process of the step; requeued."""
    job.at_work(1)
    blamed = job.nodes(1)[1]
    rows = [{"node": blamed, "attempt": 1, "by": "doctor", "reason": "slow", "time": time.time()} for _ in range(2)]
    (job.run / "attempts" / "blamed.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert job.slurm.kill("pretrain.", job=job.id) >= 2, "both ranks, from outside, at a moment they do not know"
    job.at_work(2)
    assert not (job.run / "attempts" / "0001.outcome.json").exists(), "nobody could say goodbye"
    assert blamed not in job.nodes(2), job.why()
    assert f"{blamed} is excluded from now on" in job.log.read_text()

    job.slurm.run("scancel", "--signal=USR1", job.id)
    for pid in job.slurm.processes("python", job=job.id):
        if b"SLURM_PROCID=" in b"\0".join(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
            os.kill(pid, signal.SIGUSR1)
    job.at_work(3)
    assert json.loads((job.run / "attempts" / "0002.outcome.json").read_text())["outcome"] == "stopped"
    job.slurm.run("scontrol", "requeue", job.id)
    job.until((job.run / "attempts" / "0004.json").exists)


def taken_away(job: Job) -> None:
    """The time limit reached by ranks that were not to be woken by its signal; srun killed; a node killed."""
    job.at_work(1)
    frozen = job.ranks()
    for pid in frozen:  # else the run might be finished when Slurm next looks for jobs whose time is up
        os.kill(pid, signal.SIGSTOP)
    job.slurm.run("scontrol", "update", f"JobId={job.id}", "EndTime=now+1")
    job.until(lambda: job.facts["Restarts"] == "1")
    job.slurm.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=20")
    job.at_work(2)
    assert json.loads((job.run / "attempts" / "0001.outcome.json").read_text())["outcome"] == "stopped"

    assert job.slurm.kill("srun --kill-on-bad-exit", job=job.id)
    job.at_work(3)
    lost = int(job.nodes(3)[1].removeprefix("node"))
    job.slurm.kill_node(lost)
    try:
        job.until((job.run / "attempts" / "0004.json").exists)
        assert f"node{lost}" not in job.nodes(4)
    finally:
        job.slurm.start_node(lost)


def test_a_mistake_is_not_queued_again(slurm: Any, tmp_path: Path, settings: list[str]) -> None:
    job = Job(slurm, tmp_path, [*settings, "data.shards=nowhere"])
    slurm.wait_for(lambda: job.facts["JobState"] in ("COMPLETED", "FAILED"), 120, slurm.why)
    facts, log = job.facts, job.log.read_text()
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("FAILED", "0", "93:0"), log
    assert "nowhere" in log
    assert "Traceback" not in log


def test_a_cancelled_job_stays_cancelled(slurm: Any, tmp_path: Path, settings: list[str]) -> None:
    job = Job(slurm, tmp_path, settings)
    slurm.wait_for((job.run / "attempts" / "0001.json").exists, 120, slurm.why)
    slurm.run("scancel", job.id)
    slurm.wait_for(lambda: job.facts["JobState"] == "CANCELLED" and not slurm.processes(job=job.id), 60, job.why)
    assert job.facts["Restarts"] == "0"


def newest_step(run: Path) -> int:
    names = [path.parent.name for path in (run / "checkpoints").glob("step-*[0-9]/manifest.json")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def tensors(run: Path, step: int) -> dict[str, NDArray[Any]]:
    """All that the checkpoint of a step stores, by file and name."""
    return dict(entries(run / "checkpoints" / f"step-{step:06d}"))


def entries(folder: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    for file in sorted(folder.glob("*.safetensors")):
        for name, values in load_file(file).items():
            yield f"{file.name} {name}", values
