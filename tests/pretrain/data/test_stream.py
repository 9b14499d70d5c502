"""The stream as a whole: runs, cache, selection, mixing, growth, withdrawals, faults; all of it one exact sequence."""

from __future__ import annotations

import gc
import io
import itertools
import json
import tarfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.audit import EXACT, EXACT_BUT_LISTED
from pretrain.config import CacheConfig, DataConfig, MixConfig, SourceConfig, load_config
from pretrain.data.loader import NUM_READERS, ClipLoader
from pretrain.data.rows import Rows
from pretrain.data.source import open_dataset
from pretrain.journal import GROWTH_NAME, Journal, JournalRow, read_journal
from pretrain.ledger import SUBSTITUTED, Ledger, commit_lineage
from shards import retry, storage
from shards.errors import SampleError, UserError
from shards.growth import Growth
from shards.layout import MANIFEST_NAME, SOURCE_SHIFT, Manifest
from shards.manifest import build_manifest
from shards.mixture import CYCLE
from shards.reader import SplitReader, open_split
from shards.withdraw import Withdrawal, withdrawn_url
from tests.pretrain.data.stream_ranks import Cursor, audit_stream, committed_rows
from tests.pretrain.data.test_loader import rows_of, take, worker_that

Data = Callable[..., DataConfig]
Sequenced = list[tuple[Any, ...]]
SEED = 3


def copy_samples(packed: Path, folder: Path, number: int, samples: Sequence[int]) -> None:
    """A tar with some samples of the packed set."""
    reader = open_split(str(packed), "train")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"train-{number:06d}.tar", "w") as target:
        for sample in samples:
            with tarfile.open(packed / reader.split.shards[int(reader.records[sample]["shard"])].name) as tar:
                key = reader.key(sample)
                for extension in ("mp4", "json"):
                    content = tar.extractfile(f"{key}.{extension}")
                    assert content is not None
                    member = tar.getmember(f"{key}.{extension}")
                    target.addfile(member, io.BytesIO(content.read()))


@pytest.fixture(scope="session")
def twelve_made(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twelve") / "set"
    copy_samples(packed, folder, 0, range(12))
    build_manifest(folder, "train")
    return folder


@pytest.fixture
def twelve(twelve_made: Path, tmp_path: Path) -> Path:
    """Twelve samples in one tar, to change at will."""
    folder = tmp_path / "twelve"
    folder.mkdir()
    for path in twelve_made.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def append(packed: Path, folder: Path, samples: Sequence[int]) -> None:
    """Another tar; the manifest remembers what it was (as shards/merge.py writes it)."""
    before = Manifest.from_json((folder / MANIFEST_NAME).read_text(), str(folder))
    copy_samples(packed, folder, len(before.splits["train"].shards), samples)
    after = build_manifest(folder, "train")
    history = (*before.history, before.version())
    grown = Manifest.make(preset="train", labels=after.labels, splits=after.splits, history=history)
    (folder / MANIFEST_NAME).write_text(grown.to_json())


def withdraw(folder: Path, *samples: int) -> None:
    rows = [Withdrawal("train", sample, f"train-{sample:09d}", "2026-01-01T00:00:00Z") for sample in samples]
    Path(withdrawn_url(str(folder))).write_text("".join(f"{row.to_json()}\n" for row in rows))


def damage(folder: Path, *samples: int) -> None:
    """Flip bytes in the middle of samples inside their tars."""
    reader = open_split(str(folder), "train")
    for sample in samples:
        record = reader.records[sample]
        with (folder / reader.split.shards[int(record["shard"])].name).open("r+b") as tar:
            tar.seek(int(record["offset"]) + int(record["size"]) // 2)
            flipped = bytes(byte ^ 0xFF for byte in tar.read(20))
            tar.seek(-20, io.SEEK_CUR)
            tar.write(flipped)


def all_rows(data: DataConfig, *, batch: int, num_clips: int, world: int = 1, **named: Any) -> Sequenced:
    """What all ranks are handed, by position and draw."""
    rows: Sequenced = []
    for rank in range(world):
        with ClipLoader(
            data, seed=SEED, global_batch=batch, rank=rank, world_size=world, num_clips=num_clips, **named
        ) as loader:
            rows += rows_of(loader)
    return sorted(rows)


def order_of(folder: Path, num: int, **named: Any) -> list[int]:
    """Samples by position."""
    config = DataConfig(shards=str(folder), frames=4, **named)
    return open_dataset(config, seed=SEED).places(np.arange(num))[1].tolist()


# ------------------------------------------------------------------ runs of neighbours


def test_a_run_is_one_read(data: Data, twelve: Path) -> None:
    settings = data(shards=str(twelve), run_length=4)
    with ClipLoader(settings, seed=SEED, global_batch=4, num_clips=36) as loader:
        batches = [batch.sample_B.tolist() for batch in loader]
        stats = loader.stats()
    assert stats.num_requests == len(batches) == 9
    for samples in batches:
        assert samples == list(range(samples[0], samples[0] + 4))
    for epoch in range(3):
        assert sorted(itertools.chain(*batches[3 * epoch : 3 * epoch + 3])) == list(range(12))
    assert len({tuple(batch[0] for batch in batches[i : i + 3]) for i in (0, 3, 6)}) > 1
    records = open_split(str(twelve), "train").records
    extents = [int(r["offset"][-1] + r["size"][-1] - r["offset"][0]) for r in (records[samples] for samples in batches)]
    assert stats.bytes_read == sum(extents)


def test_without_runs_every_sample_is_one_read(data: Data, twelve: Path) -> None:
    with ClipLoader(data(shards=str(twelve)), seed=SEED, global_batch=1, num_clips=24) as loader:
        samples = [int(batch.sample_B[0]) for batch in loader]
        stats = loader.stats()
    records = open_split(str(twelve), "train").records
    assert stats.num_requests == 24
    assert stats.bytes_read == int(records["size"][samples].sum())


@pytest.mark.parametrize("world", [1, 2])
def test_runs_that_divide_nothing_cost_little_more(world: int, data: Data, packed: Path) -> None:
    """25 samples in two tars, steps of 8: an epoch ends amid a run, a run amid a tar."""
    config = data(run_length=4)
    dataset = open_dataset(config, seed=SEED)
    num_steps, expected, requests = 25, 0, 0
    per_rank = 8 // world
    for share in range(num_steps * world):
        _, samples_K = dataset.places(np.arange(share * per_rank, (share + 1) * per_rank))
        expected += len(dataset.groups(sorted(set(samples_K.tolist()))))
    samples: list[int] = []
    for rank in range(world):
        with ClipLoader(
            config, seed=SEED, global_batch=8, rank=rank, world_size=world, num_clips=8 * num_steps
        ) as loader:
            samples += [sample for batch in loader for sample in batch.sample_B.tolist()]
            requests += loader.stats().num_requests
    assert Counter(samples) == dict.fromkeys(range(25), 8)
    assert requests == expected <= 200 // 4 + 8 * 3  # per epoch: its end, the tar's end, what the walk moved


@pytest.fixture(scope="module")
def in_runs(data: Data) -> Sequenced:
    return all_rows(data(run_length=4), batch=8, num_clips=56)


@pytest.mark.parametrize(
    ("workers", "world", "micro_batch"), [(0, 2, 4), (1, 2, 1), (0, 4, 1), (3, 1, 3), (0, 3, 2), (0, 1, 8)]
)
def test_runs_are_one_sequence(
    workers: int, world: int, micro_batch: int, data: Data, in_runs: Sequenced, packed: Path
) -> None:
    config = data(run_length=4, workers=workers)
    rows = all_rows(config, batch=8, num_clips=56, world=world, micro_batch=micro_batch)
    assert rows == in_runs
    assert [row[5] for row in rows] == order_of(packed, 56, run_length=4)
    assert [row[5] for row in rows] != order_of(packed, 56)


def test_a_resume_amid_an_epoch_of_runs(data: Data, in_runs: Sequenced) -> None:
    with ClipLoader(data(run_length=4), seed=SEED, global_batch=8) as loader:
        take(loader, 3)
        state = json.loads(json.dumps(loader.state_dict()))
    with ClipLoader(data(run_length=4), seed=SEED, global_batch=8, micro_batch=3) as loader:
        loader.load_state_dict(state)
        assert rows_of(take(loader, 4)) == in_runs[24:]


def test_several_clips_of_the_videos_of_a_run(data: Data, twelve: Path) -> None:
    settings = data(shards=str(twelve), run_length=4, clips_per_video=2)
    with ClipLoader(settings, seed=SEED, global_batch=8, micro_batch=2, num_clips=24) as loader:
        rows = rows_of(loader)
        assert loader.stats().num_requests == 3  # over all micro batches of a step
    assert [row[1:3] for row in rows] == [(position, draw) for position in range(12) for draw in (0, 1)]
    assert [row[5] for row in rows[::2]] == order_of(twelve, 12, run_length=4)


# ------------------------------------------------------------------ what the node keeps


def kept(tmp_path: Path, max_bytes: int = 1 << 20) -> CacheConfig:
    return CacheConfig(dir=str(tmp_path / "cache"), max_bytes=max_bytes)


def test_the_second_epoch_reads_nothing(data: Data, twelve: Path, tmp_path: Path) -> None:
    plain = all_rows(data(shards=str(twelve)), batch=1, num_clips=24)
    config = data(shards=str(twelve), cache=kept(tmp_path))
    with ClipLoader(config, seed=SEED, global_batch=1) as loader:
        state = loader.state_dict()
    with ClipLoader(config, seed=SEED, global_batch=1, num_clips=12) as loader:
        first = rows_of(loader)
        stats = loader.stats()
        assert (stats.num_requests, stats.num_cache_hits, stats.num_cache_misses) == (12, 0, 12)
        assert rows_of(loader) == first
        stats = loader.stats()
        assert (stats.num_requests, stats.num_cache_hits, stats.num_cache_misses) == (0, 12, 0)
        assert stats.bytes_read == 0
    with ClipLoader(config, seed=SEED, global_batch=1, num_clips=24) as loader:  # a new start finds it all
        loader.load_state_dict({**state, "position": 12})
        assert first + rows_of(take(loader, 12)) == plain
        assert loader.stats().num_requests == 0


def test_ranks_share_what_the_node_keeps(data: Data, twelve: Path, tmp_path: Path) -> None:
    config = data(shards=str(twelve), cache=kept(tmp_path), run_length=2)
    plain = all_rows(config.model_copy(update={"cache": None}), batch=4, num_clips=12)
    loaders = [
        ClipLoader(config, seed=SEED, global_batch=4, rank=rank, world_size=2, num_clips=12) for rank in range(2)
    ]
    try:
        assert sorted(row for loader in loaders for row in rows_of(loader)) == plain  # each reads its half
        for loader in loaders:
            loader.stats()
        assert sorted(row for loader in loaders for row in rows_of(loader)) == plain
        stats = [loader.stats() for loader in loaders]
    finally:
        for loader in loaders:
            loader.close()
    assert [one.num_requests for one in stats] == [0, 0]
    swapped = all_rows(config, batch=4, num_clips=12, world=3)
    assert swapped == plain
    before = storage.counters.num_bytes
    assert all_rows(config, batch=4, num_clips=12) == plain
    manifest_bytes = (twelve / MANIFEST_NAME).stat().st_size
    assert storage.counters.num_bytes - before == manifest_bytes  # no sample


def test_a_kept_sample_that_was_damaged_is_read_again(data: Data, twelve: Path, tmp_path: Path) -> None:
    config = data(shards=str(twelve), cache=kept(tmp_path))
    plain = all_rows(config, batch=1, num_clips=12)
    files = [path for path in (tmp_path / "cache" / "samples").glob("*/*") if path.is_file()]
    assert len(files) == 12
    files[0].write_bytes(files[0].read_bytes()[::-1])
    files[1].write_bytes(b"short")
    with ClipLoader(config, seed=SEED, global_batch=1, num_clips=12) as loader:
        assert rows_of(loader) == plain
        stats = loader.stats()
    assert (stats.num_requests, stats.num_cache_hits, stats.num_cache_misses) == (2, 10, 2)
    assert stats.substituted == {}


def test_a_cache_that_is_too_small_or_broken_changes_nothing(data: Data, twelve: Path, tmp_path: Path) -> None:
    plain = all_rows(data(shards=str(twelve)), batch=4, num_clips=24)
    small = data(shards=str(twelve), cache=kept(tmp_path, 15_000))
    assert all_rows(small, batch=4, num_clips=24) == plain
    assert sum(path.stat().st_size for path in (tmp_path / "cache" / "samples").glob("*/*")) <= 15_000
    (tmp_path / "file").write_text("no folder")
    broken = data(shards=str(twelve), cache=CacheConfig(dir=str(tmp_path / "file"), max_bytes=1 << 20))
    assert all_rows(broken, batch=4, num_clips=24) == plain


# ------------------------------------------------------------------ selecting


def test_a_selection_is_what_is_drawn_and_substituted_from(data: Data, packed_copy: Path) -> None:
    records = open_split(str(packed_copy), "train").records
    chosen = np.flatnonzero((records["num_frames"] >= 24) & (records["motion"] > 1))
    assert 5 < len(chosen) < 20
    config = data(shards=str(packed_copy), where="num_frames >= 24 and motion > 1", bad_sample_limit=0.5)
    num = len(chosen)
    damage(packed_copy, int(chosen[2]))
    rows = all_rows(config, batch=2, num_clips=2 * num)
    for epoch in (0, 1):
        assert sorted(row[4] for row in rows if row[3] == epoch) == chosen.tolist()
    assert {row[5] for row in rows} == set(chosen.tolist()) - {int(chosen[2])}
    with ClipLoader(config, seed=SEED, global_batch=2) as loader:
        assert loader.num_samples == num
        state = loader.state_dict()
    looser = config.model_copy(update={"where": "num_frames >= 24"})
    with (
        ClipLoader(looser, seed=SEED, global_batch=2) as loader,
        pytest.raises(UserError, match=r"data\.where is 'num_frames >= 24'; it selects other samples"),
    ):
        loader.load_state_dict(state)
    for wrong, told in (("length > 3", "'length' is none"), ("motion > 900", "chooses none of 25 samples")):
        with pytest.raises(UserError, match=told):
            ClipLoader(data(where=wrong), seed=SEED, global_batch=2)


# ------------------------------------------------------------------ mixing


def mixed(data: Data, packed: Path, twelve: Path, *mix: MixConfig, **named: Any) -> DataConfig:
    sources = (SourceConfig(url=str(packed), weight=3), SourceConfig(url=str(twelve), weight=1))
    return data(shards=sources, mix=mix, **named)


def from_position(
    config: DataConfig, position: int, num_steps: int, journal: Journal | None = None, **named: Any
) -> Sequenced:
    """Jump to a position, as a resume does."""
    with ClipLoader(config, seed=SEED, global_batch=8, journal=journal, **named) as loader:
        loader.load_state_dict({**loader.state_dict(), "position": position})
        return rows_of(take(loader, num_steps))


def test_two_sources_come_by_weight_and_change_where_a_cycle_begins(
    data: Data, packed: Path, twelve: Path, tmp_path: Path
) -> None:
    config = mixed(data, packed, twelve, MixConfig(cycle=1, weights=(1, 3)))
    dataset = open_dataset(config, seed=SEED)
    epoch_K, sample_K = dataset.places(np.arange(2 * CYCLE))
    source_K = sample_K >> SOURCE_SHIFT
    assert np.bincount(source_K[:CYCLE]).tolist() == [3072, 1024]
    assert np.bincount(source_K[CYCLE:]).tolist() == [1024, 3072]
    first = CYCLE - 32
    rows = from_position(config, first, 8)
    there = slice(first, first + 64)
    assert [row[1] for row in rows] == list(range(first, first + 64))
    assert [row[3] for row in rows] == epoch_K[there].tolist()
    assert [row[4] for row in rows] == [row[5] for row in rows] == sample_K[there].tolist()
    checksums = [open_split(str(folder), "train").records["checksum"] for folder in (packed, twelve)]
    assert [row[6] for row in rows] == [
        int(checksums[row[5] >> SOURCE_SHIFT][row[5] & ((1 << SOURCE_SHIFT) - 1)]) for row in rows
    ]
    for rank_rows in (
        [from_position(config, first, 8, rank=rank, world_size=2, micro_batch=3) for rank in range(2)],
        [from_position(config.model_copy(update={"workers": 1, "cache": kept(tmp_path)}), first, 8)],
    ):
        assert sorted(row for one in rank_rows for row in one) == rows


def test_weights_may_change_in_cycles_to_come(data: Data, packed: Path, twelve: Path) -> None:
    before = mixed(data, packed, twelve)
    with ClipLoader(before, seed=SEED, global_batch=8) as loader:
        state = {**loader.state_dict(), "position": CYCLE - 8}
    after = mixed(data, packed, twelve, MixConfig(cycle=1, weights=(1, 3)))
    with ClipLoader(after, seed=SEED, global_batch=8) as loader:
        loader.load_state_dict(state)
        assert rows_of(take(loader, 2)) == from_position(after, CYCLE - 8, 2)
        with pytest.raises(UserError, match="from cycle 2 on only"):
            loader.load_state_dict({**state, "position": CYCLE + 8})
    with pytest.raises(UserError, match=r"weight 1 for source 1; it must be at least 1/4096"):
        ClipLoader(
            data(shards=(SourceConfig(url=str(packed), weight=9000), SourceConfig(url=str(twelve), weight=1))),
            seed=SEED,
            global_batch=8,
        )


def test_substitutes_come_from_the_same_source(data: Data, packed: Path, twelve: Path) -> None:
    config = mixed(data, packed, twelve, bad_sample_limit=0.5)
    damage(twelve, 5)
    rows = from_position(config, 0, 16)
    replaced = [row for row in rows if row[4] != row[5]]
    assert {row[4] for row in replaced} == {1 << SOURCE_SHIFT | 5}
    assert {row[5] >> SOURCE_SHIFT for row in replaced} == {1}


def test_a_journal_row_of_another_order_is_not_obeyed(data: Data, packed: Path, twelve: Path) -> None:
    """An attempt that died wrote rows at positions that were not committed; then the weights there were changed."""
    before = mixed(data, packed, twelve)
    after = mixed(data, packed, twelve, MixConfig(cycle=1, weights=(1, 3)), bad_sample_limit=0.5)
    places = [open_dataset(config, seed=SEED).places(np.arange(CYCLE, CYCLE + 8))[1] for config in (before, after)]
    changed = int(np.flatnonzero(places[0] != places[1])[0])
    same = int(np.flatnonzero(places[0] == places[1])[0])
    plain = from_position(after, CYCLE, 1)
    journal = Journal(None)
    for place in (changed, same):
        other = 3 if places[0][place] != 3 else 4
        journal.add(JournalRow(CYCLE + place, int(places[0][place]), other, "io"))
    rows = from_position(after, CYCLE, 1, journal=journal)
    assert rows[changed] == plain[changed]
    assert rows[same][5] in (3, 4)
    assert rows[same][4] == plain[same][4]


# ------------------------------------------------------------------ frames by time


def test_frames_a_second_whatever_the_source(data: Data, packed: Path) -> None:
    records = open_split(str(packed), "train").records
    rates = records["rate"]
    assert set(np.unique(rates).tolist()) == {24.0, 25.0}
    rows = all_rows(data(rate_hz=5.0), batch=5, num_clips=25)
    for row in rows:
        times_s = np.array(row[7]) / rates[row[5]]
        if records[row[5]]["num_frames"] > 15:
            assert np.abs(times_s - times_s[0] - 0.2 * np.arange(4)).max() <= 0.5 / 24 + 1e-9
    assert all_rows(data(rate_hz=5.0, stride=1), batch=5, num_clips=25) == rows
    long = [row for row in rows if records[row[5]]["num_frames"] > 15]
    strides = {rate: {tuple(np.diff(row[7])) for row in long if rates[row[5]] == rate} for rate in (24, 25)}
    assert strides == {24: {(5, 5, 4)}, 25: {(5, 5, 5)}}
    with ClipLoader(data(rate_hz=1.0), seed=SEED, global_batch=5, num_clips=25) as loader:
        assert len(rows_of(loader)) == 25
        assert loader.stats().stride_dropped == 25  # no video is that long


# ------------------------------------------------------------------ growing


class Streamed:
    """Ranks one after the other in this process, with journal, ledger and commits."""

    def __init__(self, run_dir: Path, config: DataConfig, *, batch: int) -> None:
        self.run_dir, self.config, self.batch = run_dir, config, batch
        self.attempt = 0

    def run(self, until_step: int, *, world: int = 1) -> Sequenced:
        """One attempt: from the cursor to a step, committed there."""
        self.attempt += 1
        cursor = Cursor.read(self.run_dir)
        begin = 0 if cursor is None else cursor.step
        rows: Sequenced = []
        segments, states = [], []
        for rank in reversed(range(world)):
            journal = Journal(self.run_dir / "journal", self.attempt, rank)
            ledger = Ledger(self.run_dir / "ledger", self.attempt, rank)
            with ClipLoader(
                self.config, seed=SEED, global_batch=self.batch, rank=rank, world_size=world, journal=journal
            ) as loader:
                if cursor is not None:
                    loader.load_state_dict(cursor.state)
                for step in range(begin, until_step):
                    batches = take(loader, 1)
                    ledger.record(step, batches)
                    rows += rows_of(batches)
                states.append(loader.state_dict())
            segments.append(ledger.seal())
        head = commit_lineage(
            self.run_dir / "ledger",
            until_step,
            self.attempt,
            [segment for segment in segments if segment is not None],
            None if cursor is None else cursor.head,
        )
        Cursor(until_step, states[-1], head).write(self.run_dir)
        assert all({**state, "journal_digest": ""} == {**states[0], "journal_digest": ""} for state in states)
        return sorted(rows)


def test_appended_shards_are_taken_over_where_an_epoch_begins(
    data: Data, packed: Path, twelve: Path, tmp_path: Path
) -> None:
    run = Streamed(tmp_path / "run", data(shards=str(twelve)), batch=4)
    run.run_dir.mkdir()
    as_it_was = all_rows(run.config, batch=4, num_clips=24)
    rows = run.run(5)
    assert not (run.run_dir / "journal" / GROWTH_NAME).exists()

    append(packed, twelve, range(12, 25))
    cursor = Cursor.read(run.run_dir)
    assert cursor is not None
    journal = Journal(run.run_dir / "journal", 9, 1)
    with ClipLoader(run.config, seed=SEED, global_batch=4, rank=1, world_size=2, journal=journal) as loader:
        loader.load_state_dict(cursor.state)
        assert not (run.run_dir / "journal" / GROWTH_NAME).exists()  # rank 0 writes it, the others come to the same
        second = rows_of(take(loader, 1))
    rows += run.run(10, world=2)
    (line,) = (run.run_dir / "journal" / GROWTH_NAME).read_text().splitlines()
    assert json.loads(line)["first_draw"] == 24
    assert json.loads(line)["num_samples"] == 25
    assert rows[:24] == as_it_was
    assert second == [row for row in rows if row[0] == 5][2:]

    append(packed, twelve, (3, 4))  # it grows again, and the next start settles that
    rows += run.run(26, world=3)
    steps = [json.loads(line) for line in (run.run_dir / "journal" / GROWTH_NAME).read_text().splitlines()]
    assert [(step["first_draw"], step["num_samples"]) for step in steps] == [(24, 25), (49, 27)]
    sizes = [(0, 0, 12), (1, 12, 12), (2, 24, 25), (3, 49, 27), (4, 76, 27)]
    assert [row[1] for row in rows] == list(range(104))
    for epoch, first, size in sizes:
        assert [row[3] for row in rows[first : first + size]] == [epoch] * size
        assert sorted(row[5] for row in rows[first : first + size]) == list(range(size))
    result = audit_stream(run.run_dir, run.config, seed=SEED, global_batch=4)
    assert result.exit_code == EXACT, result.lines
    assert result.counts["epochs"] == 5
    assert committed_rows(run.run_dir, Cursor.read(run.run_dir).head)["sample"].tolist() == [row[5] for row in rows]  # pyright: ignore[reportOptionalMemberAccess]


def test_what_an_attempt_that_died_settled_is_obeyed(data: Data, packed: Path, twelve: Path, tmp_path: Path) -> None:
    config = data(shards=str(twelve))
    with ClipLoader(config, seed=SEED, global_batch=4) as loader:
        state = {**loader.state_dict(), "position": 20}
    append(packed, twelve, range(12, 25))
    journal = Journal(tmp_path / "journal", 1, 0)
    with ClipLoader(config, seed=SEED, global_batch=4, journal=journal) as loader:
        loader.load_state_dict(state)
        rows = rows_of(take(loader, 8))
    with ClipLoader(config, seed=SEED, global_batch=4, journal=Journal(tmp_path / "journal", 2, 0)) as loader:
        loader.load_state_dict(state)
        assert rows_of(take(loader, 8)) == rows
    assert len((tmp_path / "journal" / GROWTH_NAME).read_text().splitlines()) == 1


def test_a_torn_line_of_growth_harms_no_later_one(tmp_path: Path) -> None:
    first, second = Growth(0, 24, "aa", 25), Growth(0, 49, "bb", 27)
    journal = Journal(tmp_path / "journal", 1, 0)
    journal.add_growth([first])
    with (tmp_path / "journal" / GROWTH_NAME).open("ab") as file:
        file.write(b'{"source": 0, "fir')  # a power cut
    again = Journal(tmp_path / "journal", 2, 0)
    assert again.growth() == [first]
    again.add_growth([second])
    assert again.growth() == Journal(tmp_path / "journal", 3, 0).growth() == [first, second]


def test_a_row_from_before_the_data_grew_is_not_obeyed(data: Data, packed: Path, twelve: Path, tmp_path: Path) -> None:
    """A run dies before its first checkpoint, the data grows, and the run begins again with all of it."""
    damage(twelve, order_of(twelve, 12)[5])
    run = Streamed(tmp_path / "run", data(shards=str(twelve), bad_sample_limit=0.5), batch=4)
    run.run_dir.mkdir()
    run.run(3)
    (run.run_dir / "cursor.json").unlink()
    assert [row.position for row in read_journal(run.run_dir / "journal")] == [5]
    append(packed, twelve, range(12, 25))
    run.run(8)
    result = audit_stream(run.run_dir, run.config, seed=SEED, global_batch=4)
    assert result.exit_code == EXACT, result.lines
    assert result.substituted == {}


# ------------------------------------------------------------------ withdrawn


def test_withdrawn_samples_are_replaced_and_not_counted_as_bad(data: Data, twelve: Path, tmp_path: Path) -> None:
    plain = all_rows(data(shards=str(twelve)), batch=4, num_clips=24)
    withdraw(twelve, 2, 5, 9)
    run = Streamed(tmp_path / "run", data(shards=str(twelve), bad_sample_limit=0.0), batch=4)
    run.run_dir.mkdir()
    rows = run.run(6, world=2)
    assert [row[4] for row in rows] == [row[4] for row in plain]
    assert [row for row in rows if row[4] not in (2, 5, 9)] == [row for row in plain if row[4] not in (2, 5, 9)]
    assert not {row[5] for row in rows} & {2, 5, 9}
    journal = read_journal(run.run_dir / "journal")
    assert sorted(row.position for row in journal) == [row[1] for row in rows if row[4] in (2, 5, 9)]
    assert {row.reason for row in journal} == {"withdrawn"}
    result = audit_stream(run.run_dir, run.config, seed=SEED, global_batch=4)
    assert result.exit_code == EXACT_BUT_LISTED
    assert result.substituted == {"withdrawn": 6}


def test_a_withdrawn_substitute_is_replaced_too(data: Data, twelve: Path) -> None:
    order = order_of(twelve, 4)
    journal = Journal(None)
    journal.add(JournalRow(1, order[1], order[2], "checksum"))
    withdraw(twelve, order[2])
    config = data(shards=str(twelve), bad_sample_limit=0.0)  # one bad sample is the most
    with ClipLoader(config, seed=SEED, global_batch=4, journal=journal, num_clips=4) as loader:
        (batch,) = list(loader)
        assert loader.stats().substituted == {"withdrawn": 2}
    assert batch.wanted_B.tolist() == order
    assert not set(batch.sample_B.tolist()) & {order[1], order[2]}
    row = journal.find(1)
    assert row == JournalRow(1, order[1], int(batch.sample_B[1]), "withdrawn")


def test_a_withdrawn_sample_whose_substitute_is_bad_is_still_not_counted(data: Data, twelve: Path) -> None:
    order = order_of(twelve, 4)
    withdraw(twelve, order[1])
    journal = Journal(None)
    journal.add(JournalRow(1, order[1], order[2], "withdrawn"))
    damage(twelve, order[2])
    config = data(shards=str(twelve), bad_sample_limit=0.0)  # order[2] is the one bad sample there may be
    with ClipLoader(config, seed=SEED, global_batch=4, journal=journal, num_clips=4) as loader:
        (batch,) = list(loader)
    assert not set(batch.sample_B.tolist()) & {order[1], order[2]}
    with ClipLoader(config, seed=SEED, global_batch=4, journal=journal, num_clips=4) as loader:
        (again,) = list(loader)
    assert again.sample_B.tolist() == batch.sample_B.tolist()


# ------------------------------------------------------------------ bad samples


def reads_of(monkeypatch: pytest.MonkeyPatch, fail: Callable[[int, int], SampleError | None]) -> Counter[int]:
    """Count the reads of each sample; `fail(sample, how many reads before)` may fail one."""
    reads: Counter[int] = Counter()
    plain = SplitReader.read_group

    def read_group(self: SplitReader, samples: Sequence[int]) -> list[bytes | SampleError]:
        found = plain(self, samples)
        for place, sample in enumerate(samples):
            found[place] = fail(sample, reads[sample]) or found[place]
            reads[sample] += 1
        return found

    monkeypatch.setattr(SplitReader, "read_group", read_group)
    return reads


def test_a_bad_sample_is_not_tried_again_and_keeps_its_reason(
    data: Data, twelve: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = order_of(twelve, 12)[1]
    reads = reads_of(monkeypatch, lambda sample, before: SampleError("checksum", "flipped") if sample == bad else None)
    config = data(shards=str(twelve), prefetch_steps=1)
    with ClipLoader(config, seed=SEED, global_batch=4, journal=Journal(tmp_path / "journal")) as loader:
        rows = rows_of(take(loader, 9))
        assert loader.stats().substituted == {"checksum": 3}
    assert reads[bad] == 1
    assert not any(row[5] == bad for row in rows)
    assert [row.reason for row in read_journal(tmp_path / "journal")] == ["checksum"] * 3
    with ClipLoader(config, seed=SEED, global_batch=4, journal=Journal(tmp_path / "journal", 2)) as loader:
        loader.load_state_dict({**loader.state_dict(), "position": 36})
        take(loader, 3)
        assert loader.stats().substituted == {"checksum": 1}
    assert reads[bad] == 2  # another process tries it once: where it has no row it may have been used


def test_a_fault_of_storage_may_have_passed_by_the_next_epoch(
    data: Data, twelve: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = order_of(twelve, 12)[1]
    reads_of(monkeypatch, lambda sample, before: SampleError("io", "gone") if sample == bad and not before else None)
    config = data(shards=str(twelve), prefetch_steps=1)
    with ClipLoader(config, seed=SEED, global_batch=4, num_clips=24) as loader:
        rows = rows_of(loader)
        assert loader.stats().substituted == {"io": 1}
    assert [row[3] for row in rows if row[4] == bad != row[5]] == [0]
    assert [row[3] for row in rows if row[4] == bad == row[5]] == [1]


def test_the_limit_counts_over_all_ranks(data: Data, twelve: Path, tmp_path: Path) -> None:
    order, dataset = order_of(twelve, 12), open_dataset(data(shards=str(twelve)), seed=SEED)

    def replaced_at(places: Sequence[int]) -> list[int]:
        return [next(dataset.substitutes(place, order[place])) for place in places]

    # Steps of four, two positions for each rank. Nobody meets a bad sample but at these places.
    choices = itertools.product(itertools.combinations((0, 1, 4, 5, 8, 9), 2), (2, 3, 6, 7, 10, 11))
    places = next(
        (*one, other)
        for one, other in choices
        if not set(replaced_at((*one, other))) & {order[place] for place in (*one, other)}
    )
    of_first, of_second = [order[place] for place in places[:2]], [order[places[2]]]
    damage(twelve, *of_first, *of_second)
    config = data(shards=str(twelve), bad_sample_limit=2 / 12, prefetch_steps=1)

    def rank(number: int, journal: Journal) -> Sequenced:
        with ClipLoader(
            config, seed=SEED, global_batch=4, rank=number, world_size=2, num_clips=12, journal=journal
        ) as loader:
            return rows_of(loader)

    second = Journal(tmp_path / "journal", 1, 1)  # both start before anything is found
    assert len(rank(0, Journal(tmp_path / "journal", 1, 0))) == 6
    assert len(rank(1, Journal(tmp_path / "alone", 1, 1))) == 6
    with pytest.raises(UserError, match=r"at most 2 of the 12 samples may prove unusable, and 3 did") as caught:
        rank(1, second)
    for sample in (*of_first, *of_second):
        assert f"sample {sample} " in str(caught.value)
    with pytest.raises(UserError, match="and 3 did"):  # and so does the next start
        rank(0, Journal(tmp_path / "journal", 2, 0))


# ------------------------------------------------------------------ telemetry


def test_retries_are_counted_and_harm_nothing(data: Data, twelve: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = all_rows(data(shards=str(twelve)), batch=1, num_clips=12)
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    pread, lock, seen = storage._pread, threading.Lock(), Counter[int]()  # pyright: ignore[reportPrivateUsage]

    def flaky(path: Path, offset: int, size: int, tag: str) -> bytes:
        found = pread(path, offset, size, tag)
        with lock:
            seen[offset] += 1
            fault = seen[offset] <= 2 and offset % 3 == 0
        if fault:
            raise OSError("503 slow down" if seen[offset] == 1 else "reset by peer")
        return found

    monkeypatch.setattr(storage, "_pread", flaky)
    with ClipLoader(data(shards=str(twelve)), seed=SEED, global_batch=1, num_clips=12) as loader:
        assert rows_of(loader) == plain
        stats = loader.stats()
    num_flaky = sum(offset % 3 == 0 for offset in seen)
    assert num_flaky > 2
    assert stats.num_retries == 2 * num_flaky
    assert stats.num_throttled == num_flaky
    assert stats.num_requests == 12 + 2 * num_flaky
    assert stats.num_hedges == 0
    assert stats.substituted == {}


def test_reads_wait_for_storage_together(data: Data, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 ms for every request: as many are under way at a time as there are readers."""
    plain, lock = storage.read_range, threading.Lock()
    under_way, all_in = 0, threading.Event()

    def read_range(*arguments: Any, **named: Any) -> bytes:
        nonlocal under_way
        with lock:
            under_way += 1
            if under_way == NUM_READERS:
                all_in.set()
        all_in.wait(20)
        time.sleep(0.04)
        with lock:
            under_way -= 1
        return plain(*arguments, **named)

    monkeypatch.setattr(storage, "read_range", read_range)
    config = data(prefetch_steps=2)
    with ClipLoader(config, seed=SEED, global_batch=16, num_clips=3 * 16) as loader:
        assert sum(batch.num_real for batch in loader) == 48
    assert all_in.is_set()


# ------------------------------------------------------------------ memory


class Bytes(bytes):
    """The bytes of a sample; `alive` counts them."""

    alive = 0

    def __new__(cls, data: bytes) -> Bytes:
        Bytes.alive += 1
        return super().__new__(cls, data)

    def __del__(self) -> None:
        Bytes.alive -= 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("bad", ["none", "checksum", "withdrawn", "short"])
def test_a_consumed_batch_is_freed_at_once(
    workers: int, bad: str, data: Data, twelve: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the garbage collector: nothing may hold a batch in a cycle, least of all an error that is kept."""
    order = order_of(twelve, 12, run_length=2)
    if bad == "checksum":
        damage(twelve, order[1], order[6])
    elif bad == "withdrawn":
        withdraw(twelve, order[1], order[6])
    frames = 12 if bad == "short" else 4  # one of the videos has only ten
    arrays: list[weakref.ref[Any]] = []
    make, read_group = Rows.make, SplitReader.read_group

    def made(*arguments: Any) -> Rows:
        rows = make(*arguments)
        arrays.append(weakref.ref(rows.planes_BTN))
        return rows

    def read(self: SplitReader, samples: Sequence[int]) -> list[bytes | SampleError]:
        return [one if isinstance(one, SampleError) else Bytes(one) for one in read_group(self, samples)]

    monkeypatch.setattr(Rows, "make", staticmethod(made))
    monkeypatch.setattr(SplitReader, "read_group", read)
    settings = data(shards=str(twelve), workers=workers, run_length=2, frames=frames, stride=1, bad_sample_limit=0.5)
    gc.collect()
    gc.disable()
    try:
        with ClipLoader(settings, seed=SEED, global_batch=4, micro_batch=2, num_clips=24) as loader:
            for _ in range(12):
                batch = next(loader)
                consumed = weakref.ref(batch)
                del batch
                assert consumed() is None
            num_substituted = loader.stats().substituted.total()
            end_s = time.monotonic() + 10  # a thread may still be leaving its last call
            while (any(ref() is not None for ref in arrays) or Bytes.alive) and time.monotonic() < end_s:
                time.sleep(0.01)
            assert [ref() is not None for ref in arrays] == [False] * 12
            assert Bytes.alive == 0
    finally:
        gc.enable()
    assert bool(num_substituted) == (bad != "none")


# ------------------------------------------------------------------ a decoder that never returns

HANG = """
import ctypes
def trap(video):
    if zlib.crc32(video) == {crc}:
        while True:
            {call}
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sleeps", "loops"])
def test_a_decoder_that_hangs_with_the_interpreter_locked(kind: str, data: Data, twelve: Path, tmp_path: Path) -> None:
    order = order_of(twelve, 12)
    hung = order[6]
    crc = int(open_split(str(twelve), "train").records["checksum"][hung])
    calls = {"sleeps": "ctypes.PyDLL(None).sleep(1000)", "loops": "pow(3, 1 << 40)"}
    command = worker_that(HANG.replace("{crc}", str(crc)).replace("{call}", calls[kind]))
    deadline_s = 2.0
    settings = data(shards=str(twelve), workers=2, decode_deadline_s=deadline_s, prefetch_steps=1)
    run_dir = tmp_path / "run"
    ledger, waits_s = Ledger(run_dir / "ledger", 1, 0), []
    journal = Journal(run_dir / "journal", 1, 0)
    with ClipLoader(settings, seed=SEED, global_batch=4, journal=journal, worker_command=command) as loader:
        for step in range(3):
            start_s = time.monotonic()
            batch = next(loader)
            waits_s.append(time.monotonic() - start_s)
            ledger.record(step, [batch])
        assert loader.stats().substituted == {"deadline": 1}
        segment = ledger.seal()
        assert segment is not None
        head = commit_lineage(run_dir / "ledger", 3, 1, [segment], None)
        Cursor(3, loader.state_dict(), head).write(run_dir)
    assert max(waits_s[1:]) <= deadline_s + 5  # the first one starts the decoders
    row = committed_rows(run_dir, head)[6]
    assert (row["wanted"], row["reason"]) == (hung, SUBSTITUTED)
    assert read_journal(run_dir / "journal") == [JournalRow(6, hung, int(row["sample"]), "deadline")]
    result = audit_stream(run_dir, settings, seed=SEED, global_batch=4)
    assert (result.exit_code, result.substituted) == (EXACT_BUT_LISTED, {"deadline": 1}), result.lines


# ------------------------------------------------------------------ as the config names it

BASE = (
    *("run.dir=r", "objective.masked_frame={}", "train.steps=10", "train.global_batch=8", "train.micro_batch=2"),
    "optim.lr=1e-3",
)


def configured(*overrides: str) -> DataConfig:
    return load_config(None, [*BASE, *overrides]).data


def test_sources_on_the_command_line() -> None:
    listed = configured("data.shards=[{url: a, weight: 2}, {url: 's3://b/c d', weight: 1}]")
    assert listed.sources == (SourceConfig(url="a", weight=2), SourceConfig(url="s3://b/c d", weight=1))
    for pattern in ("/d/{a,b}", "s3://b/train-{000000..000003}.tar", "{a,b}/x"):
        assert configured(f"data.shards={pattern}").sources == (SourceConfig(url=pattern),)
    assert configured("data.shards=[{url: a}]", "data.mix=[{cycle: 2, weights: [1]}]").mix == (
        MixConfig(cycle=2, weights=(1.0,)),
    )
    two = configured("data.shards=/d/{a,b}", "data.mix=[{cycle: 1, weights: [1, 2]}]")  # how many is known when opened
    assert two.mix[0].weights == (1.0, 2.0)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.shards=[{url: a, weight: -2}]"], "data.shards.0.weight is -2; it must be greater than 0"),
        (["data.shards=[{weight: 2}]"], "data.shards.0.url is missing"),
        (["data.shards=[{url: a, wait: 2}]"], "data.shards.0.wait is not a key"),
        (["data.shards=[a, b]"], "data.shards.0 is 'a'; it must be"),
        (["data.shards=[]"], "data.shards is an empty list"),
        (
            ["data.shards=[{url: a}, {url: b}]", "data.mix=[{cycle: 1, weights: [1]}]"],
            "weight to each of the 2 sources",
        ),
        (["data.shards=a", "data.mix=[{cycle: 0, weights: [1]}]"], "data.mix.0.cycle is 0"),
        (
            ["data.shards=a", "data.mix=[{cycle: 2, weights: [1]}, {cycle: 1, weights: [1]}]"],
            "data.mix has the cycles [2, 1]; they must rise",
        ),
        (["data.shards=a", "data.rate_hz=4", "data.stride=2"], "data.rate_hz is 4 and data.stride 2; one excludes"),
        (["data.shards=a", "data.run_length=3"], "data.run_length is 3; it must divide the videos of a step (8)"),
        (
            ["data.shards=a", "data.run_length=8", "data.clips_per_video=2"],
            "data.run_length is 8; it must divide the videos of a step (4)",
        ),
    ],
)
def test_what_the_config_refuses(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        configured(*overrides)
    text = str(caught.value)
    assert told in text
    assert "function-" not in text
    assert "tuple[" not in text


def test_a_folder_pattern_that_has_another_number_of_sources(data: Data, twelve: Path, packed: Path) -> None:
    (twelve.parent / "other").mkdir()
    for path in packed.iterdir():
        if path.is_file():
            (twelve.parent / "other" / path.name).write_bytes(path.read_bytes())
    pattern = f"{twelve.parent}/{{twelve,other}}"
    with ClipLoader(data(shards=pattern), seed=SEED, global_batch=4) as loader:
        assert loader.num_samples == 37
    config = data(shards=pattern, mix=(MixConfig(cycle=1, weights=(1, 2, 3)),))
    with pytest.raises(UserError, match=r"data\.mix gives 3 weights from cycle 1 on; data\.shards has 2"):
        ClipLoader(config, seed=SEED, global_batch=4)
    sources = (SourceConfig(url=str(twelve), weight=1), SourceConfig(url=str(packed)))
    with pytest.raises(UserError, match="some sources a weight"):
        ClipLoader(data(shards=sources), seed=SEED, global_batch=4)


def test_storage_that_is_away_is_no_fault_of_the_samples(
    data: Data, twelve: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read that gave up is a substitute and does not count; three at one position end the attempt, not the run."""
    order = order_of(twelve, 12)
    reads_of(monkeypatch, lambda sample, before: SampleError("io", "gone") if sample in order[:1] else None)
    config = data(shards=str(twelve), bad_sample_limit=0.0)
    with ClipLoader(config, seed=SEED, global_batch=4, journal=Journal(tmp_path)) as loader:
        take(loader, 6)
        assert loader.stats().substituted == {"io": 2}
    with (
        monkeypatch.context() as patch,
        ClipLoader(config, seed=SEED, global_batch=4, journal=Journal(None)) as loader,
    ):
        reads_of(patch, lambda sample, before: SampleError("io", "gone"))
        with pytest.raises(OSError, match="storage gave up on 3 samples in a row"):
            take(loader, 1)


def test_a_set_of_which_all_is_withdrawn_says_so(data: Data, twelve: Path) -> None:
    withdraw(twelve, *range(12))
    with (
        ClipLoader(data(shards=str(twelve)), seed=SEED, global_batch=4) as loader,
        pytest.raises(UserError, match="were withdrawn"),
    ):
        take(loader, 1)
