"""launch/status.py: what is said of runs that are alive, dead, finished or never started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import cli
from launch.status import QUIET_S, duration, is_here, status
from shards.errors import UserError

NOW = time.time()


class Run:
    """A run folder as the trainer leaves it, 100 s after the start of an attempt at one step a second."""

    def __init__(self, folder: Path) -> None:
        self.dir = folder
        self.write("config.yaml", "train: {steps: 400}\n")

    def attempt(self, number: int, *, first: int = 0, last: int = 100, start: str = "f00d") -> None:
        begun = {"attempt": number, "time": NOW - 100, "world_size": 2, "start": start, "nodes": ["n1", "n2"]}
        self.write(f"attempts/{number:04d}.json", json.dumps(begun))
        rows: list[dict[str, Any]] = [{"kind": "start", "step": first, "time": NOW - 100}]
        rows += [
            {"kind": "train", "step": k, "time": NOW - 100 + k, "clips_per_s": 8.0} for k in range(first + 1, last + 1)
        ]
        with (self.dir / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps({"attempt": number, **row}) + "\n" for row in rows)
            file.write('{"kind": "train", "st')

    def outcome(self, number: int, outcome: str, **more: Any) -> None:
        row = {"outcome": outcome, "step": 100, "reason": "the reason", "time": NOW, **more}
        self.write(f"attempts/{number:04d}.outcome.json", json.dumps(row))

    def write(self, name: str, text: str) -> Path:
        file = self.dir / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "my run")


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What squeue says: a file."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\ncat {tmp_path}/queue\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "queue").touch()
    return tmp_path / "queue"


def test_a_job_at_work(run: Run, queue: Path) -> None:
    run.attempt(1)
    checkpoint = run.write("checkpoints/step-000080/manifest.json", "{}")
    os.utime(checkpoint, (NOW - 3600, NOW - 3600))
    run.write("checkpoints/step-000090.0001.tmp/manifest.json", "{}")
    queue.write_text(f"12|RUNNING|2|5:00|n[1-2]|tubelet {run.dir}\n13|PENDING|2|5:00|(Priority)|tubelet {run.dir}\n")
    found = status(run.dir)
    lines = found.lines()
    assert found.state == "running"
    assert "job          12 running, 2 nodes, on n[1-2], 5:00 left" in lines
    assert "step         100 of 400 (25%)" in lines
    assert "rate         1 steps/s, 8 clips/s" in lines
    assert any(line.startswith("left         5 min") for line in lines)
    assert any(line.startswith("checkpoint   step 80, 1 h") for line in lines)
    assert lines[-1] == f"next: tubelet report '{run.dir}'"
    assert found.to_json()["eta_s"] == pytest.approx(300, rel=0.05)


def test_a_job_that_waits(run: Run, queue: Path) -> None:
    (run.dir / "config.yaml").unlink()
    run.write("code/001/config.yaml", "train: {steps: 7}\n")
    queue.write_text(f"12|PENDING|2|5:00|(Resources)|tubelet {run.dir}\n")
    found = status(run.dir)
    assert (found.state, found.standing.attempt, found.standing.steps) == ("queued", 0, 7)
    assert "job          12 pending, 2 nodes, waits: Resources" in found.lines()


def test_without_slurm(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Never started; killed without a word; at work on this machine; ended; finished."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert status(run.dir).state == "never started"
    assert "job          not under Slurm (no squeue here)" in status(run.dir).lines()
    run.attempt(1)
    run.attempt(2, first=50)
    assert status(run.dir).state == "silent"
    assert "nothing written for" in status(run.dir).lines()[0]
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={"TUBELET_START": "9:f00d"})
    try:
        while not is_here("f00d"):
            time.sleep(0.01)
        assert status(run.dir).state == "running"
        quiet = time.time() - QUIET_S - 100
        for file in (run.dir / "metrics.jsonl", *(run.dir / "attempts").iterdir()):
            os.utime(file, (quiet, quiet))
        assert "running, but silent for 11 min" in status(run.dir).lines()[0]
    finally:
        child.communicate()
    run.outcome(2, "person")
    found = status(run.dir)
    assert (found.state, found.to_json()["restarts"]) == ("ended", 1)
    assert found.lines()[0].endswith("needs a person")
    assert "last outcome person at step 100: the reason" in found.lines()
    assert found.to_json()["eta_s"] is None
    run.write("DONE", '{"step": 400}')
    assert status(run.dir).state == "finished"


def test_starts_that_came_to_nothing_are_told(run: Run, queue: Path) -> None:
    """What a job that ended with 93 said before it took a number; and starts that died before that."""
    refused = run.write("attempts/refused-slurm-9.0.json", '{"reason": "optim.lr is 0", "time": 1.0}')
    found = status(run.dir)
    assert found.lines()[0].endswith("needs a person")
    assert "refused      optim.lr is 0" in found.lines()
    assert found.to_json()["refused"] == "optim.lr is 0"
    run.attempt(1)
    os.utime(refused, (NOW - 3600, NOW - 3600))
    unborn = run.write("attempts/unborn-slurm-9.1.json", "{}")
    os.utime(unborn, (time.time() + 60, time.time() + 60))
    log = run.write("logs/slurm-9.log", "no room")
    found = status(run.dir)
    assert not found.standing.refused
    assert f"since then   a start ended before taking a number: see '{log}'" in found.lines()


def test_a_start_without_a_mark_lives_by_its_signs(run: Run, queue: Path) -> None:
    """torchrun and deepspeed set no TUBELET_START."""
    run.attempt(1)
    begun = run.dir / "attempts" / "0001.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"start": ""}))
    assert status(run.dir).state == "running"
    for file in (run.dir / "metrics.jsonl", *(run.dir / "attempts").iterdir()):
        os.utime(file, (NOW - 2 * QUIET_S, NOW - 2 * QUIET_S))
    assert status(run.dir).state == "silent"


def test_who_is_to_blame(run: Run, queue: Path) -> None:
    run.attempt(1)
    run.outcome(1, "failed", blamed=[1, 7])
    rows = [{"node": node, "attempt": 1, "by": "doctor", "reason": "slow", "time": NOW} for node in ("n2", "n3")]
    run.write("attempts/blamed.jsonl", "".join(json.dumps(row) + "\n" for row in rows) + '{"node": "n3", "at')
    found = status(run.dir)
    assert found.excluded == ["n2"]
    assert list(found.blamed) == ["n2", "n3"]
    assert "blamed       n2, 2 times (excluded): doctor, attempt 1: slow" in found.lines()
    assert "blamed       n3, 1 time (excluded from 2 on): doctor, attempt 1: slow" in found.lines()


def test_a_slurm_that_does_not_answer_is_no_reason_to_say_nothing(run: Run, queue: Path) -> None:
    queue.unlink()
    run.attempt(1)
    assert "squeue failed" in status(run.dir).no_job


def test_on_the_command_line(run: Run, queue: Path, tmp_path: Path) -> None:
    run.attempt(1)
    done = CliRunner().invoke(cli.app, ["status", str(run.dir), "--json"])
    assert (done.exit_code, json.loads(done.stdout)["step"]) == (0, 100)
    with pytest.raises(UserError, match="is not a run folder"):
        status(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (59, "59 s"), (75, "1 min 15 s"), (7300, "2 h 1 min"), (266400, "3 d 2 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
