"""The stream of clips is one sequence, whatever the workers, ranks, kills and resumes."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.batch import COLOR_RGB24, ClipBatch
from pretrain.data.augment import to_model_input
from pretrain.data.loader import ClipLoader
from pretrain.journal import Journal, JournalRow
from pretrain.sections import DataConfig
from shards.errors import SampleError, UserError
from shards.order import sample_numbers
from shards.reader import SplitReader, open_split

Data = Callable[..., DataConfig]
ROOT = Path(__file__).parents[3]


def rows_of(batches: Iterable[ClipBatch]) -> list[tuple[Any, ...]]:
    """Everything a clip is, one row per real clip; without the padding, which depends on its neighbours."""
    rows: list[tuple[Any, ...]] = []
    for batch in batches:
        for i in range(len(batch.sample_B)):
            if batch.sample_B[i] < 0:
                continue
            is_rgb = bool(batch.color_B[i] & COLOR_RGB24)
            num_bytes = int(batch.height_B[i] * batch.width_B[i]) * (6 if is_rgb else 3) // 2
            pixels = batch.planes_BTN[i, :, :num_bytes].numpy().tobytes()
            assert not batch.planes_BTN[i, :, num_bytes:].any()
            rows.append(
                (
                    batch.step,
                    int(batch.position_B[i]),
                    int(batch.draw_B[i]),
                    int(batch.epoch_B[i]),
                    int(batch.wanted_B[i]),
                    int(batch.sample_B[i]),
                    int(batch.checksum_B[i]),
                    tuple(batch.frame_numbers_BT[i].tolist()),
                    tuple(batch.crop_B4[i].tolist()),
                    bool(batch.flip_B[i]),
                    int(batch.color_B[i]),
                    hashlib.sha256(pixels).hexdigest(),
                )
            )
    return rows


def take(loader: ClipLoader, num_steps: int) -> list[ClipBatch]:
    return list(itertools.islice(loader, num_steps * loader.num_micro_steps))


@pytest.fixture(scope="session")
def plain(data: Data) -> list[tuple[Any, ...]]:
    """Twelve global batches of six: more than two epochs, in process, one rank."""
    with ClipLoader(data(), seed=3, global_batch=6) as loader:
        return rows_of(take(loader, 12))


# ------------------------------------------------------------------ one sequence


def test_clips_are_what_order_and_index_say(plain: list[tuple[Any, ...]], packed: Path) -> None:
    reader = open_split(str(packed), "train")
    assert 2 * len(reader) < 12 * 6
    epochs, samples = sample_numbers(3, len(reader), np.arange(72))
    assert [row[1] for row in plain] == list(range(72))
    assert [row[3] for row in plain] == epochs.tolist()
    assert [row[4] for row in plain] == [row[5] for row in plain] == samples.tolist()
    assert [row[6] for row in plain] == reader.records["checksum"][samples].tolist()
    for epoch in (0, 1):
        assert sorted(row[5] for row in plain if row[3] == epoch) == list(range(len(reader)))
    assert len({row[7:] for row in plain}) == 72


@pytest.mark.parametrize(("workers", "world_size", "micro_batch"), [(1, 1, 2), (3, 2, 3), (1, 4, 1), (0, 4, 2)])
def test_workers_and_ranks_change_nothing(
    workers: int, world_size: int, micro_batch: int, data: Data, plain: list[tuple[Any, ...]]
) -> None:
    rows: list[tuple[Any, ...]] = []
    for rank in range(world_size):
        with ClipLoader(
            data(workers=workers),
            seed=3,
            global_batch=6,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
        ) as loader:
            batches = take(loader, 4)
            rows += rows_of(batches)
            assert all(len(batch.sample_B) == micro_batch for batch in batches)
            assert [(b.step, b.micro_step) for b in batches] == [
                (step, micro) for step in range(4) for micro in range(loader.num_micro_steps)
            ]
    assert sorted(rows) == plain[:24]


def test_fillers_are_black_weightless_and_last(data: Data) -> None:
    with ClipLoader(data(), seed=3, global_batch=5, micro_batch=2, rank=1, world_size=2) as loader:
        first, second = take(loader, 1)
    assert first.weight_B.tolist() == [1, 0]
    assert second.weight_B.tolist() == [0, 0]
    for bookkeeping in (second.position_B, second.wanted_B, second.sample_B):
        assert bookkeeping.tolist() == [-1, -1]
    assert second.num_real == 0
    black = (0 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    frames_BCTHW = to_model_input(second, 16)
    assert torch.allclose(frames_BCTHW.amax((0, 2, 3, 4)), black, atol=1e-4)
    assert torch.allclose(frames_BCTHW.amin((0, 2, 3, 4)), black, atol=1e-4)


def test_several_clips_of_a_video_share_one_read(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = count_reads(monkeypatch)
    with ClipLoader(data(clips_per_video=3, prefetch_steps=1), seed=3, global_batch=6) as loader:
        batch = next(loader)
        assert batch.position_B.tolist() == [0, 0, 0, 1, 1, 1]
        assert batch.draw_B.tolist() == [0, 1, 2, 0, 1, 2]
        assert len({row[7:9] for row in rows_of([batch])}) > 2
        assert loader.state_dict()["position"] == 2
        take(loader, 3)
    assert len(reads) <= 2 * 5
    with ClipLoader(data(clips_per_video=3), seed=3, global_batch=6, rank=1, world_size=2) as loader:
        assert rows_of(take(loader, 1)) == rows_of([batch])[3:]
    with ClipLoader(data(clips_per_video=3), seed=3, global_batch=6, micro_batch=2) as loader:
        assert rows_of(take(loader, 1)) == rows_of([batch])


def test_decord_delivers_rgb_of_the_same_clips(data: Data, plain: list[tuple[Any, ...]]) -> None:
    with ClipLoader(data(decoder="decord", workers=1), seed=3, global_batch=6) as loader:
        batches = take(loader, 2)
    assert (batches[0].color_B == COLOR_RGB24).all()
    assert [row[1:10] for row in rows_of(batches)] == [row[1:10] for row in plain[:12]]
    with ClipLoader(data(), seed=3, global_batch=6) as loader:
        theirs = to_model_input(take(loader, 1)[0], 32)
    assert (to_model_input(batches[0], 32) - theirs).abs().mean() < 0.15


def test_batches_are_the_callers_to_keep(data: Data, plain: list[tuple[Any, ...]]) -> None:
    with ClipLoader(data(workers=1), seed=3, global_batch=6) as loader:
        kept = take(loader, 4)
        take(loader, 4)
    assert rows_of(kept) == plain[:24]


# ------------------------------------------------------------------ state


@pytest.mark.parametrize("num_steps", [0, 1, 5, 11])
def test_a_resumed_loader_goes_on_where_the_state_says(
    num_steps: int, data: Data, plain: list[tuple[Any, ...]]
) -> None:
    with ClipLoader(data(workers=1), seed=3, global_batch=6, micro_batch=3) as loader:
        take(loader, num_steps)
        state = json.loads(json.dumps(loader.state_dict()))
    assert state["position"] == num_steps * 6
    with ClipLoader(data(), seed=3, global_batch=6, micro_batch=2) as loader:
        loader.load_state_dict(state)
        assert rows_of(take(loader, 12 - num_steps)) == plain[num_steps * 6 :]


def test_the_state_after_a_batch_covers_that_batch(data: Data) -> None:
    with ClipLoader(data(), seed=3, global_batch=6) as loader:
        for number, _batch in zip(range(1, 4), loader, strict=False):
            assert loader.state_dict()["position"] == 6 * number


def test_amid_a_step_the_state_is_its_beginning(data: Data, plain: list[tuple[Any, ...]]) -> None:
    with ClipLoader(data(), seed=3, global_batch=6, micro_batch=2) as loader:
        positions = [(next(loader), loader.state_dict()["position"])[1] for _ in range(7)]
        assert positions == [0, 0, 6, 6, 6, 12, 12]
        state = loader.state_dict()
        loader.load_state_dict(state)
        assert rows_of(take(loader, 1)) == plain[12:18]


def test_a_loader_can_go_back_and_forth(data: Data, plain: list[tuple[Any, ...]]) -> None:
    with ClipLoader(data(workers=2), seed=3, global_batch=6) as loader:
        start = loader.state_dict()
        take(loader, 3)
        later = loader.state_dict()
        loader.load_state_dict(start)
        assert rows_of(take(loader, 2)) == plain[:12]
        loader.load_state_dict(later)
        assert rows_of(take(loader, 2)) == plain[18:30]


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 4), ("order_version", 0), ("position", 7)],
)
def test_a_foreign_state_is_refused(key: str, value: Any, data: Data) -> None:
    with ClipLoader(data(), seed=3, global_batch=6) as loader:
        state = loader.state_dict()
        with pytest.raises(UserError, match=str(value)) as caught:
            loader.load_state_dict({**state, key: value})
    assert key in str(caught.value)
    assert str(6 if key == "position" else state[key]) in str(caught.value)


def test_resuming_reads_nothing_that_is_finished(data: Data, monkeypatch: pytest.MonkeyPatch, packed: Path) -> None:
    with ClipLoader(data(), seed=3, global_batch=6) as loader:
        take(loader, 3)
        state = loader.state_dict()
    reads = count_reads(monkeypatch)
    with ClipLoader(data(prefetch_steps=1), seed=3, global_batch=6) as loader:
        loader.load_state_dict(state)
        next(loader)
    _, ahead = sample_numbers(3, len(open_split(str(packed), "train")), np.arange(18, 30))
    assert set(reads) <= set(ahead.tolist())


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    reads: list[int] = []
    plain_read = SplitReader.read_group

    def read(self: SplitReader, samples: Sequence[int]) -> list[bytes | SampleError]:
        reads.extend(samples)
        return plain_read(self, samples)

    monkeypatch.setattr(SplitReader, "read_group", read)
    return reads


@pytest.mark.parametrize("prefetch_steps", [1, 3])
def test_prefetching_is_bounded_in_global_steps(
    prefetch_steps: int, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = count_reads(monkeypatch)
    with ClipLoader(data(prefetch_steps=prefetch_steps), seed=3, global_batch=4, micro_batch=2) as loader:
        for number in range(1, 6):
            next(loader)
            limit = 4 * ((number - 1) // 2 + 1 + prefetch_steps)
            end_s = time.monotonic() + 20
            while len(reads) < limit and time.monotonic() < end_s:
                time.sleep(0.01)
            time.sleep(0.1)
            assert len(reads) == limit


def test_a_number_of_clips_ends_the_stream_and_starts_it_over(data: Data) -> None:
    with ClipLoader(data(), seed=3, global_batch=4, micro_batch=2, num_clips=7) as loader:
        once, again = list(loader), list(loader)
    assert [batch.step for batch in once] == [0, 0, 1, 1]
    assert [batch.num_real for batch in once] == [2, 2, 2, 1]
    assert rows_of(once) == rows_of(again)


def test_stats_count_since_the_last_call(data: Data) -> None:
    with ClipLoader(data(stride=8, workers=1), seed=3, global_batch=6) as loader:
        take(loader, 2)
        stats = loader.stats()
        assert stats.num_clips == 12
        assert stats.stride_dropped >= 1
        assert min(stats.wait_s, stats.decode_s, stats.bytes_read) > 0
        assert stats.substituted == {}
        assert stats.num_respawns == 0
        assert loader.stats().num_clips == 0


# ------------------------------------------------------------------ workers that die and hang


def test_a_killed_worker_loses_nothing(data: Data, plain: list[tuple[Any, ...]]) -> None:
    journal = Journal(None)
    with ClipLoader(data(workers=2), seed=3, global_batch=6, journal=journal) as loader:
        batches = take(loader, 2)
        num_killed = 0
        for _ in range(2):  # far enough apart that no clip meets both: a clip whose decoder dies twice is replaced
            os.kill(loader.worker_pids[0], signal.SIGKILL)
            num_killed += 1
            batches += take(loader, 5)
        stats = loader.stats()
    assert rows_of(batches) == plain
    assert 1 <= stats.num_respawns <= num_killed
    assert stats.substituted == {}


def test_workers_ignore_the_signals_of_the_trainer(data: Data) -> None:
    with ClipLoader(data(workers=2), seed=3, global_batch=6) as loader:
        take(loader, 1)
        pids = loader.worker_pids
        assert len(pids) == 2
        for pid, number in itertools.product(pids, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)):
            os.kill(pid, number)
        take(loader, 2)
        assert loader.worker_pids == pids


def worker_that(code: str) -> list[str]:
    """The real worker with other code around its decoder: `trap(video)` runs before each decode."""
    script = """
        import sys, zlib
        import pretrain.data.worker as worker
        plain = worker.decode_frames
        {code}
        def decode_frames(video, *rest):
            trap(video)
            return plain(video, *rest)
        worker.decode_frames = decode_frames
        worker.main(sys.argv[1:])
    """
    code = textwrap.indent(textwrap.dedent(code), " " * 8)
    return [sys.executable, "-c", textwrap.dedent(script).replace("{code}", textwrap.dedent(code))]


HANG = """
import ctypes
def trap(video):
    if zlib.crc32(video) in {crcs}:
        ctypes.PyDLL(None).sleep(1000)  # a PyDLL call keeps the interpreter locked, as decord does
"""


def crc_of(packed: Path, sample: int) -> int:
    return int(open_split(str(packed), "train").records["checksum"][sample])


@pytest.mark.slow
def test_a_worker_that_hangs_is_killed_and_its_clip_replaced(
    data: Data, packed: Path, tmp_path: Path, plain: list[tuple[Any, ...]]
) -> None:
    bad_sample = plain[2][5]
    command = worker_that(HANG.replace("{crcs}", str([crc_of(packed, bad_sample)])))
    journal = Journal(tmp_path / "journal")
    settings = data(workers=2, decode_deadline_s=3.0)
    with ClipLoader(settings, seed=3, global_batch=6, journal=journal, worker_command=command) as loader:
        (batch,) = take(loader, 1)
        rows = rows_of([batch])
        stats = loader.stats()
        assert stats.substituted == {"deadline": 1}
        take(loader, 8)  # both decoders are needed again
        assert loader.stats().num_respawns >= 1
    row = journal.find(2)
    assert row == JournalRow(2, bad_sample, int(batch.sample_B[2]), "deadline")
    assert batch.wanted_B[2] == bad_sample != batch.sample_B[2]
    assert rows[:2] + rows[3:] == plain[:2] + plain[3:6]


def test_a_sample_that_kills_its_worker_twice_is_replaced(
    data: Data, packed: Path, plain: list[tuple[Any, ...]]
) -> None:
    bad_sample = plain[0][5]
    trap = (
        f"def trap(video):\n    if zlib.crc32(video) == {crc_of(packed, bad_sample)}:\n        import os; os._exit(9)"
    )
    with ClipLoader(data(workers=1), seed=3, global_batch=6, worker_command=worker_that(trap)) as loader:
        (batch,) = take(loader, 1)
        stats = loader.stats()
    assert stats.substituted == {"died": 1}
    assert stats.num_respawns == 2
    assert rows_of([batch])[1:] == plain[1:6]


def test_a_worker_that_cannot_start_is_an_error_at_once(data: Data) -> None:
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    with (
        ClipLoader(data(workers=1), seed=3, global_batch=6, worker_command=command) as loader,
        pytest.raises(UserError, match="exit code 7"),
    ):
        next(loader)


def test_workers_import_neither_torch_nor_config(data: Data, tmp_path: Path) -> None:
    trap = f"def trap(video):\n    print(*sys.modules, file=open({str(tmp_path / 'modules')!r}, 'a'), flush=True)"
    with ClipLoader(data(workers=1), seed=3, global_batch=6, worker_command=worker_that(trap)) as loader:
        next(loader)
    modules = set((tmp_path / "modules").read_text().splitlines()[0].split())
    assert {"pretrain.data.worker", "pretrain.data.decode", "numpy", "av"} <= modules
    assert not {"torch", "pretrain.config", "pretrain.batch", "pydantic", "fsspec", "decord", "webdataset"} & modules


def has_ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_for(condition: Callable[[], bool], limit_s: float = 20.0) -> bool:
    end_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.02)
    return True


def test_closing_leaves_no_process_and_no_descriptor_behind(data: Data) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        loader = ClipLoader(data(workers=2), seed=3, global_batch=6)
        take(loader, 1)
        pids = loader.worker_pids
        assert len(pids) == 2
        loader.close()
        assert all(has_ended(pid) for pid in pids)
        assert loader.worker_pids == []
        loader.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_forgotten_loader_ends_its_workers(data: Data) -> None:
    loader = ClipLoader(data(workers=2), seed=3, global_batch=6)
    take(loader, 1)
    pids = loader.worker_pids
    del loader
    gc.collect()
    assert wait_for(lambda: all(has_ended(pid) for pid in pids))


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True], ids=["idle", "hung"])
def test_a_killed_trainer_leaves_no_worker_behind(hangs: bool, data: Data, tmp_path: Path) -> None:
    command = worker_that("import ctypes\ndef trap(video): ctypes.PyDLL(None).sleep(1000)") if hangs else None
    script = f"""
        import time
        from pretrain.sections import DataConfig
        from pretrain.data.loader import ClipLoader
        data = DataConfig.model_validate({data(workers=2, decode_deadline_s=500).model_dump()!r})
        loader = ClipLoader(data, seed=3, global_batch=6, worker_command={command!r})
        if not {hangs}:
            next(loader)
        else:
            loader._prefetch(2)
        while len(loader.worker_pids) < 2:
            time.sleep(0.02)
        time.sleep(0.5)
        print(*loader.worker_pids, flush=True)
        time.sleep(1000)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    try:
        assert select.select([parent.stdout], [], [], 120)[0]
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(has_ended(pid) for pid in pids)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    assert wait_for(lambda: all(has_ended(pid) for pid in pids))


# ------------------------------------------------------------------ samples that cannot be used


def damage(folder: Path, sample: int) -> None:
    """Flip bytes in the middle of a sample inside its tar."""
    reader = open_split(str(folder), "train")
    record = reader.records[sample]
    tar = folder / reader.split.shards[int(record["shard"])].name
    content = bytearray(tar.read_bytes())
    middle = int(record["offset"]) + int(record["size"]) // 2
    content[middle : middle + 20] = bytes(b ^ 0xFF for b in content[middle : middle + 20])
    tar.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_is_replaced_written_down_and_stays_replaced(
    workers: int, data: Data, packed: Path, packed_copy: Path, tmp_path: Path, plain: list[tuple[Any, ...]]
) -> None:
    bad_position = 8
    bad_sample = plain[bad_position][5]
    damage(packed_copy, bad_sample)
    settings = data(shards=str(packed_copy), workers=workers)
    with ClipLoader(settings, seed=3, global_batch=6, journal=Journal(tmp_path / "journal")) as loader:
        batches = take(loader, 1)
        assert list((tmp_path / "journal").glob("*")) == []  # prefetched is not handed out
        batches += take(loader, 1)
        (file,) = (tmp_path / "journal").glob("*.jsonl")
        (line,) = file.read_text().splitlines()
        state = loader.state_dict()
        batches += take(loader, 4)
        assert loader.stats().substituted == {"checksum": sum(row[5] == bad_sample for row in plain[:36])}
    rows = rows_of(batches)
    substitute = rows[bad_position][5]
    row = {"position": bad_position, "wanted": bad_sample, "substitute": substitute, "reason": "checksum"}
    assert json.loads(line) == row
    assert substitute != bad_sample
    assert [r for r in rows if r[4] != bad_sample] == [r for r in plain[:36] if r[4] != bad_sample]
    record_checksums = open_split(str(packed), "train").records["checksum"]
    assert all(r[6] == record_checksums[r[5]] for r in rows)

    # The disk is mended; the run is not rewritten: rows found are obeyed without trying the sample.
    for again_at, expected in ((0, rows[:12]), (2, rows[12:24])):
        with ClipLoader(
            data(workers=workers), seed=3, global_batch=6, journal=Journal(tmp_path / "journal", 1)
        ) as loader:
            loader.load_state_dict(
                {**state, "position": again_at * 6, "journal_digest": digest(tmp_path, again_at * 6)}
            )
            assert rows_of(take(loader, 2)) == expected


def digest(tmp_path: Path, position: int) -> str:
    return Journal(tmp_path / "journal").digest(position)


def test_a_journal_row_is_obeyed_without_trying_the_sample(
    data: Data, monkeypatch: pytest.MonkeyPatch, plain: list[tuple[Any, ...]]
) -> None:
    journal = Journal(None)
    wanted, other = plain[1][5], plain[4][5]
    journal.add(JournalRow(1, wanted, other, "deadline"))
    reads = count_reads(monkeypatch)
    with ClipLoader(data(prefetch_steps=1), seed=3, global_batch=2, journal=journal, num_clips=2) as loader:
        (batch,) = list(loader)
        assert loader.stats().substituted == {"deadline": 1}
    assert batch.sample_B.tolist() == [plain[0][5], other]
    assert batch.wanted_B.tolist() == [plain[0][5], wanted]
    assert wanted not in reads


def test_a_substitute_that_fails_later_gets_a_substitute_of_its_own(
    data: Data, packed_copy: Path, plain: list[tuple[Any, ...]]
) -> None:
    journal = Journal(None)
    wanted, other = plain[1][5], plain[4][5]
    journal.add(JournalRow(1, wanted, other, "deadline"))
    damage(packed_copy, other)
    settings = data(shards=str(packed_copy), bad_sample_limit=0.5)
    with ClipLoader(settings, seed=3, global_batch=2, journal=journal, num_clips=2) as loader:
        (batch,) = list(loader)
    row = journal.find(1)
    assert row is not None
    assert row.reason == "checksum"
    assert row.wanted == wanted
    assert row.substitute == int(batch.sample_B[1]) not in (wanted, other)


def test_the_clips_of_a_video_stay_together_when_a_fault_passes(
    data: Data, monkeypatch: pytest.MonkeyPatch, plain: list[tuple[Any, ...]]
) -> None:
    """The first read of a sample fails, the next one, for another clip of the same position, would succeed."""
    wanted = plain[0][5]
    faults = [SampleError("io", "a fault that passes")]
    plain_read = SplitReader.read_group

    def read(self: SplitReader, samples: Sequence[int]) -> list[bytes | SampleError]:
        return [faults.pop() if sample == wanted and faults else plain_read(self, [sample])[0] for sample in samples]

    monkeypatch.setattr(SplitReader, "read_group", read)
    journal = Journal(None)
    settings = data(clips_per_video=4)
    with ClipLoader(settings, seed=3, global_batch=8, micro_batch=1, journal=journal) as loader:
        rows = rows_of(take(loader, 1))
    row = journal.find(0)
    assert row is not None
    assert row.reason == "io"
    assert [r[5] for r in rows[:4]] == [row.substitute] * 4
    assert len({r[7:] for r in rows[:4]}) == 4
    assert [r[5] for r in rows[4:]] == [plain[1][5]] * 4


@pytest.mark.parametrize("is_read_only", [False, True])
def test_a_sample_that_failed_later_is_still_used_before(
    is_read_only: bool, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: list[tuple[Any, ...]]
) -> None:
    """A run given the journal is the run that wrote it: a step from before the first failure is not another one now."""
    victim, has_failed = plain[0][5], [False]
    plain_read = SplitReader.read_group

    def read(self: SplitReader, samples: Sequence[int]) -> list[bytes | SampleError]:
        found = plain_read(self, samples)
        fault = SampleError("deadline", "took too long")
        return [
            fault if sample == victim and has_failed[0] else one for sample, one in zip(samples, found, strict=True)
        ]

    monkeypatch.setattr(SplitReader, "read_group", read)
    with ClipLoader(data(), seed=3, global_batch=6, journal=Journal(tmp_path, 1)) as loader:
        rows = rows_of(take(loader, 1))
        has_failed[0] = True
        loader.go_to_step(1)
        rows += rows_of(take(loader, 11))
    has_failed[0] = False
    assert rows[0][5] == victim
    assert {row[3] for row in rows if row[5] != row[4] == victim} >= {1}
    journal = Journal(tmp_path, 2, is_read_only=is_read_only)
    with ClipLoader(data(), seed=3, global_batch=6, journal=journal) as loader:
        assert rows_of(take(loader, 12)) == rows


def test_a_sample_another_rank_used_after_it_failed_is_replayed(
    data: Data, tmp_path: Path, plain: list[tuple[Any, ...]]
) -> None:
    """Rank 0 gave the sample up in the first epoch; rank 1 did not know and used it in the second."""
    wanted = plain[0][5]
    Journal(tmp_path, 1).add(JournalRow(0, wanted, plain[1][5], "deadline"))
    with ClipLoader(data(), seed=3, global_batch=6, journal=Journal(tmp_path, is_read_only=True)) as loader:
        rows = rows_of(take(loader, 12))
    assert [row[5] for row in rows[1:]] == [row[5] for row in plain[1:]]


def test_a_journal_of_other_data_harms_nothing(data: Data, tmp_path: Path, plain: list[tuple[Any, ...]]) -> None:
    """A start that died before its first checkpoint mixed two data sets; the next one has one."""
    Journal(tmp_path, 1).add(JournalRow(3, 1 << 40, 5, "decode"))
    with ClipLoader(data(), seed=3, global_batch=6, journal=Journal(tmp_path, 2)) as loader:
        assert rows_of(take(loader, 2)) == plain[:12]


def test_too_many_unusable_samples_stop_the_run_by_name(data: Data, packed_copy: Path) -> None:
    reader = open_split(str(packed_copy), "train")
    keys = [reader.key(sample) for sample in (0, 1, 2)]
    for sample in (0, 1, 2):
        damage(packed_copy, sample)
    settings = data(shards=str(packed_copy), bad_sample_limit=2 / len(reader))
    with ClipLoader(settings, seed=3, global_batch=6) as loader, pytest.raises(UserError) as caught:
        take(loader, len(reader))
    assert all(key in str(caught.value) for key in keys)
    assert "bad_sample_limit" in str(caught.value)
    assert "checksum" in str(caught.value)
    with ClipLoader(settings.model_copy(update={"bad_sample_limit": 0.5}), seed=3, global_batch=6) as loader:
        take(loader, len(reader))


def test_a_short_video_is_replaced_unless_it_may_loop(data: Data, packed: Path) -> None:
    records = open_split(str(packed), "train").records
    (short,) = np.flatnonzero(records["num_frames"] < 12)
    num_steps = -(-len(records) // 6)
    with ClipLoader(data(frames=12, stride=2), seed=3, global_batch=6) as loader:
        rows = rows_of(take(loader, num_steps))
        stats = loader.stats()
    assert stats.substituted["short"] == sum(row[4] == short for row in rows) >= 1
    assert all(row[5] != short for row in rows)
    with ClipLoader(data(frames=12, stride=2, short="loop"), seed=3, global_batch=6) as loader:
        rows = rows_of(take(loader, num_steps))
        assert loader.stats().substituted == {}
    assert next(row[7][:11] for row in rows if row[5] == short) == (*range(10), 0)


def test_a_larger_substitute_still_fits(data: Data, packed_copy: Path) -> None:
    """A batch is as wide as the samples that were wanted; what replaces them may be larger."""
    records = open_split(str(packed_copy), "train").records
    sizes = records["height"].astype(int) * records["width"]
    small = int(np.argmin(sizes))
    damage(packed_copy, small)
    settings = data(shards=str(packed_copy))
    widths: set[int] = set()
    with ClipLoader(settings, seed=3, global_batch=1) as loader:
        for batch in take(loader, 6 * len(records)):
            assert batch.planes_BTN.shape[2] == int(batch.height_B[0] * batch.width_B[0]) * 3 // 2
            if batch.wanted_B[0] == small:
                assert batch.sample_B[0] != small
                assert int(batch.height_B[0] * batch.width_B[0]) == sizes[int(batch.sample_B[0])]
                widths.add(batch.planes_BTN.shape[2])
    assert max(widths) > sizes[small] * 3 // 2


def test_a_missing_decord_is_said_at_once(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install decord2"):
        ClipLoader(data(decoder="decord"), seed=0, global_batch=6)


def test_settings_that_cannot_work_are_named(data: Data) -> None:
    with pytest.raises(UserError, match=r"data\.frames is 90.*24"):
        ClipLoader(data(frames=90), seed=0, global_batch=6)
    with pytest.raises(UserError, match=r"global_batch is 5.*multiple of data\.clips_per_video"):
        ClipLoader(data(clips_per_video=2), seed=0, global_batch=5)
    with pytest.raises(UserError, match=r"micro_batch is 3"):
        ClipLoader(data(clips_per_video=2), seed=0, global_batch=6, micro_batch=3, world_size=2)
    with pytest.raises(UserError, match=r"number of ranks, 9"):
        ClipLoader(data(), seed=0, global_batch=6, world_size=9)
    with pytest.raises(UserError, match="no split 'nothing'"):
        ClipLoader(data(split="nothing"), seed=0, global_batch=6)


# ------------------------------------------------------------------ plain PyTorch


def test_the_readme_loop_in_plain_pytorch(packed: Path) -> None:
    from pretrain.data.augment import to_model_input
    from pretrain.data.loader import ClipLoader
    from pretrain.sections import DataConfig

    loader = ClipLoader(DataConfig(shards=str(packed), frames=4, workers=1), seed=0, global_batch=8)
    for batch in loader:
        clips_BCTHW = to_model_input(batch, size=112)
        state = loader.state_dict()
        break
    loader.close()
    assert clips_BCTHW.shape == (8, 3, 4, 112, 112)
    assert state["position"] == 8
