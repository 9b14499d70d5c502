"""What must not change the stream, and what is written down where it does: caches, withdrawals, faults, hangs."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.loader import NUM_READERS, ClipLoader
from pretrain.data.rows import Rows
from pretrain.data.source import open_dataset
from pretrain.journal import Journal, JournalRow, read_journal
from pretrain.ledger import SUBSTITUTED, Ledger, commit_lineage
from pretrain.sections import CacheConfig
from pretrain.verdict import EXACT_BUT_LISTED
from shards import retry, storage
from shards.errors import SampleError, UserError
from shards.layout import MANIFEST_NAME
from shards.reader import SplitReader, open_split
from tests.pretrain.data.stream_ranks import Cursor, audit_stream, committed_rows
from tests.pretrain.data.streams import SEED, Data, Sequenced, Streamed, all_rows, damage, kept, order_of, withdraw
from tests.pretrain.data.test_loader import rows_of, take, worker_that

# ------------------------------------------------------------------ what the node keeps


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
