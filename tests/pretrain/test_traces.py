"""Which checkpoints have seen a sample: every kind of history must give the answer that its ledger gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain import checkpoint
from pretrain.checkpoint import Facts
from pretrain.ledger import ROW_DTYPE, LineageHead, Segment, commit_lineage
from pretrain.traces import Seen, find_runs, trace_runs
from shards.errors import UserError

OURS, OTHER = "a" * 64, "b" * 64
Steps = dict[int, list[int]]


class Run:
    """A run folder with checkpoints, written by hand: steps -> the samples that they consumed."""

    def __init__(self, folder: Path, *, split: str = "train", init_from: Path | None = None) -> None:
        self.folder = folder
        self.head: LineageHead | None = None
        self.begin = 0
        self.config = {
            "data": {"split": split, "shards": "data/x"},
            "train": {"init_from": None if init_from is None else str(init_from)},
        }
        self.cursor: dict[str, Any] = {"manifest_hash": OURS}

    def save(self, end: int, steps: Steps, attempt: int = 1) -> Path:
        """The checkpoint of step `end`, after these steps."""
        rows = np.zeros(sum(map(len, steps.values())), ROW_DTYPE)
        rows["step"] = [step for step, samples in steps.items() for _ in samples]
        rows["sample"] = [sample for samples in steps.values() for sample in samples]
        ledger = self.folder / "ledger"
        ledger.mkdir(parents=True, exist_ok=True)
        name = f"a{attempt:04d}-s{self.begin:08d}-r00000.rows"
        (ledger / name).write_bytes(rows.tobytes())
        segment = Segment(name, len(rows), "")
        self.head = commit_lineage(ledger, end, attempt, [segment], self.head)
        staging = checkpoint.staging_folder(self.folder, end, attempt)
        checkpoint.write_part(staging, 0, [("w", "fp32", 0, torch.zeros(1))], [segment])
        facts = Facts(end, end, attempt, self.cursor, self.config, {"w": [1]}, {}, [])
        checkpoint.stage(staging, facts, checkpoint.read_parts(staging, 1)[0], self.head)
        self.begin = end
        return checkpoint.publish(staging, end)


def seen(run: Run | Path, samples: set[int], split: str = "train") -> list[Seen]:
    folder = run if isinstance(run, Path) else run.folder
    (trace,) = trace_runs([folder], "data/ours", {OURS}, {split: samples})
    return list(trace.checkpoints)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path / "runs" / "one")
    made.save(2, {0: [5, 6], 1: [7, 8]})
    made.save(4, {2: [9, 5], 3: [1, 2]})
    return made


def test_each_checkpoint_says_what_it_has_seen_and_when_first(run: Run) -> None:
    first, second = seen(run, {9, 5})
    assert (first.step, first.num_samples, first.num_clips, first.first_steps) == (2, 1, 1, {5: 0})
    assert (second.step, second.num_samples, second.num_clips, second.first_steps) == (4, 2, 3, {5: 0, 9: 2})
    first, second = seen(run, {1})
    assert (first.num_samples, second.first_steps) == (0, {1: 3})
    assert [one.num_samples for one in seen(run, {100})] == [0, 0]
    assert "has seen none of them" in seen(run, {100})[0].line(1)
    assert "has SEEN 2 of 3, first in step 0 (3 clips)" in seen(run, {9, 5, 100})[1].line(3)


def test_work_that_no_checkpoint_stands_on_does_not_count(run: Run) -> None:
    rows = np.zeros(1, ROW_DTYPE)
    rows["sample"] = 77
    (run.folder / "ledger" / "a0002-s00000004-r00000.rows").write_bytes(rows.tobytes())
    assert [one.num_samples for one in seen(run, {77})] == [0, 0]


def test_other_data_and_other_splits_are_not_confused(tmp_path: Path, run: Run) -> None:
    other = Run(tmp_path / "other")
    other.cursor = {"manifest_hash": OTHER}
    other.save(2, {0: [5]})
    (trace,) = trace_runs([other.folder], "data/ours", {OURS}, {"train": {5}})
    assert trace.checkpoints == ()
    assert trace.lines(1) == [f"{other.folder}: was not trained on this data set"]
    assert [one.num_samples for one in seen(run, {5}, split="val")] == [0, 0]


@pytest.mark.parametrize("shards", ["data/ours", "data/ours/manifest.json", [{"url": "a"}, {"url": "./data/ours/"}]])
def test_a_data_set_that_was_replaced_where_it_lay_is_no_all_clear(tmp_path: Path, shards: Any) -> None:
    """Repaired, or packed anew: the numbers in the ledger are of other samples, so nothing can be said."""
    run = Run(tmp_path / "run")
    run.config["data"] = {"split": "train", "shards": shards}
    run.cursor = {"manifest_hash": OTHER}
    run.save(2, {0: [5]})
    assert "was another data set then (manifest bbbbbbbbbbbb)" in seen(run, {5})[0].line(1)


def test_a_data_set_that_grew_is_known_by_what_it_was(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.cursor = {"manifest_hash": OTHER, "sources": [[[0, OURS, 10], [40, OTHER, 20]]]}
    run.save(2, {0: [5]})
    assert seen(run, {5})[0].num_samples == 1


def test_a_source_among_several_is_told_by_its_number(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.cursor = {"manifest_hash": "of all", "sources": [[[0, OTHER, 10]], [[0, OURS, 10]]]}
    run.save(2, {0: [5, 1 << 40 | 6], 1: [1 << 40 | 5]})
    assert seen(run, {5})[0].first_steps == {5: 1}
    assert seen(run, {6})[0].first_steps == {6: 0}


def test_weights_remember_what_they_were_started_from(tmp_path: Path, run: Run) -> None:
    second = Run(tmp_path / "two", init_from=run.folder)
    second.save(2, {0: [3]})
    third = Run(tmp_path / "three", init_from=tmp_path / "two" / "checkpoints" / "step-000002")
    third.cursor = {"manifest_hash": OTHER}
    third.save(2, {0: [9]})
    (found,) = seen(third, {9})
    assert (found.checkpoint, found.step, found.num_samples, found.first_steps) == ("step-000002", 2, 1, {9: 2})
    assert found.through == str(run.folder)
    assert f"through {run.folder}" in found.line(1)
    assert seen(third, {3})[0].through == str(tmp_path / "two" / "checkpoints" / "step-000002")
    assert not any(one.num_samples or one.unknown for one in seen(third, {100}))


def test_what_cannot_be_known_is_said(tmp_path: Path, run: Run) -> None:
    (tmp_path / "export").mkdir()
    started = Run(tmp_path / "two", init_from=tmp_path / "export")
    started.save(2, {0: [3]})
    assert "which has no ledger" in seen(started, {9})[0].line(1)
    assert seen(started, {3})[0].num_samples == 1
    (run.folder / "ledger" / "a0001-s00000002-r00000.rows").write_bytes(b"")
    first, second = seen(run, {5})
    assert (first.num_samples, first.unknown) == (1, "")
    assert "is not the file that was committed" in second.line(1)
    (run.folder / "checkpoints" / "step-000002" / "manifest.json").write_text("{")
    assert "cannot be said" in seen(run, {5})[0].line(1)
    link = next((run.folder / "ledger").glob("lineage-s00000004*"))
    link.write_text(link.read_text() + " ")
    assert "was changed after it was committed" in seen(run, {5})[1].unknown


def test_runs_are_found_by_their_checkpoints(tmp_path: Path, run: Run) -> None:
    two = Run(tmp_path / "runs" / "two")
    two.save(1, {0: [1]})
    (tmp_path / "runs" / "no run").mkdir()
    assert find_runs([tmp_path / "runs"]) == [run.folder, two.folder]
    assert find_runs([two.folder, tmp_path / "runs"]) == [two.folder, run.folder]
    with pytest.raises(UserError, match=r"--runs is .*no run; it must be a run folder with checkpoints"):
        find_runs([tmp_path / "runs" / "no run"])
