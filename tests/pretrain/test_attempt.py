from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.attempt import (
    Outcome,
    Superseded,
    attempt_of,
    newest_attempt,
    read_outcome,
    read_refusal,
    record_outcome,
    record_refusal,
    refuse_superseded,
    take_attempt,
)


def test_numbers_are_never_shared(tmp_path: Path) -> None:
    assert newest_attempt(tmp_path) == 0
    assert [take_attempt(tmp_path, ["a", "b"]) for _ in range(3)] == [1, 2, 3]
    assert json.loads((tmp_path / "attempts" / "0002.json").read_text())["world_size"] == 2


def test_the_first_word_counts(tmp_path: Path) -> None:
    attempt = take_attempt(tmp_path, ["a"])
    assert read_outcome(tmp_path) is None
    assert record_outcome(tmp_path, attempt, Outcome("failed", 3, "a rank died"))
    assert not record_outcome(tmp_path, attempt, Outcome("stopped", 3, "the others were told to stop"))
    assert read_outcome(tmp_path) == Outcome("failed", 3, "a rank died")


def test_exit_codes() -> None:
    assert [Outcome(kind, 0, "").exit_code for kind in ("finished", "stopped", "failed", "person")] == [0, 75, 75, 93]


def test_an_outcome_belongs_to_its_attempt(tmp_path: Path) -> None:
    record_outcome(tmp_path, take_attempt(tmp_path, ["a"]), Outcome("stopped", 3, "a signal"))
    take_attempt(tmp_path, ["a"])
    assert read_outcome(tmp_path) is None


def test_an_older_attempt_is_refused(tmp_path: Path) -> None:
    first = take_attempt(tmp_path, ["a"])
    refuse_superseded(tmp_path, first)
    take_attempt(tmp_path, ["a"])
    with pytest.raises(Superseded, match="found attempt 2 at work"):
        refuse_superseded(tmp_path, first)


def test_a_torn_outcome_is_none(tmp_path: Path) -> None:
    attempt = take_attempt(tmp_path, ["a"])
    (tmp_path / "attempts" / f"{attempt:04d}.outcome.json").write_text('{"outcome": "fin')
    assert read_outcome(tmp_path) is None


def test_a_start_finds_its_own_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts on one run: each decides from its own outcome, not from the newest."""
    for token in ("first", "second", "first"):
        monkeypatch.setenv("TUBELET_START", f"0:{token}")
        take_attempt(tmp_path, ["a"])
    assert attempt_of(tmp_path, "first", since=0) == 3
    assert attempt_of(tmp_path, "second", since=0) == 2
    assert attempt_of(tmp_path, "second", since=2) is None
    assert attempt_of(tmp_path, "third", since=0) is None


def test_an_outcome_holds_no_password(tmp_path: Path) -> None:
    record_outcome(
        tmp_path, take_attempt(tmp_path, ["a"]), Outcome("failed", 0, "s3://me:CANARY@host/x?key=CANARY is gone")
    )
    assert "CANARY" not in (tmp_path / "attempts" / "0001.outcome.json").read_text()


def test_a_refusal_is_found_by_its_start_and_takes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUBELET_START", raising=False)
    record_refusal(tmp_path, "nobody asks")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("TUBELET_START", "0:mine")
    record_refusal(tmp_path, "s3://me:CANARY@host/x is gone")
    assert newest_attempt(tmp_path) == 0
    assert read_refusal(tmp_path, "mine") == Outcome("person", 0, "s3://host/x is gone")
    assert read_refusal(tmp_path, "other") is None
