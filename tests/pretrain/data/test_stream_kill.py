"""Killed at any moment, on any number of ranks and workers: what was committed is one exact sequence."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.loader import ClipLoader
from pretrain.journal import Journal
from pretrain.ledger import walk_lineage
from pretrain.sections import CacheConfig, DataConfig
from pretrain.verdict import EXACT_BUT_LISTED
from shards.dataset import DataSet, Recipe, SourceSpec
from shards.order import FILLER, clip_places, num_micro_steps, rank_clips
from shards.reader import open_split
from tests.pretrain.data.stream_ranks import Attempt, Cursor, audit_stream, committed_rows
from tests.pretrain.data.test_loader import damage
from tests.shards.test_dataset import make_set

ROOT = Path(__file__).parents[3]
SEED = 5
GLOBAL_BATCH = 8
NUM_KILLS = 15
"""For each of the two run lengths."""
ANSWER_S = 120.0


class Server:
    """The process that forks ranks (stream_ranks.py)."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.pretrain.data.stream_ranks"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, attempt: Attempt) -> int:
        """The number of the group of processes that runs now."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(attempt)) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def codes(self) -> list[int]:
        """The exit codes of the ranks, once the last one ended."""
        return json.loads(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_S)
        line = self._process.stdout.readline() if ready else ""
        assert line, f"no answer:\n{self._log.read_text()}"
        return line

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server") / "log")
    yield started
    started.close()


def kill_at_random(server: Server, run_dir: Path, group: int, draw: random.Random) -> None:
    """At once or a little later; else when a few more steps were committed, or are about to be."""
    if draw.random() < 0.4:
        time.sleep(draw.uniform(0.0, 0.4))
    else:
        before, more = step_of(run_dir), draw.choice((1, 1, 2, 3))
        end_s = time.monotonic() + 30
        while step_of(run_dir) < before + more and time.monotonic() < end_s:
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.05))
    os.killpg(group, signal.SIGKILL)
    codes = server.codes()
    assert codes == [-signal.SIGKILL] * len(codes), server._log.read_text()


def step_of(run_dir: Path) -> int:
    cursor = Cursor.read(run_dir)
    return 0 if cursor is None else cursor.step


@pytest.mark.slow
@pytest.mark.parametrize("run_length", [1, 4])
def test_thirty_kills(run_length: int, packed_copy: Path, tmp_path: Path, server: Server) -> None:
    draw = random.Random(run_length)
    bad = 7
    damage(packed_copy, bad)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    data: dict[str, Any] = {
        "shards": str(packed_copy),
        "frames": 4,
        "size": 32,
        "flip": True,
        "run_length": run_length,
        "bad_sample_limit": 1.0,
    }
    starts = [(world, workers) for world in (1, 2, 4) for workers in (0, 1, 3)]
    starts += [(1, 0), (2, 0), (4, 0), (2, 0), (4, 0), (1, 1)]
    assert len(starts) == NUM_KILLS
    draw.shuffle(starts)

    def attempt(number: int, world: int, workers: int, until_step: int) -> Attempt:
        cache = CacheConfig(dir=str(tmp_path / "cache"), max_bytes=100_000) if number % 2 else None
        told = {**data, "workers": workers, "cache": None if cache is None else cache.model_dump()}
        return Attempt(
            run_dir=str(run_dir),
            data=told,
            number=number,
            world=world,
            seed=SEED,
            global_batch=GLOBAL_BATCH,
            micro_batch=draw.choice((None, 1, 2)),
            every_steps=draw.choice((1, 2, 3)),
            until_step=until_step,
            unreadable=tuple(draw.sample(range(25), 2)),
        )

    for number, (world, workers) in enumerate(starts, 1):
        group = server.start(attempt(number, world, workers, until_step=10**9))
        kill_at_random(server, run_dir, group, draw)
    last = step_of(run_dir) + 4
    server.start(attempt(NUM_KILLS + 1, 2, 0, last))
    assert server.codes() == [0, 0], server._log.read_text()

    cursor = Cursor.read(run_dir)
    assert cursor is not None
    assert cursor.step == last
    assert cursor.state["position"] == last * GLOBAL_BATCH
    attempts = {link.attempt for _, link in walk_lineage(run_dir / "ledger", cursor.head)}
    assert len(attempts) >= 6  # the kills struck a run that went on

    config = DataConfig.model_validate(data)
    result = audit_stream(run_dir, config, seed=SEED, global_batch=GLOBAL_BATCH)
    assert result.exit_code == EXACT_BUT_LISTED, result.lines
    assert set(result.substituted) == {"checksum", "io"}
    assert result.counts["abandoned_rows"] > 0
    check_sequence(run_dir, committed_rows(run_dir, cursor.head), config, bad, last)


def check_sequence(run_dir: Path, rows: np.ndarray, config: DataConfig, bad: int, num_steps: int) -> None:
    """The committed rows are those of one uninterrupted run, given the journal."""
    num = num_steps * GLOBAL_BATCH
    assert rows["position"].tolist() == list(range(num))
    assert (rows["step"] == rows["position"] // GLOBAL_BATCH).all()
    checksums = open_split(str(config.shards), "train").records["checksum"]
    assert (rows["checksum"] == checksums[rows["sample"].astype(int)]).all()
    is_other = rows["wanted"] != rows["sample"]
    assert is_other[rows["wanted"] == bad].all()
    assert not (rows["sample"] == bad).any()
    assert 0 < (is_other & (rows["wanted"] != bad)).sum() < num // 4  # what could not be read in some attempt
    for epoch in range(num // 25):
        assert sorted(rows["wanted"][25 * epoch : 25 * epoch + 25].tolist()) == list(range(25))
    journal = Journal(run_dir / "journal", is_read_only=True)
    shown = min(num_steps, 60)
    uninterrupted: list[tuple[int, int, int]] = []
    with ClipLoader(
        config.model_copy(update={"workers": 0}), seed=SEED, global_batch=GLOBAL_BATCH, journal=journal
    ) as loader:
        for _ in range(shown):
            batch = next(loader)
            columns = (batch.position_B, batch.wanted_B, batch.sample_B)
            uninterrupted += zip(*(column.tolist() for column in columns), strict=True)
    first = rows[: shown * GLOBAL_BATCH]
    assert uninterrupted == list(zip(*(first[name].tolist() for name in ("position", "wanted", "sample")), strict=True))


# ------------------------------------------------------------------ the same without processes


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[DataSet]:
    """Of 25 and of 7 samples, whole and in runs; and a mixture."""
    folder = tmp_path_factory.mktemp("sets")
    urls = [make_set(folder / name, num) for name, num in (("a", 25), ("b", 7))]
    found = [
        DataSet(Recipe((SourceSpec(url),), "train", SEED, run_length=run_length))
        for url in urls
        for run_length in (1, 3, 4)
    ]
    both = (SourceSpec(urls[0], 2.0), SourceSpec(urls[1], 1.0))
    return [*found, DataSet(Recipe(both, "train", SEED, run_length=2))]


attempts = st.lists(
    st.tuples(
        st.sampled_from((1, 2, 3, 4, 6, 8)),  # ranks
        st.integers(1, 5),  # micro batch, in videos
        st.integers(0, 12),  # steps until the cut
        st.integers(1, 4),  # steps between commits
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(number=st.integers(0, 6), videos=st.integers(8, 24), clips_per_video=st.integers(1, 3), cuts=attempts)
def test_any_cuts_of_any_ranks_make_one_sequence(
    number: int,
    videos: int,
    clips_per_video: int,
    cuts: list[tuple[int, int, int, int]],
    datasets: list[DataSet],
) -> None:
    """What the ranks of each attempt took until its last commit, together: every clip once, every epoch whole."""
    dataset = datasets[number]
    global_batch = videos * clips_per_video
    committed: list[np.ndarray] = []
    cursor = 0
    for world, micro, num_steps, every in cuts:
        micro_batch = micro * clips_per_video
        num_committed = num_steps // every * every
        for step in range(cursor, cursor + num_steps):
            taken = np.concatenate(
                [
                    rank_clips(
                        step,
                        micro_step,
                        global_batch=global_batch,
                        micro_batch=micro_batch,
                        rank=rank,
                        world_size=world,
                    )
                    for rank in range(world)
                    for micro_step in range(num_micro_steps(global_batch, micro_batch, world))
                ]
            )
            if step < cursor + num_committed:
                committed.append(taken[taken != FILLER])
        cursor += num_committed
    clips = np.concatenate([*committed, np.empty(0, np.int64)])
    assert sorted(clips.tolist()) == list(range(cursor * global_batch))
    position_K, draw_K = clip_places(np.sort(clips), clips_per_video)
    assert (draw_K == np.arange(len(clips)) % clips_per_video).all()
    epoch_K, sample_K = dataset.places(position_K[::clips_per_video])
    whole = [epoch for epoch in dataset.epochs(0, cursor * videos) if epoch.is_whole]
    for epoch in whole:
        mine = (epoch_K == epoch.number) & (sample_K >> 40 == epoch.source)
        assert sorted((sample_K[mine] & ((1 << 40) - 1)).tolist()) == list(range(epoch.num_rows))
    if cursor * videos >= 50:
        assert whole


@settings(max_examples=100, deadline=None)
@given(
    world=st.sampled_from((1, 2, 3, 4, 6, 8)),
    runs=st.integers(1, 4),
    run_length=st.sampled_from((1, 2, 4, 8)),
    step=st.integers(0, 10**9),
)
def test_a_run_lies_within_one_rank(world: int, runs: int, run_length: int, step: int) -> None:
    """Where a rank's share of a step is a multiple of the run length, no run is read twice."""
    global_batch, micro_batch = world * runs * run_length, run_length
    for rank in range(world):
        clips = np.concatenate(
            [
                rank_clips(
                    step, micro_step, global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=world
                )
                for micro_step in range(num_micro_steps(global_batch, micro_batch, world))
            ]
        )
        assert (clips == clips[0] + np.arange(runs * run_length)).all()
        assert clips[0] % run_length == 0
