"""launch/slurm.py: what becomes of a job. The programs of Slurm are stand-ins here; tests/slurm has the real ones."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch import job, slurm
from pretrain.attempt import record_refusal
from shards.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "demo.yaml")
JOB = {"SLURM_JOB_ID": "12", "SLURM_NTASKS_PER_NODE": "8"}
SHOWN = """\
JobId=12 JobName=two words
   UserId=root(0) Account=(null) QOS=long
   JobState=RUNNING TimeLimit=1-00:00:00
   Partition=train NodeList=node[0-1]
   NumNodes=2 NumCPUs=16 NumTasks=16 CPUs/Task=12
   MinMemoryNode=0 Features=(null)
   Command=/home/x/my job.sh a.yaml b=c
   WorkDir=/home/x
   StdOut=/home/x/my logs/100%/5%%/slurm-12.out
   OverSubscribe=OK Contiguous=0 Licenses=(null)
   TresPerNode=gres:gpu:8"""


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
        self.settle(name)

    def settle(self, name: str) -> None:
        """Give what was written just now its place in this order."""
        self._clock += 1
        os.utime(self.dir / name, (self._clock, self._clock))


class Programs:
    """Stand-ins for scontrol and sbatch on the PATH, which write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        self.calls_file.touch()
        self.answer(requeue_code=0)

    def answer(
        self,
        *,
        requeue_code: int = 0,
        sbatch_code: int = 0,
        state: str = "RUNNING",
        nodes: str = "",
        excluded: str = "",
    ) -> None:
        """`nodes`: what sinfo lists, as "node0|idle node1|down*"; `excluded`: the job's ExcNodeList."""
        shown = SHOWN.replace("RUNNING", state) + (f" ExcNodeList={excluded}" if excluded else "")
        self.program(
            "scontrol",
            f"""case "$1 $2" in
            "show hostnames") echo "$3" | tr , '\\n';;
            show*) echo '{shown}';;
            requeue*) exit {requeue_code};;
            write*) echo '#!/bin/sh' > "$4";;
            esac""",
        )
        self.program(
            "sbatch",
            f"""printf 'nodes\t%s\n' "$TUBELET_NODES$SLURM_NTASKS" >> '{self.calls_file}'
            echo Submitted batch job 13; exit {sbatch_code}""",
        )
        self.program("sinfo", f"printf '%s\\n' {shlex.quote(nodes)} | tr ' ' '\\n'")

    def calls(self, program: str) -> list[list[str]]:
        lines = [line.split("\t") for line in self.calls_file.read_text().splitlines()]
        return [line[1:] for line in lines if line[0] == program]

    def program(self, name: str, body: str) -> None:
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
    run.settle("attempts/asked")
    run.attempt(5)
    assert slurm.after(4, 1, run.arguments, JOB) == 75, "somebody has looked and submitted again"
    run.attempt(6)
    run.checkpoint(20)
    run.attempt(7)
    assert slurm.after(6, 1, run.arguments, JOB) == 75


def test_a_file_that_vanishes_while_we_count_is_passed_over(run: Run, programs: Programs) -> None:
    for number in range(1, 4):
        run.attempt(number)
    (run.dir / "attempts" / "unborn-slurm-11.0.json").symlink_to("gone")
    assert slurm.after(2, 1, run.arguments, JOB) == 93


def test_a_run_folder_that_cannot_be_read_is_no_reason_to_end(
    run: Run, programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stale(run_dir: Path) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("launch.outcome.starts_without_progress", stale)
    run.attempt(1)
    assert slurm.after(0, 1, run.arguments, JOB) == 75
    assert ["requeue", "12"] in programs.calls("scontrol")
    assert "Stale file handle" in capsys.readouterr().err


@pytest.mark.parametrize("ended", ["stopped", "failed", None])
def test_the_stop_file_ends_a_job_whose_ranks_did_not_see_it(
    run: Run, programs: Programs, capsys: pytest.CaptureFixture[str], ended: str | None
) -> None:
    run.attempt(1, ended)
    (run.dir / "STOP").touch()
    assert slurm.after(0, 143, run.arguments, JOB) == 93
    assert "STOP was there" in capsys.readouterr().err
    assert not (run.dir / "STOP").exists()
    assert not programs.calls("scontrol")


def test_the_stop_file_keeps_a_waiting_job_from_starting(
    run: Run, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.dir / "STOP").touch()
    assert slurm.main(["before", *run.arguments]) == 93
    assert "nothing was started" in capsys.readouterr().err
    assert slurm.main(["before", *run.arguments]) == 0, "submitted again"


def test_what_it_says_holds_no_secrets(run: Run, programs: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    run.attempt(1, "person", "s3://key:CANARY@host/films?sig=CANARY is gone")
    assert slurm.after(0, 0, run.arguments, JOB) == 93
    said = capsys.readouterr().err
    assert "s3://host/films is gone" in said
    assert "CANARY" not in said


def test_starts_that_never_reach_an_attempt_are_counted(run: Run, programs: Programs) -> None:
    run.attempt(1, "stopped")
    run.checkpoint(10)

    def codes(*restarts: int) -> list[int]:
        return [slurm.after(1, 1, run.arguments, JOB | {"SLURM_RESTART_COUNT": str(number)}) for number in restarts]

    assert codes(5, 6) == [75, 75]
    for number in (5, 6):
        run.settle(f"attempts/unborn-slurm-12.{number}.json")
    run.checkpoint(20)
    assert codes(7, 8, 9) == [75, 75, 93], "copies of a job count as its restarts do"
    assert codes(10) == [75], "somebody has looked and submitted again"


def test_starts_that_cannot_even_write_are_counted_by_slurm(run: Run, programs: Programs) -> None:
    arguments = [CONFIG, f"run.dir={run.dir}/attempts/no"]
    (run.dir / "attempts" / "no").touch()
    assert slurm.after(0, 1, arguments, JOB | {"SLURM_RESTART_COUNT": "1"}) == 75
    assert slurm.after(0, 1, arguments, JOB | {"SLURM_RESTART_COUNT": "2"}) == 93


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING"])
def test_what_was_cancelled_or_queued_by_slurm_is_left_alone(run: Run, programs: Programs, state: str) -> None:
    programs.answer(state=state)
    run.attempt(1, "stopped")
    assert slurm.after(0, 143, run.arguments, JOB) == 75
    assert ["requeue", "12"] not in programs.calls("scontrol")
    assert not programs.calls("sbatch")


def test_at_the_time_limit_there_is_time_to_queue_again(run: Run, programs: Programs) -> None:
    programs.answer(state="COMPLETING Reason=TimeLimit")
    run.attempt(1, "stopped")
    assert slurm.after(0, 143, run.arguments, JOB) == 75
    assert ["requeue", "12"] in programs.calls("scontrol")


def test_a_controller_that_restarts_is_asked_again(
    run: Run, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "PAUSE_S", 0.0)
    run.attempt(1, "stopped")
    count = f"echo x >> {run.dir}/asked; [ $(wc -l < {run.dir}/asked) -gt 2 ]"
    programs.program("scontrol", f"{count} || {{ echo Unable to contact slurm controller >&2; exit 1; }}")
    assert slurm.after(0, 143, run.arguments, JOB) == 75
    assert ["requeue", "12"] in programs.calls("scontrol")


FOUR = "node0|allocated node1|allocated node2|idle node3|idle"


def blame(run: Run, *nodes: str, time: float = 1.0) -> None:
    with (run.dir / "attempts" / "blamed.jsonl").open("a") as file:
        for node in nodes:
            row = {"node": node, "attempt": 1, "by": "doctor", "reason": "slow", "time": time}
            file.write(json.dumps(row) + "\n")


def test_a_node_blamed_twice_is_excluded_once_the_job_waits(
    run: Run, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.answer(nodes=FOUR, excluded="node3")
    run.attempt(1, "failed")
    outcome = {"outcome": "failed", "step": 5, "reason": "rank 1 hung", "time": 2.0, "blamed": [1, 2]}
    (run.dir / "attempts" / "0001.outcome.json").write_text(json.dumps(outcome))
    (run.dir / "attempts" / "0001.json").write_text(
        json.dumps({"start": "slurm-12.0", "nodes": ["node0", "node1", "node1"]})
    )
    blame(run, "node1", "node0", "elsewhere", "elsewhere")
    assert slurm.after(0, 143, run.arguments, JOB | {"SLURM_JOB_NUM_NODES": "2"}) == 75
    calls = programs.calls("scontrol")
    assert calls.index(["requeue", "12"]) < calls.index(["update", "JobId=12", "ExcNodeList=node3,node1"])
    said = capsys.readouterr().err
    assert "node1 is excluded from now on: blamed 2 times (attempt 1, watchdog: rank 1 hung" in said
    assert "node0" not in said


def test_a_forgiven_node_may_be_had_again(run: Run, programs: Programs) -> None:
    """Also where it was the only one, and the list becomes empty."""
    run.attempt(1, "failed")
    blame(run, "node1", "node1")
    (run.dir / "attempts" / "forgiven").touch()
    for excluded, left in (("node1", ""), ("node1,node3", "node3")):
        programs.answer(nodes=FOUR, excluded=excluded)
        assert slurm.after(0, 143, run.arguments, JOB | {"SLURM_JOB_NUM_NODES": "2"}) == 75
        assert programs.calls("scontrol")[-1] == ["update", "JobId=12", f"ExcNodeList={left}"]


def test_nodes_that_the_user_has_excluded_are_not_counted_on(run: Run, programs: Programs) -> None:
    """A copy must not wait for two nodes where one can be had; blamed once, they are still the user's."""
    run.attempt(1, "failed")
    blame(run, "node1")
    asked = JOB | {"SLURM_JOB_NUM_NODES": "2"}
    programs.answer(nodes=FOUR, excluded="node1")
    assert slurm.after(0, 143, run.arguments, asked) == 75
    assert programs.calls("scontrol")[-1] == ["requeue", "12"], "the list is as it was"
    programs.answer(nodes="node0|allocated node1|idle", excluded="node1")
    assert slurm.after(0, 143, run.arguments, asked) == 75
    assert {"--nodes=1-2", "--exclude=node1"} <= set(programs.calls("sbatch")[-1])
    with pytest.raises(UserError, match=r"those you excluded \(node1\)"):
        slurm.after(0, 143, [*run.arguments, "launch.min_nodes=2"], asked)


def test_where_fewer_nodes_are_left_a_copy_asks_for_fewer(
    run: Run, programs: Programs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")  # of this job: srun in the copy must not see it
    programs.answer(nodes="node0|allocated node1|allocated node2|down* node3|drained")
    run.attempt(1, "failed")
    blame(run, "node1", "node1")
    asked = JOB | {"SLURM_JOB_NUM_NODES": "2"}
    assert slurm.after(0, 143, run.arguments, asked) == 75
    (copy,) = programs.calls("sbatch")
    assert {"--nodes=1-2", "--exclude=node1"} <= set(copy)
    assert ["requeue", "12"] not in programs.calls("scontrol")
    assert programs.calls("nodes") == [["1-2"]]
    assert "asks for 1-2 nodes instead of 2" in capsys.readouterr().err

    asked = JOB | {"SLURM_JOB_NUM_NODES": "1", "TUBELET_NODES": "1-2"}
    assert slurm.after(0, 143, run.arguments, asked) == 75
    assert ["requeue", "12"] in programs.calls("scontrol"), "the copy may have one node or two: as it is"

    programs.answer(nodes=FOUR)
    assert slurm.after(0, 143, run.arguments, asked) == 75
    assert "--nodes=2" in programs.calls("sbatch")[-1], "once there are enough again"


def test_one_task_per_node_asks_for_all_that_can_be_had(run: Run, programs: Programs) -> None:
    """Slurm would fill 1-4 with one node."""
    programs.answer(nodes="node0|idle node1|idle node2|idle node3|down")
    run.attempt(1, "failed")
    assert slurm.after(0, 1, run.arguments, {"SLURM_JOB_ID": "12", "SLURM_NTASKS_PER_NODE": "1", "TUBELET_NODES": "4"})
    assert "--nodes=3-4" in programs.calls("sbatch")[0]


def test_too_few_nodes_need_a_person(run: Run, programs: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    programs.answer(nodes="node0|idle node1|idle")
    run.attempt(1, "failed")
    blame(run, "node1", "node1")
    words = ["after", "0", "1", *run.arguments, "launch.min_nodes=2"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (JOB | {"SLURM_JOB_NUM_NODES": "2"}).items():
            patch.setenv(name, value)
        patch.setattr(signal, "signal", lambda *_: None)
        assert slurm.main(words) == 93
    assert "launch.min_nodes is 2; partition train has 1 nodes" in capsys.readouterr().err
    (run.dir / "attempts" / "forgiven").touch()
    assert slurm.after(0, 1, [*run.arguments, "launch.min_nodes=2"], JOB | {"SLURM_JOB_NUM_NODES": "2"}) == 75


def test_a_job_that_got_an_excluded_node_is_replaced(run: Run, programs: Programs) -> None:
    programs.answer(nodes=FOUR)
    blame(run, "node1", "node1")
    env = JOB | {"SLURM_JOB_NODELIST": "node0,node1", "SLURM_JOB_NUM_NODES": "2"}
    assert slurm.before(run.arguments, env) == []
    assert "--exclude=node1" in programs.calls("sbatch")[0]


def test_where_requeue_is_forbidden_a_copy_follows(run: Run, programs: Programs) -> None:
    programs.answer(requeue_code=1)
    run.attempt(1, "failed")
    assert slurm.after(0, 1, [*run.arguments, "track.project=two words"], JOB) == 75
    (copy,) = programs.calls("sbatch")
    options = [word for word in copy if word.startswith("--")]
    assert options == [
        "--dependency=afterany:12",
        f"--comment=tubelet {run.dir}",
        "--nodes=2",
        "--job-name=two words",
        "--partition=train",
        "--qos=long",
        "--time=1-00:00:00",
        "--cpus-per-task=12",
        "--mem=0",
        "--output=/home/x/my logs/100%%/5%%/slurm-12.out",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
    ]
    assert copy[len(options) + 1 :] == [*run.arguments, "track.project=two words"]


def test_a_copy_has_every_option_that_the_job_was_submitted_with(run: Run) -> None:
    """The command line may ask for cards in several ways; `submit --sbatch` passes on what nothing here knows."""
    facts = {
        "TresPerJob": "gres:gpu:h100:16",
        "TresPerTask": "cpu=8,gres/gpu=1",
        "OverSubscribe": "NO",
        "NumNodes": "2",
    }
    words = [
        "--switches=1",
        "--mail-user=two words",
        "--begin=22:00",
        "-b",
        "22:00",
        "-C",
        "a100",
        "-H",
        "--wait-all=1",
    ]
    options = job.copy_options(JOB | {job.MORE: shlex.join([*words, "--nodes=9"])}, facts, run.dir, "2", [])
    assert options[:5] == ["--switches=1", "--mail-user=two words", "-C", "a100", "--wait-all=1"]
    assert [option for option in options if "nodes" in option] == ["--nodes=2"]
    assert options[-3:] == ["--gpus=h100:16", "--gpus-per-task=1", "--exclusive"]


def test_a_copy_on_fewer_nodes_asks_for_fewer_cards(run: Run) -> None:
    facts = {"TresPerJob": "gres:gpu:16", "NumNodes": "2"}
    assert "--gpus-per-node=8" in job.copy_options(JOB, facts, run.dir, "1-2", ["node1"])


def test_a_copy_asks_for_the_nodes_that_were_named(run: Run, programs: Programs) -> None:
    facts = {"ReqNodeList": "node0,node1", "NumNodes": "2"}
    assert "--nodelist=node0,node1" in job.copy_options(JOB, facts, run.dir, "2", [])
    assert not [word for word in job.copy_options(JOB, facts, run.dir, "2", ["node1"]) if "nodelist" in word]


def stale(times: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The run folder cannot be listed so many times; the pauses that were made."""
    pauses, left, original = list[float](), [times], os.listdir

    def listdir(path: Path) -> list[str]:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return original(path)

    monkeypatch.setattr(slurm.os, "listdir", listdir)
    monkeypatch.setattr(slurm.time, "sleep", pauses.append)
    return pauses


def test_a_run_folder_that_hangs_up_is_looked_at_again(
    run: Run, programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.attempt(1, "finished")
    (run.dir / "DONE").touch()
    pauses = stale(3, monkeypatch)
    assert slurm.after(0, 143, run.arguments, JOB) == 0
    assert pauses == list(slurm.PAUSES_AFTER_S)
    assert capsys.readouterr().err.count("attempts cannot be read (Stale file handle): looking again in") == 3
    stale(2, monkeypatch)
    assert slurm.before(run.arguments, {})[0] == "1"


def test_a_config_that_hangs_up_is_looked_at_again(
    run: Run, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`submit` keeps it in the run folder."""
    config, original, asked = tmp_path / "config.yaml", Path.read_text, list[Path]()
    config.write_text(Path(CONFIG).read_text())

    def read_text(file: Path, *words: Any) -> str:
        asked.append(file)
        if file == config and asked.count(file) < 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return original(file, *words)

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(slurm.time, "sleep", lambda _: None)
    assert slurm.before([str(config), f"run.dir={run.dir}"], {})[0] == "0"


@pytest.mark.parametrize("verb", [["before"], ["after", "0", "143"]])
def test_a_run_folder_that_stays_away_ends_no_job(
    run: Run,
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: list[str],
) -> None:
    """However often it was requeued before: the next start may find it, on another node or later."""
    for name, value in (JOB | {"SLURM_RESTART_COUNT": "9"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    stale(99, monkeypatch)
    assert slurm.main([*verb, *run.arguments]) == 75
    assert ["requeue", "12"] in programs.calls("scontrol")
    programs.answer(state="CANCELLED")
    assert slurm.main([*verb, *run.arguments]) == 75
    assert programs.calls("scontrol").count(["requeue", "12"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "was cancelled" in said.err


def test_where_nothing_works_it_says_what_to_do(
    run: Run, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.answer(requeue_code=1, sbatch_code=1)
    run.attempt(1, "failed")
    assert slurm.after(0, 1, run.arguments, JOB) == 75
    assert "by hand" in capsys.readouterr().err


def test_before_names_the_newest_attempt_and_the_demo(
    run: Run, programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    run.attempt(1, "failed")
    run.attempt(2)
    assert slurm.before(run.arguments, {}) == ["2", "", "--export=ALL"]
    assert capsys.readouterr().err == ""
    assert slurm.before([f"run.dir={run.dir}", "--change"], {})[0] == "2"
    assert "configs/demo.yaml" in capsys.readouterr().err


def test_before_asks_slurm_once_for_all_ranks(run: Run, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "free_port", lambda port: port + 1)
    env = JOB | {"SLURM_JOB_NODELIST": "localhost,127.0.0.1,node9"}
    words = [*run.arguments, "launch.interface=ib0", "launch.prologue= module load cuda "]
    assert slurm.before(words, env) == [
        "0",
        "module load cuda",
        "--export=ALL,TUBELET_HOSTS=localhost/127.0.0.1,TUBELET_PORT=15013,TUBELET_INTERFACE=ib0",
    ]
    assert ["update", "JobId=12", f"Comment=tubelet {run.dir}"] in programs.calls("scontrol")


def test_a_container_is_words_of_the_srun_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: Programs
) -> None:
    """The project, the config's folder, code, run, data and caches are mounted, once each; URLs are not."""
    monkeypatch.chdir(tmp_path)
    image, data = tmp_path / "a b.sif", tmp_path.parent / "data"
    (data / "films").mkdir(parents=True, exist_ok=True)
    words = [*run.arguments, f"data.shards={data}/films/{{0..3}}", "data.eval_shards=s3://films/val"]
    with pytest.raises(UserError, match=r"launch\.container"):
        slurm.before([*words, f"launch.container={image}"], {})
    image.touch()
    binds = f"{ROOT}/configs,{tmp_path},{data}/films"
    apptainer = slurm.before([*words, f"launch.container={image}"], {"SLURM_GPUS_ON_NODE": "8"})[3:]
    assert apptainer[:4] == ["apptainer", "exec", "--nv", "--bind"]
    assert sorted(apptainer[4].split(",")) == sorted(binds.split(","))
    assert apptainer[5:] == ["--pwd", str(tmp_path), str(image)]
    pyxis = slurm.before([*words, "launch.container=nvcr.io#nvidia/pytorch:25.01-py3"], {})[3:]
    assert [word.partition("=")[0] for word in pyxis] == [
        "--container-image",
        "--container-mounts",
        "--container-workdir",
    ]
    assert f"{data}/films:{data}/films" in pyxis[1]


def test_before_refuses_a_config_with_problems(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"train\.steps"):
        slurm.before([*run.arguments, "train.steps=0"], {})
    with pytest.raises(UserError, match=r"launch\.prologue"):
        slurm.before([*run.arguments, "launch.prologue=a\nb"], {})
    assert slurm.main(["before", *run.arguments, "train.steps=0"]) == 93
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "train.steps" in printed.err


def test_a_prologue_that_fails_is_not_quoted(tmp_path: Path, programs: Programs) -> None:
    """The log of a job is read by many (C14)."""
    programs.program("python", "printf '0\\nfalse CANARY\\n--export=ALL\\n'")
    env = {**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path)}
    script = ["bash", str(ROOT / "slurm" / "pretrain.sh"), CONFIG]
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 93
    assert "launch.prologue failed" in done.stderr
    assert "CANARY" not in done.stdout + done.stderr
