"""What a node keeps of the data: samples shared by its ranks, and whole files that are fetched once.

    SampleCache  folder/samples/usage          bytes kept, when they were last counted (one line; flock guards it)
                 folder/samples/3f0/NAMEHASH   one file per sample, in 4,096 buckets
    node_copy    folder/SHA256.NAME            the rank that holds folder/.SHA256.NAME.lock fetches, the others wait

Nothing here decides what is read, only from where: with or without a cache the order is the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import heapq
import logging
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from shards import storage
from shards.errors import UserError

UNUSED_S = 6 * 3600.0
"""A kept sample may be replaced when nobody used it for this long."""
RECOUNT_S = 3600.0
PAUSE_S = 60.0
"""How long a faulty disk is left alone."""
LOCK_S = 0.05
NUM_BUCKETS = 4096
BUCKETS_PER_PUT = 8
BLOCK_BYTES = 16 * 2**20
BLOCKS_AT_A_TIME = 4
TEMPORARY = ".tmp"

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class CacheCounters:
    """What this process found in the cache.

    `num_refused`: samples for which there was no room. `num_bad`: kept files that were not what they should be, and
    were removed. `num_errors`: faults of the disk.
    """

    num_hits: int = 0
    num_misses: int = 0
    num_puts: int = 0
    num_refused: int = 0
    num_evicted: int = 0
    num_bad: int = 0
    num_errors: int = 0


@dataclass
class _Usage:
    num_bytes: int
    counted_s: float


class SampleCache:
    """Samples by name on a disk of this node; any number of processes and threads share one folder.

    Never raises for a full or broken disk: it counts, warns once, and the samples come from storage.

    A full cache keeps what it has: a newcomer only replaces samples that nobody used for UNUSED_S. An epoch reads every
    sample once, in a new order. There a cache for half of the samples that keeps what it has answers half of the reads;
    one that drops the least recently used answers an eighth, since what it drops is what comes next.

    Stays within `max_bytes` (file sizes), but for one sample per process that was writing while another process
    counted what is there; that is done at the start of a process, at most once an hour.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder / "samples"
        self.max_bytes = max_bytes
        self.counters = CacheCounters()
        self._lock = threading.Lock()
        self._warned = False
        self._paused_until_s = {"get": 0.0, "put": 0.0}
        # From when on a bucket may hold something unused. 0: never looked at.
        self._unused_from_s = [(0.0, f"{number:03x}") for number in range(NUM_BUCKETS)]
        self._usable = self._guarded("put", self._open, False)

    def get(self, name: str, size: int, checksum: int) -> bytes | None:
        """The sample of that name, None if it is not kept or not what it should be (`checksum`: zlib.crc32)."""
        data = None
        if self._usable:
            data = self._guarded("get", lambda: self._read(self._path(name), size, checksum), None)
        self._count("num_misses" if data is None else "num_hits")
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keep a sample if there is room for it."""
        if self._usable:
            self._guarded("put", lambda: self._keep(self._path(name), data), None)

    def _path(self, name: str) -> Path:
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return self.folder / digest[:3] / digest[3:]

    def _open(self) -> bool:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{self.folder} belongs to another user")
        self.folder.chmod(0o700)
        with self._usage() as usage:
            if usage is not None:  # else another process is counting
                if abs(time.time() - usage.counted_s) > RECOUNT_S:
                    self._recount(usage)
                for number in range(NUM_BUCKETS):
                    if usage.num_bytes <= self.max_bytes:
                        break
                    self._evict(f"{number:03x}", usage, 0, time.time())
        return True

    def _read(self, path: Path, size: int, checksum: int) -> bytes | None:
        try:
            with path.open("rb") as file:
                facts = os.fstat(file.fileno())
                data = file.read()
        except FileNotFoundError:
            return None
        if len(data) == size and zlib.crc32(data) == checksum:
            if time.time() - facts.st_mtime > UNUSED_S / 4:  # its time says, roughly, when it was last used
                os.utime(path)
            return data
        self._count("num_bad")
        with self._usage() as usage:
            if usage is not None:
                _drop(path, facts.st_size, usage)
        return None

    def _keep(self, path: Path, data: bytes) -> None:
        if path.exists():
            return
        with self._usage() as usage:
            if usage is None or not self._make_room(usage, len(data)):
                self._count("num_refused")
                return
            usage.num_bytes += len(
                data
            )  # before the file is there: a process killed in between leaves room, not excess
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}{TEMPORARY}")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            with self._usage() as usage:
                if usage is not None:
                    usage.num_bytes -= len(data)
            raise
        self._count("num_puts")

    def _make_room(self, usage: _Usage, size: int) -> bool:
        """Whether `size` bytes fit now. Looks at a few buckets, and at none of which it knows that all is in use."""
        if not usage.counted_s:
            self._recount(usage)
        if size > self.max_bytes:
            return False
        for _ in range(BUCKETS_PER_PUT):
            unused_from_s, bucket = self._unused_from_s[0]
            if usage.num_bytes + size <= self.max_bytes or unused_from_s > time.time():
                break
            unused_from_s = self._evict(bucket, usage, size, time.time() - UNUSED_S)
            heapq.heapreplace(self._unused_from_s, (unused_from_s, bucket))  # the lock on usage keeps threads out, too
        return usage.num_bytes + size <= self.max_bytes

    def _evict(self, bucket: str, usage: _Usage, size: int, unused_since_s: float) -> float:
        """Remove what nobody used since then, oldest first, until `size` bytes fit. When to look here again."""
        files = sorted((facts.st_mtime, path, facts.st_size) for path, facts in _scan(self.folder / bucket))
        for used_s, path, num_bytes in files:
            if used_s > unused_since_s or usage.num_bytes + size <= self.max_bytes:
                return used_s + UNUSED_S
            if _drop(path, num_bytes, usage):
                self._count("num_evicted")
        return time.time() + UNUSED_S

    def _recount(self, usage: _Usage) -> None:
        """Add up what is there, and remove what killed processes were writing."""
        usage.num_bytes = 0
        usage.counted_s = time.time()
        for number in range(NUM_BUCKETS):
            for path, facts in _scan(self.folder / f"{number:03x}"):
                if path.name.endswith(TEMPORARY) and usage.counted_s - facts.st_mtime > RECOUNT_S:
                    path.unlink(missing_ok=True)
                else:
                    usage.num_bytes += facts.st_size

    @contextmanager
    def _usage(self) -> Generator[_Usage | None]:
        """The bytes that all processes keep, to read and change; None if another process holds them too long."""
        descriptor = os.open(self.folder / "usage", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _lock_soon(descriptor):
                yield None
                return
            try:
                num_bytes, counted_s = os.pread(descriptor, 100, 0).split()
                usage = _Usage(int(num_bytes), float(counted_s))
            except ValueError:  # new, or torn by a power cut: `_make_room` counts
                usage = _Usage(0, 0.0)
            yield usage
            os.pwrite(descriptor, f"{usage.num_bytes:20d} {usage.counted_s:20.3f}\n".encode(), 0)
        finally:
            os.close(descriptor)

    def _guarded(self, kind: str, work: Callable[[], T], otherwise: T) -> T:
        if time.monotonic() < self._paused_until_s[kind]:
            return otherwise
        try:
            return work()
        except OSError as error:
            self._paused_until_s[kind] = time.monotonic() + PAUSE_S
            self._count("num_errors")
            if not self._warned:
                self._warned = True
                _log.warning("the cache in %s is not used for now: %s", self.folder, error)
            return otherwise

    def _count(self, name: str) -> None:
        with self._lock:
            setattr(self.counters, name, getattr(self.counters, name) + 1)


def node_copy(
    url: str,
    sha256: str,
    num_bytes: int,
    folder: Path,
    *,
    attempt_s: float = storage.ATTEMPT_S,
    deadline_s: float = storage.DEADLINE_S,
) -> Path:
    """A remote file on this node's disk, fetched once for all its processes; a local file is returned as it is.

    The bytes are hashed on the way; a copy that is there under that hash and has the right size is trusted. Memory
    stays within BLOCKS_AT_A_TIME blocks. Raises ChangedObjectError if the file is not the one that was meant, OSError
    if it cannot be fetched or there is no room for it.
    """
    path = storage.local_path(url)
    if path is not None:
        return path
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # who owns it could put other bytes there
        raise UserError(f"{folder} belongs to another user; it must be yours: name another folder in data.cache.dir")
    target = folder / f"{sha256}.{url.rpartition('/')[2]}"
    if _is_whole(target, num_bytes):
        return target
    descriptor = os.open(folder / f".{target.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # given back by the kernel if its holder is killed
        if not _is_whole(target, num_bytes):
            _fetch(url, sha256, num_bytes, target, attempt_s, deadline_s)
    finally:
        os.close(descriptor)
    return target


def _fetch(url: str, sha256: str, num_bytes: int, target: Path, attempt_s: float, deadline_s: float) -> None:
    size, tag = storage.size_and_tag(url, attempt_s=attempt_s, deadline_s=deadline_s)
    if size != num_bytes:
        raise storage.ChangedObjectError(f"{url} has {size} bytes, its manifest says {num_bytes}")
    temporary = target.with_name(f".{target.name}.part")  # one name: the next holder of the lock writes over it
    digest = hashlib.sha256()

    def block(offset: int) -> bytes:
        size = min(BLOCK_BYTES, num_bytes - offset)
        return storage.read_range(url, offset, size, tag=tag, attempt_s=attempt_s, deadline_s=deadline_s)

    try:
        with temporary.open("wb") as file:
            for data in _ahead(block, range(0, num_bytes, BLOCK_BYTES)):
                digest.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != sha256:
            raise storage.ChangedObjectError(f"{url} does not have the hash that its manifest says")
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    storage.fsync_folder(target.parent)


def _ahead(read: Callable[[int], bytes], offsets: range) -> Iterator[bytes]:
    """Blocks in order, a few of them read ahead."""
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(BLOCKS_AT_A_TIME, thread_name_prefix="copy") as pool:
        for offset in offsets:
            if len(waiting) == BLOCKS_AT_A_TIME:
                yield waiting.popleft().result()
            waiting.append(pool.submit(read, offset))
        while waiting:
            yield waiting.popleft().result()


def _is_whole(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _drop(path: Path, num_bytes: int, usage: _Usage) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    usage.num_bytes -= num_bytes
    return True


def _scan(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    yield folder / entry.name, entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # another process removed it
                    continue
    except FileNotFoundError:
        return


def _lock_soon(descriptor: int) -> bool:
    end_s = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end_s:
                return False
            time.sleep(0.001)
        else:
            return True
