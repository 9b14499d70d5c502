"""`tubelet submit` and `tubelet status` on a real Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_readme import ON_SLURM, commands

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def tubelet(slurm: Any, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", *map(str, words)]
    return subprocess.run(command, env=slurm.env, cwd=ROOT, capture_output=True, text=True, check=False)


def status(slurm: Any, run: Path) -> dict[str, Any]:
    done = tubelet(slurm, "status", run, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_is_submitted_once_and_watched_to_its_end(slurm: Any, uninterrupted: Any, settings: list[str]) -> None:
    run = uninterrupted.finished()
    folder = run.parent
    found = status(slurm, run)
    assert (found["state"], found["job"], found["step"], found["restarts"]) == ("finished", None, found["steps"], 0)
    assert found["checkpoint"]["step"] == found["steps"]

    called = (folder / "calls").read_text().splitlines()
    assert len(called) == 2, called
    assert all(line.startswith("before: exec --bind ") for line in called)
    assert str(run) in called[0]

    code = Path(uninterrupted.said["code"])
    assert (code / "slurm" / "pretrain.sh").read_bytes() == (ROOT / "slurm" / "pretrain.sh").read_bytes()
    assert json.loads((code / "code.json").read_text())["job"] == uninterrupted.job

    again = tubelet(slurm, "submit", ROOT / "configs" / "demo.yaml", f"run.dir={run}", *settings)
    assert again.returncode == 2
    assert "is finished" in again.stderr


def test_a_job_runs_the_code_it_was_submitted_with(slurm: Any, tmp_path: Path, settings: list[str]) -> None:
    run, held = tmp_path / "run", ["--sbatch=--ntasks-per-node=1", "--sbatch=--hold"]
    done = tubelet(slurm, "submit", ROOT / "configs" / "demo.yaml", f"run.dir={run}", *settings, *held)
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1].rstrip(":")
    found = status(slurm, run)
    assert (found["state"], found["job"]["id"], found["job"]["state"]) == ("queued", job, "PENDING")
    assert found["attempt"] == found["step"] == 0

    refused = tubelet(slurm, "submit", ROOT / "configs" / "demo.yaml", f"run.dir={run}", *settings)
    assert refused.returncode == 2
    assert f"has job {job} already" in refused.stderr

    (run / "code" / "001" / "launch" / "slurm.py").write_text("raise SystemExit('the copy was run')\n")
    slurm.run("scontrol", "release", job)
    slurm.wait_for(lambda: slurm.job(job)["JobState"] == "FAILED", 60, slurm.why)
    assert "the copy was run" in (run / "logs" / f"slurm-{job}.log").read_text()
    assert status(slurm, run)["state"] == "never started"


def test_the_commands_of_the_readme(slurm: Any, tmp_path: Path) -> None:
    lines = [line for line in commands("tubelet") if line.split()[1] in ON_SLURM]
    assert [line.split()[1] for line in lines] == ["submit", "status"]
    run = f"run.dir={tmp_path / 'vit_large_k400'}"
    done = tubelet(slurm, *lines[0].split()[1:], run, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "--nodes=8" in done.stdout
    assert "--cpus-per-task=12" in done.stdout
    (tmp_path / "vit_large_k400" / "attempts").mkdir(parents=True)
    done = tubelet(slurm, "status", tmp_path / "vit_large_k400")
    assert done.returncode == 0, done.stderr
    assert "never started" in done.stdout
