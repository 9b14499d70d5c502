"""Who is at fault, and that a hang ends with a name."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pretrain.watchdog import Hang, verdict

ROOT = Path(__file__).resolve().parents[2]


def hang(rank: int, *, is_waiting: bool) -> Hang:
    return Hang(rank, "step", 9.0, is_waiting, "train.py:1 in take")


def test_the_one_that_waits_for_nobody_is_at_fault() -> None:
    text, blamed = verdict([hang(0, is_waiting=True), hang(1, is_waiting=False), hang(2, is_waiting=True)], 3)
    assert blamed == (1,)
    assert "rank 1 at train.py:1 in take" in text
    assert "limits.step_limit_s (9 s)" in text


def test_the_one_without_a_word_is_at_fault() -> None:
    text, blamed = verdict([hang(0, is_waiting=True), hang(2, is_waiting=True)], 3)
    assert blamed == (1,)
    assert "rank 1, without a word" in text


def test_where_all_wait_nobody_is_at_fault() -> None:
    assert verdict([hang(0, is_waiting=True), hang(1, is_waiting=True)], 2)[1] == ()


def test_where_nobody_waits_nobody_is_singled_out() -> None:
    assert verdict([hang(0, is_waiting=False), hang(1, is_waiting=False)], 2)[1] == ()


@pytest.mark.parametrize(
    ("hangs", "code"),
    [("import time; time.sleep(600)", 75), ("import ctypes; ctypes.PyDLL(None).sleep(600)", 1)],
    ids=["in Python", "with the interpreter held"],
)
def test_a_hang_ends_with_stacks_and_a_name(tmp_path: Path, hangs: str, code: int) -> None:
    (tmp_path / "attempts").mkdir()
    program = f"""
    from pathlib import Path
    from pretrain import watchdog
    from pretrain.sections import LimitsConfig
    from pretrain.world import World
    watchdog.GRACE_S = 0.2
    limits = LimitsConfig(step_limit_s=0.3)
    with watchdog.Watchdog(Path({str(tmp_path)!r}), 4, World(), limits).part("step"):
        {hangs}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "File" in done.stderr, "no stacks"
    if code == 75:
        outcome = json.loads((tmp_path / "attempts" / "0004.outcome.json").read_text())
        assert outcome["outcome"] == "failed"
        assert outcome["blamed"] == [0]
        assert "limits.step_limit_s (0.3 s)" in outcome["reason"]


def test_what_ends_in_time_is_left_alone(tmp_path: Path) -> None:
    program = f"""
    import time
    from pathlib import Path
    from pretrain import watchdog
    from pretrain.sections import LimitsConfig
    from pretrain.world import World
    watchdog.GRACE_S = 0.1
    dog = watchdog.Watchdog(Path({str(tmp_path)!r}), 1, World(), LimitsConfig(step_limit_s=0.4))
    for _ in range(4):
        with dog.part("step"):
            time.sleep(0.15)
    dog.enter("step")
    dog.enter("save")
    dog.leave()
    time.sleep(0.8)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0
