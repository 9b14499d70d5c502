"""`tubelet report --wandb` of a run that was really killed, rolled itself back, and was killed again."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.decisions import Decisions
from tests.dist import ranks
from tests.dist.test_failures import write_config
from tests.pretrain.wandb_file import no_wandb_of_the_users, published, system, training
from tests.soak import newest_attempt, newest_step, num_done

__all__ = ["no_wandb_of_the_users"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_wandb_of_the_users")]

SICK = str(Path(__file__).with_name("sick.py"))


def kill_at(step: int, attempt: int, run: Path, program: list[str]) -> None:
    """Start two ranks and SIGKILL both once that attempt has logged that step."""
    started, end_s = ranks.start(program, 2), time.monotonic() + 120
    try:
        while num_done(run, after=attempt - 1) < step and time.monotonic() < end_s:
            assert all(rank.poll() is None for rank in started), "\n".join(ranks.finish(started)[1])
            time.sleep(0.01)
    finally:
        ranks.kill(started)
    assert ranks.finish(started)[0] == [-9, -9]
    assert num_done(run, after=attempt - 1) >= step


def test_one_wandb_file_after_kills_and_a_roll_back(tmp_path: Path, packed: Path) -> None:
    track = {"wandb": "offline", "log_every_steps": 1}
    config, run = write_config(tmp_path, packed, failure__max_skips=1, train__steps=200, track=track), tmp_path / "run"
    kill_at(5, 1, run, ["-m", "pretrain.train", str(config)])
    bad = newest_step(run) + 3  # counted from 0
    kill_at(bad + 6, 3, run, [SICK, "nan", str(bad), "1", str(config)])
    assert newest_attempt(run) == 3, "the roll-back took a number of its own"
    [back] = Decisions(run / "journal", is_writer=False).rollbacks
    assert back.first <= bad < back.stop
    last = newest_step(run) + 4
    ranks.train(config, 2, f"train.steps={last}", "--change")

    report = [sys.executable, "-m", "launch.cli", "report", str(run), "--wandb"]
    before = {folder.rpartition("-")[2] for folder in published(run)}
    done = subprocess.run(report, cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ((folder, points),) = published(run).items()
    assert {folder.rpartition("-")[2]} == before, "one id"
    assert f"wandb sync {run / 'wandb' / folder}" in done.stdout
    steps = [point["step"] for point in training(points)]
    skipped = range(back.first + 1, back.stop + 1)  # the rows count from 1
    assert steps == [step for step in range(1, last + 1) if step not in skipped]
    seconds = [point["system/seconds"] for point in system(points)]
    assert seconds == sorted(seconds)
