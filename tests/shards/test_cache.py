from __future__ import annotations

import hashlib
import logging
import os
import random
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import pytest

from shards import cache, storage
from shards.cache import SampleCache, node_copy
from shards.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def sample(number: int, size: int = 1000) -> bytes:
    return random.Random(number).randbytes(size)


def get(kept: SampleCache, number: int, size: int = 1000) -> bytes | None:
    return kept.get(f"sample-{number}", size, zlib.crc32(sample(number, size)))


def put(kept: SampleCache, number: int, size: int = 1000) -> None:
    kept.put(f"sample-{number}", sample(number, size))


def files_of(kept: SampleCache) -> list[Path]:
    return [path for path in kept.folder.rglob("*") if path.is_file() and path.name != "usage"]


def bytes_of(kept: SampleCache) -> int:
    return sum(path.stat().st_size for path in files_of(kept))


def test_what_was_put_is_found_also_by_the_next_process(tmp_path: Path) -> None:
    kept = SampleCache(tmp_path / "cache", 10_000)
    assert get(kept, 1) is None
    put(kept, 1)
    put(kept, 1)
    assert get(kept, 1) == sample(1)
    assert get(SampleCache(tmp_path / "cache", 10_000), 1) == sample(1)
    assert (kept.counters.num_hits, kept.counters.num_misses, kept.counters.num_puts) == (1, 1, 1)
    assert kept.folder.stat().st_mode & 0o777 == 0o700
    assert bytes_of(kept) == 1000


@pytest.mark.parametrize("harm", ["flipped", "cut", "longer", "empty"])
def test_a_damaged_sample_is_removed_and_counted(tmp_path: Path, harm: str) -> None:
    kept = SampleCache(tmp_path, 1_000)
    put(kept, 1)
    [path] = files_of(kept)
    data = sample(1)
    path.write_bytes({"flipped": data[:-1] + b"?", "cut": data[:-1], "longer": data + b"?", "empty": b""}[harm])
    kept_bytes = path.stat().st_size
    assert get(kept, 1) is None
    assert kept.counters.num_bad == 1
    assert not path.exists()
    with kept._usage() as usage:
        assert usage is not None
        assert usage.num_bytes == 1000 - kept_bytes


def test_a_full_cache_keeps_what_it_has(tmp_path: Path) -> None:
    kept = SampleCache(tmp_path, 10_000)
    for number in range(20):
        put(kept, number)
    assert bytes_of(kept) == 10_000
    assert [get(kept, number) is not None for number in range(20)] == [True] * 10 + [False] * 10
    assert kept.counters.num_refused == 10
    assert kept.counters.num_evicted == 0


def test_half_a_cache_answers_half_of_an_epoch(tmp_path: Path) -> None:
    kept, draw = SampleCache(tmp_path, 100 * 50), random.Random(0)
    for _ in range(4):
        kept.counters.num_hits = 0
        for number in draw.sample(range(100), 100):
            if get(kept, number, 100) is None:
                put(kept, number, 100)
    assert kept.counters.num_hits == 50


def test_what_nobody_uses_gives_way(tmp_path: Path) -> None:
    kept = SampleCache(tmp_path, 10_000)
    for number in range(10):
        put(kept, number)
    old_s = time.time() - cache.UNUSED_S - 10
    for path in files_of(kept):
        os.utime(path, (old_s, old_s))
    assert get(kept, 3) == sample(3)  # now it is in use again
    kept = SampleCache(tmp_path, 10_000)
    for number in range(10, 2000):  # each looks at a few buckets only
        put(kept, number)
        assert bytes_of(kept) <= 10_000 or number % 100
    assert kept.counters.num_evicted == 9
    assert get(kept, 3) == sample(3)
    assert len(files_of(kept)) == 10


def test_a_smaller_limit_holds_from_the_next_start_on(tmp_path: Path) -> None:
    kept = SampleCache(tmp_path, 10_000)
    for number in range(10):
        put(kept, number)
    kept = SampleCache(tmp_path, 4_500)
    assert bytes_of(kept) == 4_000
    put(kept, 99, 5_000)
    assert kept.counters.num_refused == 1


def test_a_bucket_without_anything_unused_is_not_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = SampleCache(tmp_path, 1_000)
    put(kept, 0)
    looked: list[Path] = []
    real = cache._scan
    monkeypatch.setattr(cache, "_scan", lambda folder: looked.append(folder) or real(folder))
    for number in range(1, 1000):
        put(kept, number)
    assert len(looked) == len(set(looked)) == cache.NUM_BUCKETS


@pytest.mark.parametrize("usage", [b"", b"what\x00is this", b"12"])
def test_a_lost_count_is_made_again(tmp_path: Path, usage: bytes) -> None:
    kept = SampleCache(tmp_path, 10_000)
    for number in range(10):
        put(kept, number)
    (kept.folder / "usage").write_bytes(usage)
    put(kept, 10)
    assert kept.counters.num_refused == 1
    assert bytes_of(kept) == 10_000


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    kept = SampleCache(tmp_path, 10_000)
    put(kept, 1)
    [path] = files_of(kept)
    old, young = (path.with_name(f"x.{number}.1.tmp") for number in (1, 2))
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    long_ago_s = time.time() - cache.RECOUNT_S - 10
    os.utime(old, (long_ago_s, long_ago_s))
    (kept.folder / "usage").unlink()
    kept = SampleCache(tmp_path, 10_000)
    assert not old.exists()
    assert young.exists()
    assert get(kept, 1) == sample(1)


def test_a_full_disk_is_counted_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = SampleCache(tmp_path, 10_000)
    put(kept, 1)

    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Path, "write_bytes", full)
        patch.setattr(cache, "PAUSE_S", 0.0)
        for number in range(2, 5):
            put(kept, number)
    assert kept.counters.num_errors == 3
    assert [record.message for record in caplog.records if "No space" in record.message]
    assert len(caplog.records) == 1
    assert get(kept, 1) == sample(1)
    put(kept, 6)  # room again
    assert get(kept, 6) == sample(6)
    assert bytes_of(kept) == 2_000
    with kept._usage() as usage:
        assert usage is not None
        assert usage.num_bytes == 2_000


def test_a_faulty_disk_is_left_alone_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, calls = SampleCache(tmp_path, 10_000), []

    def broken(path: Path, data: bytes) -> int:
        calls.append(path)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "write_bytes", broken)
    for number in range(5):
        put(kept, number)
    assert len(calls) == kept.counters.num_errors == 1


def test_a_place_that_is_no_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    kept = SampleCache(tmp_path / "file", 10_000)
    put(kept, 1)
    assert get(kept, 1) is None
    assert kept.counters.num_errors == 1
    assert "is not used" in caplog.text


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.getuid()
    monkeypatch.setattr(cache.os, "getuid", lambda: user + 1)
    kept = SampleCache(tmp_path, 10_000)
    put(kept, 1)
    assert get(kept, 1) is None
    assert files_of(kept) == []


RANK = """
import random, sys, zlib
from pathlib import Path
from shards.cache import SampleCache
kept = SampleCache(Path(sys.argv[1]), 100_000)
draw = random.Random(int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
while True:
    number = draw.randrange(300)
    data = random.Random(number).randbytes(1000)
    found = kept.get(f"sample-{number}", 1000, zlib.crc32(data))
    assert found in (None, data)
    if found is None:
        kept.put(f"sample-{number}", data)
    assert not kept.counters.num_errors and not kept.counters.num_bad
    if kept.counters.num_hits > 1000:
        sys.exit()
"""


def test_several_processes_share_it_and_may_be_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT}
    with ExitStack() as at_end:
        ranks = [at_end.enter_context(subprocess.Popen([*command, str(rank)], **pipes)) for rank in range(4)]
        for rank in ranks:
            assert rank.stdout.readline() == b"ready\n"
        for rank in ranks:
            rank.stdin.write(b"go\n")
            rank.stdin.flush()
        time.sleep(0.02)
        ranks[0].kill()
        assert [rank.wait(60) for rank in ranks][1:] == [0, 0, 0]
    kept = SampleCache(tmp_path, 100_000)
    assert 90_000 <= bytes_of(kept) <= 100_000
    assert kept.counters.num_errors == 0


@pytest.fixture
def remote() -> Any:
    filesystem: Any = fsspec.filesystem("memory")
    content = random.Random(5).randbytes(100_000)
    filesystem.pipe("/copies/train.index", content)
    yield content
    filesystem.rm("/copies", recursive=True)


URL = "memory://copies/train.index"


def test_a_file_is_fetched_once_for_all(tmp_path: Path, remote: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BLOCK_BYTES", 9_999)
    digest = hashlib.sha256(remote).hexdigest()
    before = storage.counters.num_bytes
    with ThreadPoolExecutor(6) as pool:  # flock keeps out threads as well: each opens the lock file for itself
        paths = set(pool.map(lambda _: node_copy(URL, digest, len(remote), tmp_path / "node"), range(6)))
    [path] = paths
    assert path.read_bytes() == remote
    assert storage.counters.num_bytes - before == len(remote)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert node_copy(URL, digest, len(remote), tmp_path / "node") == path
    assert not [file for file in path.parent.iterdir() if file.name.endswith(".part")]


def test_blocks_are_read_ahead_but_not_all(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def read(offset: int) -> bytes:
        with lock:
            begun.append(offset)
        return bytes([offset])

    blocks = cache._ahead(read, range(50))
    assert next(blocks) == b"\x00"
    assert len(begun) <= cache.BLOCKS_AT_A_TIME
    assert b"".join(blocks) == bytes(range(1, 50))


def test_another_file_than_the_one_meant_is_refused(tmp_path: Path, remote: bytes) -> None:
    digest = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(storage.ChangedObjectError, match="does not have the hash"):
        node_copy(URL, digest, len(remote), tmp_path)
    with pytest.raises(storage.ChangedObjectError, match="has 100000 bytes, its manifest says 5"):
        node_copy(URL, digest, 5, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_half_a_copy_is_fetched_again(tmp_path: Path, remote: bytes) -> None:
    digest = hashlib.sha256(remote).hexdigest()
    (tmp_path / f"{digest}.train.index").write_bytes(remote[:50])
    (tmp_path / f".{digest}.train.index.part").write_bytes(remote[:50])
    assert node_copy(URL, digest, len(remote), tmp_path).read_bytes() == remote


def test_a_local_file_stays_where_it_is(tmp_path: Path) -> None:
    assert node_copy(f"{tmp_path}/a", "", 1, tmp_path / "node") == tmp_path / "a"
    assert not (tmp_path / "node").exists()


def test_a_copy_in_a_folder_of_another_user_is_not_trusted(
    tmp_path: Path, remote: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write there could leave another file under the right name and size: a copy is not hashed again."""
    digest = hashlib.sha256(remote).hexdigest()
    user = os.getuid()
    monkeypatch.setattr(cache.os, "getuid", lambda: user + 1)
    with pytest.raises(UserError, match=r"another user.*data\.cache"):
        node_copy(URL, digest, len(remote), tmp_path)
