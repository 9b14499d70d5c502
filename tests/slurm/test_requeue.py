"""A real two-node Slurm: submitted, killed, queued again by its own script, finished, and proved complete."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.pack import PackOptions, pack

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "films"
    pack(ROOT / "configs" / "clips", folder, PackOptions(short_side=96, max_frames=48, stride=2), None)
    return folder


@pytest.fixture
def words(tmp_path: Path, shards: Path) -> list[str]:
    """A run small enough for two ranks that share two cores with the tests, and long enough to be killed in."""
    return [
        str(ROOT / "configs" / "demo.yaml"),
        f"run.dir={tmp_path / 'run'}",
        f"data.shards={shards}",
        f"train.steps={STEPS}",
        "schedule.warmup_steps=2",
        "train.global_batch=4",
        "train.micro_batch=1",
        "checkpoint.every_steps=4",
        "eval.every_steps=0",
        "track.wandb='off'",
        "track.log_every_steps=1",
    ]


def submit(slurm: Any, folder: Path, words: list[str]) -> str:
    return slurm.submit(
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--output={folder / 'job.log'}",
        str(ROOT / "slurm" / "pretrain.sh"),
        *words,
    )


def test_killed_then_signalled_it_requeues_itself_and_finishes(slurm: Any, tmp_path: Path, words: list[str]) -> None:
    run, log = tmp_path / "run", tmp_path / "job.log"
    job = submit(slurm, tmp_path, words)

    def why() -> str:
        return f"{slurm.why()}\n{slurm.job(job)}\n{log.read_text() if log.exists() else 'no log'}"

    def until(ready: Callable[[], bool]) -> None:
        """Wait for it while the job lives; a job that has failed will not get there."""
        slurm.wait_for(lambda: ready() or slurm.job(job)["JobState"] == "FAILED", 180, why)
        assert ready(), why()

    until(lambda: newest_step(run) > 0)
    assert slurm.kill("pretrain.", job=job) >= 2, "both ranks, from outside, at a moment they do not know"
    until(lambda: (run / "attempts" / "0002.json").exists())
    assert not (run / "attempts" / "0001.outcome.json").exists(), "nobody could say goodbye"

    first = newest_step(run)
    until(lambda: newest_step(run) > first)
    slurm.run("scancel", "--signal=USR1", job)
    until(lambda: (run / "attempts" / "0003.json").exists())
    assert json.loads((run / "attempts" / "0002.outcome.json").read_text())["outcome"] == "stopped"

    until(lambda: slurm.job(job)["JobState"] == "COMPLETED")
    facts = slurm.job(job)
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("COMPLETED", "2", "0:0"), why()
    assert json.loads((run / "DONE").read_text())["step"] == STEPS
    audit = subprocess.run(
        [sys.executable, "-m", "launch.cli", "audit", str(run)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert audit.returncode == 0, audit.stdout + audit.stderr


def test_a_mistake_is_not_queued_again(slurm: Any, tmp_path: Path, words: list[str]) -> None:
    job = submit(slurm, tmp_path, [*words, "data.shards=nowhere"])
    slurm.wait_for(lambda: slurm.job(job)["JobState"] in ("COMPLETED", "FAILED"), 120, slurm.why)
    facts, log = slurm.job(job), (tmp_path / "job.log").read_text()
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("FAILED", "0", "93:0"), log
    assert "nowhere" in log
    assert "Traceback" not in log


def test_a_cancelled_job_stays_cancelled(slurm: Any, tmp_path: Path, words: list[str]) -> None:
    job = submit(slurm, tmp_path, words)
    slurm.wait_for(lambda: (tmp_path / "run" / "attempts" / "0001.json").exists(), 120, slurm.why)
    slurm.run("scancel", job)
    slurm.wait_for(lambda: not slurm.processes(job=job), 60, slurm.why)
    assert (slurm.job(job)["JobState"], slurm.job(job)["Restarts"]) == ("CANCELLED", "0")


def newest_step(run: Path) -> int:
    names = [path.parent.name for path in (run / "checkpoints").glob("step-*[0-9]/manifest.json")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)
