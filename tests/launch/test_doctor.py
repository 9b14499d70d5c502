"""tubelet doctor: each check can fail and says what to do; ranks that die or hang are named, not waited for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from launch import doctor, node
from pretrain import diagnosis, symptoms
from pretrain.checkup import Pace, expected_nodes, make_report, measured, slurm_checks, write_report
from pretrain.config import Config, load_config
from pretrain.finding import NO_END, PROBLEM, Check, Places, lines, next_command
from pretrain.memory import Memory, States
from pretrain.patience import Hurry, Limits
from pretrain.rollcall import CutShort, RollCall, within
from pretrain.world import World
from shards.errors import UserError
from tests.dist import ranks as processes

FOUR = Places(["node0", "node0", "node1", "node2"])
TWO = Places(["node0", "node1"])
GB = 10**9


def failing(check: Check, *words: str, level: str = "fail") -> Check:
    """The check has that level, shows these words, and says what to do."""
    assert check.level == level, check
    assert all(word in check.seen for word in words), check
    assert check.remedy, check
    return check


# ------------------------------------------------------------------------------------------------ judging


def test_at_most_half_of_the_nodes_can_be_at_fault() -> None:
    assert FOUR.at_fault([2]) == ("node1",)
    assert FOUR.at_fault([2, 3]) == ()
    assert TWO.at_fault([1]) == ("node1",)
    assert (TWO.outvoted([1]), FOUR.outvoted([2])) == ((), ("node1",))
    assert Places(["vm", "vm"]).at_fault([1]) == ()
    assert FOUR.name([2]) == "rank 2 (node1)"
    assert Places([f"n{i}" for i in range(9)]).name(range(9)) == "ranks 0, 1, 2, 3 (n0, n1, n2, n3) and 5 more"


def test_silent_ranks_are_named() -> None:
    assert diagnosis.ranks(FOUR, {}).level == "ok"
    check = failing(diagnosis.ranks(FOUR, {2: "ranks"}), "rank 2 (node1) never came up")
    assert check.nodes == ("node1",)
    failing(diagnosis.ranks(FOUR, {3: "shards"}), "rank 3 (node2) fell silent in shards")


def test_versions_that_differ() -> None:
    usual = {"versions": {"torch": "2.13", "code": "aa"}}
    assert diagnosis.versions([usual] * 4, FOUR).level == "ok"
    other = {"versions": {"torch": "2.12", "code": "aa"}}
    check = failing(diagnosis.versions([usual, usual, usual, other], FOUR), "rank 3", "torch 2.12, most have 2.13")
    assert check.nodes == ("node2",)
    assert failing(diagnosis.versions([usual, other], TWO), "rank 1").nodes == ()
    more = Places(["node0", "node0", "node1"])
    assert failing(diagnosis.versions([usual, usual, other], more), "rank 2").nodes == ()  # more ranks prove nothing
    failing(diagnosis.versions([usual, None, usual, {PROBLEM: "no such config"}], FOUR), "no such config")


def test_a_config_that_the_run_folder_refuses() -> None:
    assert diagnosis.config("").level == "ok"
    away = failing(diagnosis.config(f"{NO_END} 60 s"), "no end within 60 s")
    assert "does not answer" in away.remedy
    check = failing(diagnosis.config("data.size is 32; it was 64: use run.dir=NEW"), "data.size is 32; it was 64")
    assert check.remedy == "use run.dir=NEW"


WRITTEN = {"token": True, "created": False, "fsync_s": 0.01}
SEEN = {"missing": False, "torn": 0}


@pytest.mark.parametrize(
    ("written", "seen", "words", "blamed_of_two", "blamed_of_three"),
    [
        ({PROBLEM: "OSError: Read-only file system"}, SEEN, "Read-only", ("node1",), ("node1",)),
        ({**WRITTEN, "token": False}, SEEN, "did not read what rank 0 wrote", (), ("node1",)),
        ({**WRITTEN, "created": True}, SEEN, "all created the same file", (), ()),
        (WRITTEN, {**SEEN, "missing": True}, "what other ranks wrote", (), ("node1",)),
        (WRITTEN, {**SEEN, "torn": 3}, "half written", (), ("node1",)),
    ],
)
def test_a_folder_that_is_not_shared(
    written: dict[str, Any],
    seen: dict[str, Any],
    words: str,
    blamed_of_two: tuple[str, ...],
    blamed_of_three: tuple[str, ...],
) -> None:
    first = {**WRITTEN, "created": True}
    assert diagnosis.run_folder([first, WRITTEN], [SEEN, SEEN], TWO, "runs/x").level == "ok"
    check = failing(diagnosis.run_folder([first, written], [SEEN, seen], TWO, "runs/x"), words, "node1")
    assert check.nodes == blamed_of_two
    three = Places(["node0", "node1", "node2"])
    check = diagnosis.run_folder([first, written, WRITTEN], [SEEN, seen, SEEN], three, "runs/x")
    assert check.nodes == blamed_of_three


def test_space_for_two_checkpoints() -> None:
    def judge(free_bytes: float) -> Check:
        room = {"free_bytes": free_bytes, "num_kept": 0}
        return diagnosis.space(room, 10**9, num_at_most=5, run_dir="runs/x")

    assert judge(6e9).level == "ok"
    failing(judge(4e9), "the run will add 5", level="warn")
    assert "free 500 MB" in failing(judge(1.5e9), "1.5 GB free", "two are needed").remedy
    failing(diagnosis.space({PROBLEM: "gone"}, 1, num_at_most=3, run_dir="runs/x"), "gone")


def test_clocks_that_differ() -> None:
    def judge(ahead_s: float, trip_s: float) -> Check:
        answers = [{"time": 100.0}, {"time": 100.0 + trip_s / 2 + ahead_s}]
        return diagnosis.clocks([(100.0, answers, [100.0, 100.0 + trip_s])] * 2, TWO)

    assert judge(0.5, 0.01).level == "ok"
    check = failing(judge(5.0, 0.01), "5.0", "rank 1 (node1) ahead of rank 0 (node0)", level="warn")
    assert "chrony" in check.remedy
    failing(judge(-5.0, 0.01), "rank 0 (node0) ahead of rank 1 (node1)", level="warn")
    failing(judge(0.0, 4.0), "known to 2.000 s", level="warn")


def test_sums_that_are_wrong_or_slow() -> None:
    right = {"num_wrong": 0, "seconds": {"1000": 0.001, "1000000": 0.1}}

    def judge(second: dict[str, Any], step_s: float | None = None) -> Check:
        return diagnosis.all_reduce([right, second], TWO, gradient_bytes=10**7, step_s=step_s)

    assert judge(right).level == "ok"
    assert "10.0 MB/s at 1 MB" in judge(right).seen
    failing(judge({**right, "num_wrong": 7}), "rank 1 (node1) got a wrong sum (7 numbers")
    failing(judge({PROBLEM: "no end within 60 s"}), "no end within 60 s")
    both = [{PROBLEM: "no end within 60 s"}, {PROBLEM: "RuntimeError: no device 1"}]
    failing(diagnosis.all_reduce(both, TWO, gradient_bytes=1, step_s=None), "rank 1 (node1): RuntimeError: no device 1")
    failing(judge(right, step_s=1.5), "of a step of 1.5 s", level="warn")
    assert judge(right, step_s=3.0).level == "ok"


def test_what_ranks_add_up_is_exact() -> None:
    for world in (2, 5):
        total = torch.stack([symptoms.contribution(rank, 200) for rank in range(world)]).sum(0)
        assert total.equal(symptoms.expected_sum(world, 200))
        assert not (total + 1).equal(symptoms.expected_sum(world, 200))


READ = {"num_read": 40, "num_bytes": 4_000_000, "num_cached": 0, "seconds": 2.0, "bad": []}


def test_shards_that_are_bad_or_slow() -> None:
    def judge(second: dict[str, Any], step_s: float | None = None) -> Check:
        return diagnosis.shards([READ, second], TWO, per_step=80, step_s=step_s, bad_limit=0.02)

    assert "at most one each 2 s" in judge(READ).seen
    failing(judge(READ, step_s=1.0), "needed are 80", level="warn")
    failing(judge({**READ, "bad": ["train sample 3 (checksum)"]}), "sample 3", level="warn")
    failing(judge({**READ, "bad": ["train sample 3 (checksum)"] * 2}), "2 of 80", "rank 1 (node1)")
    failing(judge({**READ, "num_read": 0}), "read no sample in time")
    failing(judge({PROBLEM: "data/x does not exist"}), "data/x does not exist")


def test_a_mirror_that_fails() -> None:
    assert diagnosis.mirror([{}, {}], TWO, None).level == "ok"
    assert diagnosis.mirror([{"seconds": 0.1}, {}], TWO, "s3://b/run").level == "ok"
    check = failing(diagnosis.mirror([{"seconds": 0.1}, {PROBLEM: "AccessDenied"}], TWO, "s3://b/run"), "AccessDenied")
    assert check.nodes == ("node1",)


def test_memory_that_does_not_suffice() -> None:
    states = States(parameters=10 * GB, gradients=10 * GB, gradients_at_update=10 * GB, optimizer=20 * GB, buckets=GB)

    def judge(card: dict[str, Any], *, activations: int = 9 * GB, copies: int = 20 * GB) -> Check:
        need = Memory(states, activations, batch=GB, copies=copies, reserve=4 * GB)
        return diagnosis.memory([H100, card], TWO, need)

    H100 = {"device": "H100", "is_card": True, "free_bytes": 80 * GB, "total_bytes": 80 * GB, "host_bytes": 50 * GB}
    assert judge(H100).level == "ok"
    assert "55.0 GB per rank, 10.0 GB of it for the micro batch" in judge(H100).seen
    small = {**H100, "free_bytes": 24 * GB, "total_bytes": 24 * GB}
    assert failing(judge(small), "rank 1 (node1)", "H100 has 24").nodes == ("node1",)
    failing(judge(H100, activations=36 * GB), "what CUDA and NCCL take", level="warn")
    failing(judge({**H100, "free_bytes": 30 * GB}), "only 30.0 GB of 80.0 GB are free", level="warn")
    failing(judge(H100, copies=60 * GB), "60.0 GB per rank are kept in host memory", "node0", "50.0 GB of it")
    failing(judge({PROBLEM: "RuntimeError: no GPU"}), "no GPU")


def test_without_a_card_everything_lies_in_one_memory() -> None:
    need = Memory(States(GB, GB, GB, GB, GB), GB, batch=GB, copies=GB, reserve=4 * GB)
    host = {"device": "its share", "is_card": False, "free_bytes": 7 * GB, "total_bytes": 7 * GB, "host_bytes": 7 * GB}
    assert diagnosis.memory([host, host], TWO, need).level == "ok", "no CUDA takes its 4 GB"
    less = {**host, "free_bytes": 6 * GB, "total_bytes": 6 * GB, "host_bytes": 6 * GB}
    failing(diagnosis.memory([host, less], TWO, need), "7 GB per rank", "6 GB")


def test_a_signal_that_comes_too_late() -> None:
    assert diagnosis.signal_lead(300, 50, 2).level == "ok"
    assert "not measured" in diagnosis.signal_lead(300, None, None).seen
    assert "USR1@420" in failing(diagnosis.signal_lead(300, 200, 2), "need 402 s").remedy
    failing(diagnosis.signal_lead(0, 50, 2), "asks for no signal")
    read = diagnosis.signal_lead(300, 200, 2, "slurm/pretrain.sh")
    assert "TUBELET_SIGNAL_LEAD_S" in failing(read, "slurm/pretrain.sh says 300 s", level="warn").remedy
    failing(diagnosis.signal_lead(0, 50, 2, "the batch script"), "the batch script asks for no signal", level="warn")
    assert diagnosis.signal_lead(None, 50, 2).level == "warn"


def test_only_what_the_job_says_itself_is_sure(config: Config) -> None:
    def judge(**env: str) -> Check:
        [check] = slurm_checks(config, Pace(step_s=2, save_s=200), env)
        return check

    failing(judge(TUBELET_SIGNAL_LEAD_S="300", TUBELET_SCRIPT_LEAD_S="600"), "300 s before the end")
    assert judge(TUBELET_SIGNAL_LEAD_S="600", TUBELET_SCRIPT_LEAD_S="300").level == "ok"
    failing(judge(TUBELET_SCRIPT_LEAD_S="0"), "the batch script asks for no signal", level="warn")
    failing(judge(TUBELET_SCRIPT_LEAD_S="300", TUBELET_SCRIPT="a.sh"), "a.sh says 300 s", level="warn")
    assert "not known" in judge().seen


def test_a_prologue_is_said_not_to_be_run(tiny_config: Callable[..., Path]) -> None:
    config = load_config(tiny_config(**{"launch.prologue": "module load cuda"}))
    [check, _] = slurm_checks(config, Pace(), {})
    assert (check.name, check.level) == ("prologue", "ok")
    assert len(lines({"checks": [check.to_json(), CHECKS[0].to_json()], "blamed_nodes": []})) == 3, "one line each"


# ------------------------------------------------------------------------------------------------ measuring


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for run_dir in (tmp_path / "file" / "run", Path("/sys/run")):  # /sys is closed to root as well
        answer = within(lambda at=run_dir: symptoms.begin_folder(at / ".doctor-x", "x"), 10)
        failing(diagnosis.run_folder([answer], [answer], Places(["vm"]), str(run_dir)), "Error")


def test_a_shared_folder_is_proved_and_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "run" / ".doctor-x"
    symptoms.begin_folder(folder, "x")
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    written = [symptoms.write_folder(folder, "x", rank) for rank in range(2)]
    assert [answer["created"] for answer in written] == [True, False]
    seen = [symptoms.see_folder(folder, "x", rank, [0, 1]) for rank in range(2)]
    assert diagnosis.run_folder(written, seen, TWO, "run").level == "ok"
    assert symptoms.end_folder(folder)["free_bytes"] > 0
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 has a folder of the same name that is not the one of rank 0."""
    monkeypatch.setattr(symptoms, "SEE_LIMIT_S", 0.0)
    mine, other = tmp_path / "mine" / ".doctor-x", tmp_path / "other" / ".doctor-x"
    symptoms.begin_folder(mine, "x")
    other.mkdir(parents=True)
    assert not symptoms.write_folder(other, "x", 1)["token"]
    symptoms.write_folder(mine, "x", 0)
    assert symptoms.see_folder(mine, "x", 0, [0, 1])["missing"]
    assert symptoms.see_folder(other, "x", 1, [0, 1]) == {"missing": True, "torn": symptoms.NUM_REPLACED}
    nowhere = symptoms.write_folder(tmp_path / "local" / ".doctor-x", "x", 1)  # only rank 0 made its folder
    written = [symptoms.write_folder(mine, "x", 0), nowhere]
    assert failing(diagnosis.run_folder(written, [SEEN, SEEN], TWO, "run"), "rank 1", "did not read").nodes == ()


@pytest.fixture
def config(tiny_config: Callable[..., Path]) -> Config:
    return load_config(tiny_config())


def test_samples_are_read_and_compared(config: Config, packed: Path, tmp_path: Path) -> None:
    answer = symptoms.read_samples(config, "x", World())
    assert (answer["bad"], answer["num_read"] > 0, answer["num_bytes"] > 0) == ([], True, True)
    broken = shutil.copytree(packed, tmp_path / "broken")
    for tar in broken.glob("train*.tar"):
        data = bytearray(tar.read_bytes())
        for place in range(2000, len(data), 2000):
            data[place] ^= 1
        tar.write_bytes(data)
    other = config.model_copy(update={"data": config.data.model_copy(update={"shards": str(broken)})})
    answer = symptoms.read_samples(other, "x", World())
    failing(diagnosis.shards([answer], Places(["vm"]), per_step=8, step_s=None, bad_limit=0.01), "(checksum)")
    tar.unlink()
    gone = within(lambda: symptoms.read_samples(other, "x", World()), 30)
    failing(diagnosis.shards([gone], Places(["vm"]), per_step=8, step_s=None, bad_limit=0.01), "is missing")


def test_a_mirror_is_written_and_left_empty(tmp_path: Path) -> None:
    symptoms.write_mirror(str(tmp_path / "mirror"), "x", 0)
    assert list((tmp_path / "mirror").iterdir()) == []
    (tmp_path / "file").touch()
    answer = within(lambda: symptoms.write_mirror(str(tmp_path / "file"), "x", 0), 10)
    failing(diagnosis.mirror([answer], Places(["vm"]), str(tmp_path / "file")), "Error")


def test_memory_of_a_job(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16000000 kB\nMemFree: 1 kB\n")
    group = tmp_path / "proc/self/cgroup"
    group.write_text("0::/job/step\n")
    assert symptoms.host_memory_bytes(tmp_path, {}) == 16_000_000 * 1024
    assert symptoms.host_memory_bytes(tmp_path, {"SLURM_MEM_PER_NODE": "4000"}) == 4000 << 20
    (tmp_path / "sys/fs/cgroup/job/step").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/job/step/memory.max").write_text("max\n")
    (tmp_path / "sys/fs/cgroup/job/memory.max").write_text("2000000\n")
    assert symptoms.host_memory_bytes(tmp_path, {}) == 2_000_000
    group.write_text("4:cpu:/a\n5:memory:/job\n")
    (tmp_path / "sys/fs/cgroup/memory/job").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory/job/memory.limit_in_bytes").write_text("3000000\n")
    assert symptoms.host_memory_bytes(tmp_path, {}) == 3_000_000


def test_the_pace_of_a_run(tmp_path: Path) -> None:
    assert measured(tmp_path) == {"step_s": None, "save_s": None}
    rows = [{"kind": "train", "step": step, "attempt": 1, "step_s": step} for step in (1, 2, 9)]
    rows += [{"kind": "save", "step": 9, "attempt": 1, "seconds": 2.0, "write_s": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert measured(tmp_path) == {"step_s": 2, "save_s": 5.0}


# ------------------------------------------------------------------------------------------------ the roll call


@pytest.fixture
def lone_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[RollCall]:
    """Rank 0 of two; the other never comes."""
    previous = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", processes.environments(2)[0]["MASTER_PORT"])
    yield RollCall(World(0, 2, 0, 2), Limits(come_up_s=1, phase_s=30, slack_s=0.5), Hurry(0.5))
    signal.signal(signal.SIGTERM, previous)


def test_a_rank_that_never_comes_is_waited_for_once(lone_rank: RollCall) -> None:
    begun_s = time.monotonic()
    asked = lone_rank.ask("ranks", lambda told: {"told": told}, tell=7, limit_s=1)
    assert (asked.answers, lone_rank.silent) == ([{"told": 7}, None], {1: "ranks"})
    lone_rank.ask("clocks", lambda told: {})
    assert time.monotonic() - begun_s < 20


def test_a_launcher_that_ends_the_ranks_is_obeyed_quickly(lone_rank: RollCall) -> None:
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    asked = lone_rank.ask("shards", lambda told: {"endless": threading.Event().wait(600)})
    assert "no end" in str(asked.answers[0])
    assert lone_rank.silent == {1: "shards"}
    with pytest.raises(CutShort):
        lone_rank.ask("mirror", lambda told: {})


def test_work_that_hangs_or_raises_is_an_answer() -> None:
    def refuse() -> NoReturn:
        raise UserError("x is 3; it must be 4: set it")

    assert within(lambda: {"a": 1}, 5) == {"a": 1}
    assert within(lambda: {"endless": threading.Event().wait(600)}, 0.1) == {PROBLEM: "no end within 0.1 s"}
    assert within(refuse, 5) == {PROBLEM: "x is 3; it must be 4: set it"}
    assert within(lambda: {"a": 1 // 0}, 5) == {PROBLEM: "ZeroDivisionError: integer division or modulo by zero"}


def test_where_ranks_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUBELET_NODE", "vm")
    assert expected_nodes(World(0, 2, 0, 2)) == ["vm", "vm"]
    assert expected_nodes(World(0, 2, 0, 1)) == ["node unknown"] * 2
    monkeypatch.setenv("TUBELET_PLACES", "a*2/b*1")
    assert expected_nodes(World(0, 3, 0, 2)) == ["a", "a", "b"]


# ------------------------------------------------------------------------------------------------ the report


CHECKS = [
    Check("ranks", "ok", "4 ranks on 3 nodes, all answered"),
    Check("all-reduce", "fail", "rank 2 (node1) got a wrong sum " + 9 * "and so on ", "test the nodes", ("node1",)),
    Check("mirror", "fail", "s3://USER:SECRET@host/run?token=SECRET cannot be written", "check it", ("node1",)),
    Check("clocks", "warn", "5 s apart", "start a time service"),
]


def test_the_report_is_written_and_nodes_are_blamed(tmp_path: Path) -> None:
    from launch.blame import excluded_nodes, read_blames

    report = make_report(CHECKS, FOUR, tmp_path)
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "doctor.json").read_text()) == report
    assert (report["blamed_nodes"], report["nodes"]) == (["node1"], ["node0", "node1", "node2"])
    row = json.loads((tmp_path / "attempts/blamed.jsonl").read_text())
    assert (row["node"], row["attempt"], row["by"], row["time"]) == ("node1", None, "doctor", report["time"])
    assert "wrong sum" in row["reason"]
    assert "SECRET" not in json.dumps([report, row])
    assert [blame.node for blame in read_blames(tmp_path)] == ["node1"]
    write_report(report, tmp_path)
    assert list(excluded_nodes(tmp_path)) == ["node1"]


def test_the_report_reads_well_at_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    report = make_report(CHECKS, FOUR, tmp_path)
    text = lines(report)
    assert max(map(len, text)) <= 80
    assert text[0] == "ok    ranks       4 ranks on 3 nodes, all answered"
    assert any(line.split() == ["do", "test", "the", "nodes"] for line in text)
    assert text[-2] == "not fit: 2 of 4 checks failed, 1 warning"
    assert "blamed: node1" in text[-1]
    assert next_command(report, ["a b.yaml"], 2) == "next: tubelet doctor 'a b.yaml' --ranks 2"
    fit = make_report(CHECKS[:1], FOUR, tmp_path)
    assert (doctor.exit_code(fit), doctor.exit_code(report)) == (0, 2)
    assert next_command(fit, ["a.yaml"], 2) == "next: tubelet pretrain a.yaml --ranks 2"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert next_command(report, ["a.yaml"]).startswith("next: tubelet doctor")
    assert next_command(fit, ["a.yaml"]) == "next: tubelet submit a.yaml --nodes 3 --sbatch=--ntasks-per-node=2"
    cards = make_report(CHECKS[:1], Places(["a"] * 8 + ["b"] * 8), tmp_path, "cuda")
    assert next_command(cards, ["a.yaml", "x.y=1"]) == "next: tubelet submit a.yaml x.y=1 --nodes 2 --gpus 8"


# ------------------------------------------------------------------------------------------------ launching


def test_the_report_is_found_among_what_launchers_print(tmp_path: Path) -> None:
    printed = tmp_path / "out"
    printed.write_text('[INFO] hello\n{"a": 1}\n' + json.dumps({"checks": []}) + "\nbye\n")
    assert doctor.read_report(printed) == {"checks": []}
    printed.write_text("bye\n")
    assert doctor.read_report(printed) is None


def test_ranks_that_end_without_a_report(tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(doctor, "local_command", lambda arguments, num_ranks: [sys.executable, "-c", "exit(3)"])
    with pytest.raises(UserError, match=r"without a report \(exit code 3\)"):
        doctor.doctor(tiny_config())


@pytest.mark.parametrize(
    ("script", "lead_s"),
    [
        ("#!/bin/bash\n#SBATCH --nodes=1\n", 0),
        ("#!/bin/bash\n#SBATCH --signal=USR1@300\n", 300),
        ("#SBATCH --nodes=2 --signal=B:USR1@90\n", 0),
        ("#SBATCH --signal=RB:USR1@90\n", 0),
        ("#SBATCH --signal=R:USR1@90\n", 90),
        ("#SBATCH --signal=USR1\n", 60),
        ("# sbatch --signal=USR1@90\n", 0),
    ],
)
def test_the_lead_of_the_signal(script: str, lead_s: int | None) -> None:
    assert doctor.signal_lead_s(script) == lead_s


def test_the_lead_of_our_own_script() -> None:
    assert doctor.signal_lead_s((processes.ROOT / doctor.BATCH_SCRIPT).read_text())


def test_slurm_starts_the_ranks_of_the_allocation(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    command = doctor.srun_command(config, Path("a.yaml"), ["a.yaml", "--json"], 4, {})
    assert command[0] == "srun"
    assert {"--kill-on-bad-exit=0", "--ntasks=4"} <= set(command)
    assert command[-5:] == ["-m", "launch.node", "--doctor", "a.yaml", "--json"]
    assert doctor.srun_environment({"SLURM_CPUS_PER_TASK": "3"})["SRUN_CPUS_PER_TASK"] == "3"
    facts = doctor.slurm_facts({"TUBELET_SIGNAL_LEAD_S": "120"}, ["a", "b"], [2, 1])
    assert facts == {"TUBELET_PLACES": "a*2/b*1"}
    monkeypatch.setattr(doctor, "script_facts", lambda job: {"TUBELET_SCRIPT_LEAD_S": "240"})
    assert doctor.slurm_facts({}, ["a"], [1]) == {"TUBELET_PLACES": "a*1", "TUBELET_SCRIPT_LEAD_S": "240"}
    assert doctor.slurm_facts({"TUBELET_SCRIPT_LEAD_S": "9"}, [], []) == {}


@pytest.mark.parametrize(
    ("shown", "facts"),
    [
        ("#!/bin/sh\n#SBATCH --signal=USR1@240\n", {"TUBELET_SCRIPT_LEAD_S": "240"}),
        ("", {"TUBELET_SCRIPT_LEAD_S": "300", "TUBELET_SCRIPT": "slurm/pretrain.sh"}),
    ],
    ids=["sbatch", "salloc"],
)
def test_the_script_that_was_read_is_named(
    shown: str, facts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, shown, ""))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm").mkdir()
    (tmp_path / doctor.BATCH_SCRIPT).write_text("#!/bin/sh\n#SBATCH --signal=USR1@1\n")  # not the one of the project
    assert doctor.script_facts("7") == facts


ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "two", "SLURM_TASKS_PER_NODE": "2(x2)"}


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocation of two nodes, whose names this machine knows."""
    monkeypatch.setattr(doctor, "hostnames", lambda nodes: {"two": ["localhost", "127.0.0.1"]}[nodes])
    monkeypatch.setattr(doctor, "script_facts", lambda job: {"TUBELET_SCRIPT_LEAD_S": "240"})
    monkeypatch.setattr(doctor, "free_port", lambda port: port)


@pytest.mark.usefixtures("two_hosts")
def test_ranks_in_a_container_need_not_ask_slurm(
    tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image.sif"
    image.touch()
    file = tiny_config(**{"launch.container": str(image), "launch.interface": "lo"})
    command = doctor.srun_command(load_config(file), file, [str(file), "--json"], None, ALLOCATION)
    [exported] = [word for word in command if word.startswith("--export=")]
    facts = "ALL,TUBELET_HOSTS=localhost/127.0.0.1,TUBELET_PORT=15007,TUBELET_PLACES=localhost*2/127.0.0.1*2,"
    assert exported == f"--export={facts}TUBELET_SCRIPT_LEAD_S=240,TUBELET_INTERFACE=lo"
    inside = command[command.index(str(image)) + 1 :]
    assert inside[-6:] == ["python", "-m", "launch.node", "--doctor", str(file), "--json"]

    # The rank that this line starts in there, where no program of Slurm is.
    became: list[Any] = []
    step = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "two"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "PATH": str(tmp_path)}
    step |= dict(word.split("=") for word in exported.split(",")[1:])
    for name, value in (ALLOCATION | step).items():
        monkeypatch.setenv(name, value)
    for number, word in enumerate(inside):
        if word == "-u":
            monkeypatch.delenv(inside[number + 1])
    monkeypatch.setattr(os, "execve", lambda *call: became.append(call))
    previous = signal.getsignal(signal.SIGUSR1)
    node.main(inside[inside.index("--doctor") :])
    signal.signal(signal.SIGUSR1, previous)
    [(_, _, env)] = became
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["GLOO_SOCKET_IFNAME"]) == ("localhost", "15007", "lo")
    assert env["TUBELET_PLACES"] == "localhost*2/127.0.0.1*2"


@pytest.mark.usefixtures("two_hosts")
def test_ranks_outside_a_container_keep_the_names_of_the_step(config: Config) -> None:
    command = doctor.srun_command(config, Path("a.yaml"), ["a.yaml"], None, ALLOCATION)
    assert any("TUBELET_HOSTS=localhost/127.0.0.1" in word for word in command)
    assert "env" not in command


def test_srun_becomes_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[Any] = []
    slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "vm0", "TUBELET_SIGNAL_LEAD_S": "9"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(node, "hostnames", lambda nodes: [nodes])
    monkeypatch.setattr(os, "execve", lambda *call: became.append(call))
    previous = signal.getsignal(signal.SIGUSR1)
    node.main(["--doctor", "a.yaml", "train.steps=3", "--json"])
    signal.signal(signal.SIGUSR1, previous)
    [(_, words, env)] = became
    assert words[-5:] == ["-m", "pretrain.doctor", "a.yaml", "train.steps=3", "--json"]
    assert (env["RANK"], env["WORLD_SIZE"], env["TUBELET_PLACES"]) == ("0", "2", "vm0*2")


# ------------------------------------------------------------------------------------------------ real ranks


@pytest.mark.slow
def test_two_ranks_that_are_fit(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config = tiny_config(**{"checkpoint.mirror": str(tmp_path / "mirror")})
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    command = [sys.executable, "-m", "launch.cli", "doctor", str(config), "--ranks", "2", "--json"]
    done = subprocess.run(
        command, cwd=processes.ROOT, env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    names = ["ranks", "versions", "config", "run folder", "space", "clocks", "memory", "all-reduce", "shards", "mirror"]
    assert [(check["name"], check["level"]) for check in report["checks"]] == [(name, "ok") for name in names]
    assert (report["world_size"], len(report["nodes"]), report["blamed_nodes"]) == (2, 1, [])
    assert json.loads((tmp_path / "run" / "doctor.json").read_text()) == report
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["doctor.json"]


SICK = """\
import os, signal, sys, time
from pretrain import doctor, symptoms
from pretrain.patience import Limits

rank = int(os.environ["RANK"])
os.environ |= {"TUBELET_NODE": f"node{rank}", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
symptoms.REDUCED_BYTES = (64 << 10,)
clock, add = time.time, symptoms.contribution
if rank == 1:
    time.time = lambda: clock() + 30
    symptoms.write_mirror = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
if rank == 2:
    symptoms.PACKAGES = (*symptoms.PACKAGES, "another")
    symptoms.contribution = lambda rank, numel: add(rank, numel) + 1
doctor.main(limits=Limits(come_up_s=90, phase_s=8, slack_s=2))
"""


@pytest.mark.slow
def test_three_ranks_that_are_not(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """Rank 1 has a wrong clock and hangs at the mirror; rank 2 has other packages and adds up wrong numbers."""
    config = tiny_config(**{"checkpoint.mirror": str(tmp_path / "mirror")})
    started = processes.start(["-c", SICK, str(config)], 3)
    try:
        printed = started[0].communicate(timeout=120)[0]
    finally:
        processes.kill(started)
    assert started[0].returncode == 2, printed
    report = json.loads((tmp_path / "run" / "doctor.json").read_text())
    found = {check["name"]: check for check in report["checks"]}
    assert {name: check["level"] for name, check in found.items() if check["level"] != "ok"} == {
        "ranks": "fail",
        "versions": "fail",
        "clocks": "warn",
        "all-reduce": "fail",
    }
    assert "rank 1 (node1) fell silent in mirror" in found["ranks"]["seen"]
    assert "rank 2 (node2): another missing, most have none" in found["versions"]["seen"]
    assert "rank 1 (node1) ahead of" in found["clocks"]["seen"]
    assert "wrong sum" in found["all-reduce"]["seen"]
    assert report["blamed_nodes"] == ["node1", "node2"]
    assert "next: tubelet doctor" in printed
    rows = (tmp_path / "run" / "attempts" / "blamed.jsonl").read_text().splitlines()
    assert [json.loads(row)["node"] for row in rows] == ["node1", "node2"]
