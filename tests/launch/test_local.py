"""launch/local.py: the real deepspeed launcher with a small stand-in for the trainer, so that a start takes seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local
from shards.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "demo.yaml")

TRAINER = '''\
"""Stand-in for pretrain.train: writes its place and its outcome as the trainer does, then does as it is told."""
import json, os, signal, sys, time
from pathlib import Path

run = Path(next(word for word in sys.argv if word.startswith("run.dir=")).removeprefix("run.dir="))
rank = int(os.environ.get("RANK", "0"))
told = os.environ["STAND_IN"]
names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE MASTER_ADDR MASTER_PORT TUBELET_START".split()
place = {name: os.environ.get(name) for name in names} | {"argv": sys.argv[1:], "pid": os.getpid()}

def end(outcome, code):
    if rank == 0:
        (run / "attempts/0001.outcome.json").write_text(json.dumps({"outcome": outcome, "step": 1, "reason": told}))
    sys.exit(code)

def stop(number, frame):
    (run / f"signal-{rank}").write_text(str(number))
    time.sleep(1)  # saving
    end("stopped", 75)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
if rank == 0 and told != "refuse":
    token = os.environ["TUBELET_START"].partition(":")[2]
    (run / "attempts/0001.json").write_text(json.dumps({"start": token}))
(run / f"rank-{rank}.tmp").write_text(json.dumps(place))
(run / f"rank-{rank}.tmp").rename(run / f"rank-{rank}.json")
if told == "hang":
    time.sleep(600)
if told == "refuse":
    sys.exit(93)
if told == "lose-launcher":
    if rank == 0:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(2)
    os._exit(75)
end(told, {"finished": 0, "person": 93}.get(told, 75))
'''

START = """\
import sys
sys.path.insert(0, {root!r})
from launch.local import pretrain
sys.path.pop(0)
sys.exit(pretrain({config!r}, ["run.dir={run}"], {ranks}))
"""


class StandIn:
    """A folder in which `python -m pretrain.train` is the stand-in, and a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        (self.run / "attempts").mkdir(parents=True)
        (folder / "pretrain").mkdir()
        (folder / "pretrain" / "train.py").write_text(TRAINER)

    def start(self, told: str, ranks: int) -> subprocess.Popen[str]:
        """tubelet's own process, in a process group of its own."""
        program = START.format(root=str(ROOT), config=CONFIG, run=self.run, ranks=ranks)
        return subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=self.folder,
            env={**os.environ, "STAND_IN": told},
            start_new_session=True,
            text=True,
            stderr=subprocess.PIPE,
        )

    def finish(self, told: str, ranks: int) -> int:
        with self.start(told, ranks) as process:
            process.communicate(timeout=120)
            return process.returncode

    def place(self, rank: int, timeout_s: float = 60) -> dict[str, str]:
        """What a rank found in its environment, once it is up."""
        file = self.run / f"rank-{rank}.json"
        wait_until(file.exists, timeout_s)
        return json.loads(file.read_text())


def wait_until(ready: object, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline_s, f"not ready after {timeout_s} s"
        time.sleep(0.05)


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


@pytest.mark.parametrize(
    ("told", "code"), [("finished", 0), ("stopped", 75), ("failed", 75), ("person", 93), ("refuse", 93)]
)
def test_one_rank_is_a_plain_child(stand_in: StandIn, told: str, code: int) -> None:
    assert stand_in.finish(told, 1) == code
    place = stand_in.place(0)
    assert place["RANK"] is None
    assert place["argv"] == [CONFIG, f"run.dir={stand_in.run}"]


@pytest.mark.slow
def test_several_ranks_come_up_through_deepspeed(stand_in: StandIn) -> None:
    assert stand_in.finish("finished", 2) == 0
    places = [stand_in.place(rank) for rank in range(2)]
    assert [(p["RANK"], p["LOCAL_RANK"]) for p in places] == [("0", "0"), ("1", "1")]
    assert {(p["WORLD_SIZE"], p["LOCAL_SIZE"], p["MASTER_ADDR"]) for p in places} == {("2", "2", "127.0.0.1")}
    assert len({p["MASTER_PORT"] for p in places}) == 1
    assert all(p["argv"] == [CONFIG, f"run.dir={stand_in.run}"] for p in places)


@pytest.mark.slow
def test_a_launcher_that_loses_its_child_is_not_believed(stand_in: StandIn) -> None:
    """deepspeed's runner exits 0 when the process that polls the ranks is killed, as the out-of-memory killer does."""
    assert stand_in.finish("lose-launcher", 2) == 75


@pytest.mark.slow
def test_sigterm_reaches_every_rank_and_is_waited_for(stand_in: StandIn) -> None:
    with stand_in.start("hang", 2) as process:
        pids = [int(stand_in.place(rank)["pid"]) for rank in range(2)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
        assert [(stand_in.run / f"signal-{rank}").read_text() for rank in range(2)] == ["15", "15"]
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_ctrl_c_reaches_every_rank_and_is_waited_for(stand_in: StandIn) -> None:
    """A terminal signals the whole process group: launchers in between must not die first."""
    with stand_in.start("hang", 2) as process:
        pids = [int(stand_in.place(rank)["pid"]) for rank in range(2)]
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 75
        assert all((stand_in.run / f"signal-{rank}").exists() for rank in range(2))
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_a_second_signal_kills(stand_in: StandIn) -> None:
    with stand_in.start("hang", 2) as process:
        place = stand_in.place(1)
        process.send_signal(signal.SIGTERM)
        wait_until((stand_in.run / "signal-1").exists, 20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
        assert not local.marked(place["TUBELET_START"])


@pytest.mark.slow
def test_killing_the_process_group_leaves_nothing(stand_in: StandIn) -> None:
    with stand_in.start("hang", 2) as process:
        place = stand_in.place(1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        wait_until(lambda: not local.marked(place["TUBELET_START"]), 10)


def test_a_signal_before_any_rank_is_up_ends_the_start(stand_in: StandIn) -> None:
    with stand_in.start("hang", 2) as process:
        wait_until(lambda: marked_child(process.pid), 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    assert not (stand_in.run / "rank-0.json").exists()


def marked_child(pid: int) -> bool:
    """Whether a process has a child that carries a mark: then its start is under way."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            words = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.startswith(f"{local.MARK}={pid}:".encode()) for word in words):
            return True
    return False


@pytest.mark.parametrize("ranks", [0, 1000])
def test_more_ranks_than_clips_are_refused(ranks: int) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch"):
        local.pretrain(CONFIG, [], ranks)


def test_a_config_with_problems_starts_nothing() -> None:
    with pytest.raises(UserError, match=r"train\.steps"):
        local.pretrain(CONFIG, ["train.steps=0"], 2)


def test_what_the_ranks_inherit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    env = local.environment(2)
    assert (env["OMP_NUM_THREADS"], env["DS_ACCELERATOR"]) == ("4", "cpu")
    assert "RANK" not in env
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert local.environment(16)["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("visible", "number"), [("", 0), ("-1", 0), ("0", 1), ("0,3", 2), ("GPU-1f, GPU-2a", 2)])
def test_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch, visible: str, number: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local.num_gpus() == number
    assert local.default_ranks() == max(1, number)


def test_ports_are_free_and_differ() -> None:
    assert len({local.free_port() for _ in range(5)}) > 1
