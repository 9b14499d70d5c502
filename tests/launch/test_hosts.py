"""The README's lines for several machines, over a real sshd on two addresses: one run, whatever starts or kills it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.handed_on import assert_same_end, config, hand_on, started, undisturbed
from tests.launch.hosts import ROOT, Hosts, Start, parent, send, wait_for

__all__ = ["config", "undisturbed"]  # fixtures

pytestmark = pytest.mark.slow

STAND_IN = """\
import os, sys, time
from pathlib import Path
from pretrain.stop import watch_parents

watch_parents(poll_s=0.1)
up = Path(sys.argv[-1].removeprefix("run.dir=")) / os.environ["RANK"]
up.write_text(os.environ.get("OMP_NUM_THREADS", "did not travel"))
time.sleep(600)
"""
"""A rank that does nothing, prints nothing and asks nobody: only watching can tell it that its launcher is gone."""


def test_killed_under_two_launchers_and_finished_by_a_third(
    hosts: Hosts, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """In tests/full every launcher is killed, and every one finishes a run."""
    assert_same_end(hand_on(hosts, config, tmp_path / "run", ["no ssh", "torchrun", "ssh"]), undisturbed)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A project folder in which `pretrain.train` is the stand-in, with an empty run folder."""
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "__init__.py").write_text(
        f"import sys\nsys.path.append({str(ROOT)!r})\n__path__.append({str(ROOT / 'pretrain')!r})\n"
    )
    (tmp_path / "pretrain" / "train.py").write_text(STAND_IN)
    (tmp_path / "run").mkdir()
    return tmp_path


def deepspeed(start: Start) -> int:
    return start.launchers[0].pid


def pdsh(start: Start) -> int:
    return start.processes(b"pdsh\0")[0]


def sshd_of_second_host(start: Start) -> int:
    return parent(parent(start.ranks()[1]))


@pytest.mark.parametrize(("victim", "survivors"), [(deepspeed, 0), (pdsh, 0), (sshd_of_second_host, 1)])
def test_a_rank_notices_by_itself(hosts: Hosts, stand_in: Path, victim: Callable[[Start], int], survivors: int) -> None:
    run = stand_in / "run"
    with started(hosts, "ssh", Path("any.yaml"), run, cwd=stand_in) as start:
        wait_for(lambda: all((run / rank).exists() and (run / rank).read_text() for rank in "01"), 60, start.why)
        assert [(run / rank).read_text() for rank in "01"] == ["1", "1"], "~/.deepspeed_env says 1"
        send([victim(start)], signal.SIGKILL)
        wait_for(lambda: len(start.ranks()) == survivors, 5, start.why)


def test_a_rank_notices_what_was_killed_before_it_began(hosts: Hosts, stand_in: Path) -> None:
    run = stand_in / "run"
    with started(hosts, "ssh", Path("any.yaml"), run, cwd=stand_in) as start:
        wait_for(lambda: bool(start.processes(b"pdsh\0")), 60, start.why)
        send([deepspeed(start)], signal.SIGKILL)
        wait_for((run / "1").exists, 60, start.why)
        wait_for(lambda: not start.ranks(), 5, start.why)
