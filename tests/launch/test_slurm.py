"""launch/slurm.py: what becomes of a job. The programs of Slurm are stand-ins here; tests/slurm has the real ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch import slurm
from pretrain.attempt import record_refusal
from shards.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "demo.yaml")
JOB = {"SLURM_JOB_ID": "12", "SLURM_NTASKS_PER_NODE": "8"}
SHOWN = (
    "JobId=12 JobName=tubelet UserId=root(0) Account=(null) QOS=long JobState=RUNNING TimeLimit=1-00:00:00 "
    "Partition=train NodeList=node[0-1] NumNodes=2 NumCPUs=16 NumTasks=16 CPUs/Task=12 MinMemoryNode=0 Features=(null) "
    "Command=/home/x/my job.sh a.yaml b=c WorkDir=/home/x StdOut=/home/x/slurm-12.out TresPerNode=gres:gpu:8"
)


class Run:
    """A run folder as the trainer leaves it."""

    def __init__(self, folder: Path) -> None:
        self.dir = folder
        (folder / "attempts").mkdir(parents=True)
        self._clock = 1_000_000_000

    @property
    def arguments(self) -> list[str]:
        return [CONFIG, f"run.dir={self.dir}"]

    def attempt(self, number: int, outcome: str | None = None, reason: str = "because", job: str = "12") -> None:
        self._write(f"attempts/{number:04d}.json", {"attempt": number, "start": f"slurm-{job}.0"})
        if outcome is not None:
            row = {"outcome": outcome, "step": 5, "reason": reason}
            self._write(f"attempts/{number:04d}.outcome.json", row)

    def checkpoint(self, step: int) -> None:
        self._write(f"checkpoints/step-{step:06d}/manifest.json", {})

    def _write(self, name: str, row: dict[str, object]) -> None:
        """Each file is a second younger than the one before."""
        file = self.dir / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row))
        self._clock += 1
        os.utime(file, (self._clock, self._clock))


class Programs:
    """Stand-ins for scontrol and sbatch on the PATH, which write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        self.calls_file.touch()
        self.answer(requeue_code=0)

    def answer(self, *, requeue_code: int = 0, sbatch_code: int = 0, state: str = "RUNNING") -> None:
        shown = SHOWN.replace("RUNNING", state)
        self._program(
            "scontrol",
            f"""case "$1" in
            show) echo '{shown}';;
            requeue) exit {requeue_code};;
            write) echo '#!/bin/sh' > "$4";;
            esac""",
        )
        self._program("sbatch", f"echo Submitted batch job 13; exit {sbatch_code}")

    def calls(self, program: str) -> list[list[str]]:
        lines = [line.split("\t") for line in self.calls_file.read_text().splitlines()]
        return [line[1:] for line in lines if line[0] == program]

    def _program(self, name: str, body: str) -> None:
        file = self.folder / name
        words = """for word in "$@"; do printf '\\t%s' "$word"; done"""
        record = f"{{ printf {name}; {words}; echo; }} >> '{self.calls_file}'"
        file.write_text(f"#!/bin/sh\n{record}\n{body}\n")
        file.chmod(0o755)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Programs(folder)


def test_finished_ends_the_job_whatever_srun_says(run: Run, programs: Programs) -> None:
    run.attempt(1, "finished")
    assert slurm.after(0, 143, run.arguments, JOB) == 0
    assert not programs.calls("scontrol")


def test_a_person_is_needed_whatever_srun_says(
    run: Run, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    run.attempt(1, "person", "data.shards is gone")
    assert slurm.after(0, 0, run.arguments, JOB) == 93
    assert "data.shards is gone" in capsys.readouterr().err
    assert not programs.calls("scontrol")


@pytest.mark.parametrize("outcome", ["stopped", "failed", None])
@pytest.mark.parametrize("code", [0, 75, 137, 143])
def test_everything_else_goes_back_into_the_queue(run: Run, programs: Programs, outcome: str | None, code: int) -> None:
    run.attempt(1, "finished")  # of a shorter run, before --change
    run.attempt(2, outcome)
    assert slurm.after(1, code, run.arguments, JOB) == 75
    assert ["requeue", "12"] in programs.calls("scontrol")


def test_a_refused_start_needs_a_person(
    run: Run, programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It took no attempt, and srun says 143 as it does for every failure."""
    monkeypatch.setenv("TUBELET_START", "0:slurm-12.0")
    record_refusal(run.dir, "data.shards is gone")
    assert slurm.after(0, 143, run.arguments, JOB) == 93
    assert "data.shards is gone" in capsys.readouterr().err
    assert not programs.calls("scontrol")


def test_a_job_that_another_start_superseded_does_not_take_over_again(run: Run, programs: Programs) -> None:
    """Two jobs on one run: the older one found the newer one at work and says so; the newer one is still at it."""
    run.attempt(1, "person", "attempt 2 is at work")
    run.attempt(2, job="13")
    assert slurm.after(0, 93, run.arguments, JOB) == 93
    assert not programs.calls("scontrol")


def test_an_older_attempt_says_nothing(run: Run, programs: Programs) -> None:
    run.attempt(1, "finished")
    assert slurm.after(1, 1, run.arguments, JOB) == 75
    assert ["requeue", "12"] in programs.calls("scontrol")


def test_a_finished_run_takes_no_attempt(run: Run, programs: Programs) -> None:
    run.attempt(1, "finished")
    (run.dir / "DONE").write_text("5\n")
    assert slurm.after(1, 0, run.arguments, JOB) == 0
    assert slurm.after(1, 93, run.arguments, JOB) == 93, "a refused config beside an old DONE"
    assert not programs.calls("scontrol")


def test_a_crash_loop_asks_for_a_person(run: Run, programs: Programs) -> None:
    run.attempt(1)
    run.checkpoint(10)
    run.attempt(2)
    run.attempt(3)
    assert slurm.after(2, 1, run.arguments, JOB) == 75
    run.attempt(4)
    assert slurm.after(3, 1, run.arguments, JOB) == 93
    run.checkpoint(20)
    run.attempt(5)
    assert slurm.after(4, 1, run.arguments, JOB) == 75


def test_starts_that_never_reach_an_attempt_are_counted_by_slurm(run: Run, programs: Programs) -> None:
    assert slurm.after(0, 1, run.arguments, JOB) == 75
    assert slurm.after(0, 1, run.arguments, JOB | {"SLURM_RESTART_COUNT": "1"}) == 75
    assert slurm.after(0, 1, run.arguments, JOB | {"SLURM_RESTART_COUNT": "2"}) == 93


def test_a_cancelled_job_stays_cancelled(run: Run, programs: Programs) -> None:
    programs.answer(state="CANCELLED")
    run.attempt(1, "stopped")
    assert slurm.after(0, 143, run.arguments, JOB) == 75
    assert ["requeue", "12"] not in programs.calls("scontrol")
    assert not programs.calls("sbatch")


def test_where_requeue_is_forbidden_a_copy_follows(run: Run, programs: Programs) -> None:
    programs.answer(requeue_code=1)
    run.attempt(1, "failed")
    assert slurm.after(0, 1, [*run.arguments, "track.project=two words"], JOB) == 75
    (copy,) = programs.calls("sbatch")
    options = [word for word in copy if word.startswith("--")]
    assert options == [
        "--dependency=afterany:12",
        "--job-name=tubelet",
        "--partition=train",
        "--qos=long",
        "--time=1-00:00:00",
        "--nodes=2",
        "--cpus-per-task=12",
        "--output=/home/x/slurm-12.out",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
    ]
    assert copy[len(options) + 1 :] == [*run.arguments, "track.project=two words"]


def test_where_nothing_works_it_says_what_to_do(
    run: Run, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.answer(requeue_code=1, sbatch_code=1)
    run.attempt(1, "failed")
    assert slurm.after(0, 1, run.arguments, JOB) == 75
    assert "by hand" in capsys.readouterr().err


def test_before_names_the_newest_attempt_and_the_demo(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    run.attempt(1, "failed")
    run.attempt(2)
    assert slurm.before(run.arguments) == 2
    assert capsys.readouterr().err == ""
    assert slurm.before([f"run.dir={run.dir}", "--change"]) == 2
    assert "configs/demo.yaml" in capsys.readouterr().err


def test_before_refuses_a_config_with_problems(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"train\.steps"):
        slurm.before([*run.arguments, "train.steps=0"])
    assert slurm.main(["before", *run.arguments, "train.steps=0"]) == 93
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "train.steps" in printed.err
