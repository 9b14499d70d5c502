from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pretrain.metrics import read_metrics, read_rows
from pretrain.sections import TrackConfig
from pretrain.track import Tracker

OFF = TrackConfig()
OFFLINE = TrackConfig(wandb="offline")


def train_rows(tracker: Tracker, steps: range, loss: float = 1.0) -> None:
    for step in steps:
        tracker.write({"kind": "train", "step": step, "loss": loss, "lr": 0.1})


# ---- metrics.jsonl


def test_rows_are_on_disk_at_once_with_attempt_and_time(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 3, OFF)
    tracker.write({"kind": "train", "step": 1, "loss": 2.5})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (row["kind"], row["step"], row["loss"], row["attempt"]) == ("train", 1, 2.5, 3)
    assert row["time"] > 1e9
    tracker.write({"kind": "save", "step": 1, "seconds": 0.5})
    assert [row["kind"] for row in read_rows(tmp_path)] == ["train", "save"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 1, OFFLINE, is_first=False)
    train_rows(tracker, range(1, 3))
    tracker.publish(2)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_line_torn_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    train_rows(Tracker(tmp_path, 1, OFF), range(1, 4))
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    train_rows(Tracker(tmp_path, 2, OFF), range(3, 5))
    assert [(row["attempt"], row["step"]) for row in read_rows(tmp_path)] == [(1, 1), (1, 2), (2, 3), (2, 4)]


def test_numbers_that_are_not_finite_stay_valid_json_and_are_named(tmp_path: Path) -> None:
    Tracker(tmp_path, 1, OFF).write({"kind": "train", "step": 1, "loss": float("nan"), "lr": 0.1, "grad": float("inf")})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["loss"], row["grad"], row["lr"]) == (None, None, 0.1)
    assert row["not_finite"] == ["loss", "grad"]
    Tracker(tmp_path, 1, OFF).write({"kind": "train", "step": 2, "ranks/compute_s": [0.5, float("nan")]})
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=refuse)
    assert (row["ranks/compute_s"], row["not_finite"]) == ([0.5, None], ["ranks/compute_s"])


def test_unwritable_file_is_told_once_counted_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    tracker = Tracker(tmp_path, 1, OFF)
    with caplog.at_level(logging.WARNING):
        train_rows(tracker, range(1, 4))
    assert tracker.num_unwritten == 3
    assert [record.message for record in caplog.records] == [
        "metrics.jsonl cannot be written (Is a directory); training goes on, rows are lost"
    ]


def test_later_attempt_wins_where_steps_were_done_again(tmp_path: Path) -> None:
    first = Tracker(tmp_path, 1, OFF)
    first.write({"kind": "start", "step": 0})
    train_rows(first, range(1, 7), loss=1.0)
    first.write({"kind": "eval", "step": 4, "loss": 9.0})
    second = Tracker(tmp_path, 2, OFF)
    second.write({"kind": "start", "step": 4})
    train_rows(second, range(5, 6), loss=2.0)
    rows = [row for row in read_metrics(tmp_path) if row["kind"] == "train"]
    # steps 5, 6 of the first attempt were abandoned; 6 was not yet reached again
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0)]
    assert [row["kind"] for row in read_metrics(tmp_path) if row["kind"] != "train"] == ["start", "eval", "start"]


def test_what_happened_to_the_run_is_never_taken_back(tmp_path: Path) -> None:
    first = Tracker(tmp_path, 1, OFF)
    first.write({"kind": "start", "step": 0})
    for step in (5, 5, 9):
        first.write({"kind": "event", "step": step, "event": "skipped", "reason": "not finite"})
    Tracker(tmp_path, 2, OFF).write({"kind": "start", "step": 4})
    assert [row["step"] for row in read_metrics(tmp_path) if row["kind"] == "event"] == [5, 5, 9]


def test_no_metrics_is_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
