"""Decisions survive kills, and are obeyed for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.decisions import NAME, Decisions, RolledBack, Skipped, read_decisions, withheld_steps
from shards.errors import UserError

SKIP = Skipped(7, "not finite: loss of samples 3", (3,))
BACK = RolledBack(at=20, to=10, first=15, stop=20, reason="a spike", attempt=2)


def written(folder: Path) -> Decisions:
    decisions = Decisions(folder, is_writer=True)
    decisions.add(SKIP)
    decisions.add(BACK)
    return decisions


def test_a_later_attempt_finds_them(tmp_path: Path) -> None:
    written(tmp_path)
    found = Decisions(tmp_path, is_writer=False)
    assert (found.skips, found.rollbacks) == ([SKIP], [BACK])
    assert [step for step in range(25) if found.is_withheld(step)] == [7, 15, 16, 17, 18, 19]
    assert withheld_steps(tmp_path) == [(7, 8, SKIP.reason), (15, 20, "a spike")]


def test_other_ranks_decide_the_same_and_write_nothing(tmp_path: Path) -> None:
    decisions = Decisions(tmp_path, is_writer=False)
    decisions.add(SKIP)
    assert decisions.is_withheld(7)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_of_what_was_rolled_back_are_void(tmp_path: Path) -> None:
    decisions = written(tmp_path)
    assert decisions.is_void(12, attempt=2)
    assert decisions.is_void(12, attempt=1)
    assert not decisions.is_void(10, attempt=2), "the one it went back to"
    assert not decisions.is_void(12, attempt=3), "made afterwards"


def test_a_torn_end_was_never_obeyed_and_spoils_nothing(tmp_path: Path) -> None:
    written(tmp_path)
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[:-5])
    decisions = Decisions(tmp_path, is_writer=True)
    assert decisions.rollbacks == []
    decisions.add(BACK)
    assert (tmp_path / NAME).read_bytes() == whole


@pytest.mark.parametrize("line", ["no json", "[]", '{"kind": "other"}', '{"kind": "skipped", "step": 1}'])
def test_a_damaged_line_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / NAME).write_text(line + "\n")
    with pytest.raises(UserError, match=r"line 1 of .*decisions\.jsonl"):
        list(read_decisions(tmp_path))


def test_the_ladder_goes_on_from_skips_that_were_not_rolled_back_over(tmp_path: Path) -> None:
    decisions = written(tmp_path)
    for step in (12, 16, 30):
        decisions.add(Skipped(step, "not finite"))
    assert decisions.skips_before(30) == [7, 12]
