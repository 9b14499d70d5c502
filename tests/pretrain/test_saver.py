"""Saves in the background: two ranks in one process, real files, disks that refuse."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint, saver
from pretrain.attempt import Superseded, take_attempt
from pretrain.checkpoint import Checkpoint, Facts, candidates, newest
from pretrain.ledger import Ledger, walk_lineage
from pretrain.saver import Saver, Settled
from pretrain.sections import CheckpointConfig
from pretrain.world import World
from tests.pretrain.test_audit import Clip, batch_of

SHAPES = {"a.weight": [6], "b.bias": [4]}


@dataclass
class Ranks:
    """Two ranks of one attempt; `tensors` is what they train."""

    run_dir: Path
    settings: CheckpointConfig = field(default_factory=CheckpointConfig)
    now: list[float] = field(default_factory=lambda: [1000.0])

    def __post_init__(self) -> None:
        for name in ("attempts", "ledger", "checkpoints"):
            (self.run_dir / name).mkdir(parents=True)
        self.attempt = take_attempt(self.run_dir, ["a", "b"])
        self.savers = [
            Saver(self.run_dir, self.attempt, World(rank, 2, rank, 2), self.settings, clock=lambda: self.now[0])
            for rank in range(2)
        ]
        self.ledgers = [Ledger(self.run_dir / "ledger", self.attempt, rank) for rank in range(2)]
        self.tensors = {name: torch.zeros(shape[0]) for name, shape in SHAPES.items()}
        self.num_recorded = 0

    def train(self, step: int) -> None:
        for values in self.tensors.values():
            values.fill_(float(step))
        for rank, ledger in enumerate(self.ledgers):
            ledger.record(step - 1, [batch_of(step - 1, [Clip(self.num_recorded, 0, 0, 0, 0)])])
            self.num_recorded += 1
            assert rank < 2

    def begin(self, step: int) -> None:
        facts = Facts(step, step, self.attempt, {}, {}, SHAPES, {}, [])
        for rank, each in enumerate(self.savers):
            slices = [
                (name, "fp32", half * rank, values[half * rank : half * (rank + 1)])
                for name, values in self.tensors.items()
                for half in [len(values) // 2]
            ]
            each.begin(step, slices, self.ledgers[rank].cut(), facts if rank == 0 else None)

    def round(self) -> list[Settled | None]:
        agreed = [max(values) for values in zip(*(each.news() for each in self.savers), strict=True)]
        return [each.settle(agreed) for each in self.savers]

    def finish(self) -> Settled:
        end_s = time.monotonic() + 20
        while True:
            assert time.monotonic() < end_s
            settled = self.round()
            if settled[0] is not None:
                assert settled[1] is not None, "ranks disagree"
                assert settled[1].is_committed == settled[0].is_committed
                for each in self.savers:
                    each.join()
                return settled[0]
            time.sleep(0.01)

    def committed_rows(self) -> int:
        found = newest(self.run_dir)
        assert found is not None
        return sum(
            segment.num_rows
            for _, link in walk_lineage(self.run_dir / "ledger", found.lineage)
            for segment in link.segments
        )


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path / "run")


def fail_once(monkeypatch: pytest.MonkeyPatch, rank: int, code: int = errno.ENOSPC) -> threading.Event:
    """The next part that this rank writes meets a disk that refuses, half way."""
    has_failed, original = threading.Event(), checkpoint.write_tensors

    def write(path: Path, tensors: Any) -> Any:
        if path.name == f"rank-{rank:05d}.safetensors" and not has_failed.is_set():
            has_failed.set()
            path.write_bytes(b"half")
            raise OSError(code, os.strerror(code))
        return original(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", write)
    return has_failed


def hold(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> threading.Event:
    """A function waits until the event is set."""
    go_on, original = threading.Event(), getattr(owner, name)

    def wait(*arguments: Any, **named: Any) -> Any:
        assert go_on.wait(20)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, wait)
    return go_on


def test_what_is_saved_is_what_there_was_at_the_boundary(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = hold(monkeypatch, checkpoint, "write_tensors")
    ranks.train(1)
    ranks.begin(1)
    ranks.train(2)  # the weights move on while the disk is slow
    assert ranks.round() == [None, None]
    assert [each.step_in_flight for each in ranks.savers] == [1, 1]
    go_on.set()
    settled = ranks.finish()
    assert settled.is_committed
    assert settled.step == 1
    found = newest(ranks.run_dir)
    assert found is not None
    assert found.facts.step == 1
    assert torch.equal(found.read("a.weight", "fp32", 0, 6), torch.ones(6))
    assert ranks.committed_rows() == 2, "the rows of step 2 belong to the next checkpoint"
    ranks.begin(2)
    assert ranks.finish().is_committed
    assert ranks.committed_rows() == 4
    assert [each.step_in_flight for each in ranks.savers] == [None, None]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_refuses_fails_the_save_and_loses_no_row(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    ranks.train(1)
    ranks.begin(1)
    assert ranks.finish().is_committed
    fail_once(monkeypatch, rank)
    ranks.train(2)
    ranks.begin(2)
    settled = ranks.finish()
    assert (settled.is_committed, settled.reason) == (False, "No space left on device")
    assert [folder.name for folder in candidates(ranks.run_dir)] == ["step-000001"]
    (ranks.run_dir / "checkpoints" / f"step-000002.{ranks.attempt:04d}.2.tmp").mkdir(exist_ok=True)  # a late rank's
    fail_once(monkeypatch, rank)
    ranks.begin(3)
    assert not ranks.finish().is_committed
    assert not list((ranks.run_dir / "checkpoints").glob("step-000002.*.tmp")), "a full disk gets back what it can"
    ranks.train(3)
    ranks.begin(3)
    assert ranks.finish().is_committed
    assert ranks.committed_rows() == 6
    assert Checkpoint(candidates(ranks.run_dir)[0]).facts.step == 3


@pytest.mark.parametrize("name", ["commit_lineage", "stage", "publish"])
def test_a_commit_that_meets_a_full_disk_is_a_failed_save(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    owner: Any = saver if name == "commit_lineage" else checkpoint

    def refuse(*_: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse)
        ranks.train(1)
        ranks.begin(1)
        settled = ranks.finish()
    assert (settled.is_committed, settled.reason) == (False, "Read-only file system")
    assert candidates(ranks.run_dir) == []
    ranks.train(2)
    ranks.begin(2)
    assert ranks.finish().is_committed
    assert ranks.committed_rows() == 4


def test_the_same_step_can_be_saved_after_it_failed(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(monkeypatch, 1)
    ranks.train(1)
    ranks.begin(1)
    assert not ranks.finish().is_committed
    ranks.begin(1)
    assert ranks.finish().is_committed
    assert ranks.committed_rows() == 2


def test_rows_that_do_not_reach_the_disk_are_never_committed(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.fsync

    def refuse(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("-r00001.rows"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    ranks.train(1)
    ranks.begin(1)
    assert not ranks.finish().is_committed
    assert [each.ledger_error is not None for each in ranks.savers] == [False, True]
    assert candidates(ranks.run_dir) == []


def test_how_long_saves_have_been_failing(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ranks.savers[0]
    ranks.now[0] += 500
    assert (first.failing_s, first.age_s) == (0.0, 500.0)
    fail_once(monkeypatch, 0)
    ranks.train(1)
    ranks.begin(1)
    assert not ranks.finish().is_committed
    ranks.now[0] += 60
    assert (first.failing_s, first.age_s) == (60.0, 560.0)
    ranks.begin(1)
    ranks.now[0] += 5
    assert first.failing_s == 65.0
    assert ranks.finish().is_committed
    assert (first.failing_s, first.age_s) == (0.0, 0.0)


def test_a_newer_attempt_ends_this_one_amid_its_save(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = hold(monkeypatch, checkpoint, "write_tensors")
    ranks.train(1)
    ranks.begin(1)
    take_attempt(ranks.run_dir, ["c"])
    go_on.set()
    with pytest.raises(Superseded):
        ranks.finish()
    assert candidates(ranks.run_dir) == []
    with pytest.raises(Superseded):
        Ranks.begin(ranks_again(ranks), 2)


def ranks_again(ranks: Ranks) -> Ranks:
    """The same attempt with savers that know nothing yet."""
    for rank in range(2):
        ranks.savers[rank] = Saver(ranks.run_dir, ranks.attempt, World(rank, 2, rank, 2), ranks.settings)
    return ranks


def test_kept_are_the_newest_and_multiples_for_ever(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path / "run", CheckpointConfig(every_steps=1, keep=2, keep_every_steps=3))
    for step in range(1, 9):
        ranks.train(step)
        ranks.begin(step)
        assert ranks.finish().is_committed
    assert sorted(checkpoint.step_of(folder) for folder in candidates(ranks.run_dir)) == [3, 6, 7, 8]


def test_a_bug_in_the_writer_is_no_failed_save(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> Callable[..., Any]:
        raise AssertionError("a bug")

    monkeypatch.setattr(checkpoint, "write_tensors", wrong)
    ranks.train(1)
    ranks.begin(1)
    with pytest.raises(AssertionError, match="a bug"):
        ranks.finish()
