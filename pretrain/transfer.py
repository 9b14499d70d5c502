"""Files to a URL and back, each with a proof that both sides hold the same bytes.

send   hash ─ there already? ─ yes ─▶ passed over
                 └─ no ─ upload ─ proof: size, and the store's own MD5 (its etag); else read back and hashed
fetch  ranges ─ file ─ fsync ─ hash; once more where it differs
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from shards import s3_upload, storage
from shards.retry import bare

BLOCK_BYTES = 16 * 2**20
SENDS = 4
"""Files on their way at the same time; a large one to S3 is sent in several parts at the same time besides."""
FETCHES = 16
"""One block of each is in memory."""

T = TypeVar("T")
R = TypeVar("R")


class Stopped(OSError):
    """Asked to stop: what is there is as good as before, and what was sent or fetched is passed over next time."""


class DamagedObject(Exception):
    """An object is missing, or not what was sent; the text names it and says how."""


@dataclass(frozen=True)
class Whole:
    """What a file must be."""

    num_bytes: int
    sha256: str


def send(path: Path, url: str, whole: Whole, seen: storage.FileFacts | None) -> bool:
    """Bring a local file to a URL, unless it is there (`seen`: what a list says of it). Returns whether it was sent.

    Proved afterwards: the object has the size, and either the store's own MD5 of what it received is that of the local
    bytes (stores that give such etags), or the object, read back, has the hash. A folder of this machine is read back
    through the cache of its file system. Raises OSError, also where the local file is not what `whole` says.
    """
    etag = _check_local(path, whole)
    if seen is not None and seen.num_bytes == whole.num_bytes and _has_content(url, whole, seen.tag, etag):
        return False
    storage.upload(path, url)
    num_bytes, tag = storage.size_and_tag(url)
    if num_bytes != whole.num_bytes or not _has_content(url, whole, tag, etag):
        raise OSError(f"{bare(url)} is not what was sent, though the store took it without a word")
    return True


def fetch(url: str, path: Path, whole: Whole, should_stop: Callable[[], bool]) -> None:
    """Bring an object to a local file and to the disk; a file that is there and whole stays.

    Raises DamagedObject for an object that is missing or another one, Stopped, OSError.
    """
    if path.is_file() and path.stat().st_size == whole.num_bytes and _sha256(path) == whole.sha256:
        return
    for _ in range(2):  # a bit that flipped on the way hardly does so twice
        if _download(url, path, whole.num_bytes, should_stop) == whole.sha256:
            return
    path.unlink()
    raise DamagedObject(f"{bare(url)} does not match its hash")


def in_parallel(work: Callable[[T], R], items: Iterable[T], num: int, should_stop: Callable[[], bool]) -> list[R]:
    """`work` on every item by `num` threads, in any order. After the first error, or a stop, none is begun any more."""
    errors: list[BaseException] = []

    def one(item: T) -> R:
        if errors:
            raise errors[0]
        try:
            return work(item)
        except BaseException as error:
            errors.append(error)
            raise

    done: list[R] = []
    pool = ThreadPoolExecutor(num, thread_name_prefix="mirror")
    try:
        for future in as_completed([pool.submit(one, item) for item in items]):
            done.append(future.result())
            stop_if(should_stop)
    finally:
        pool.shutdown(cancel_futures=True)
    return done


def stop_if(should_stop: Callable[[], bool]) -> None:
    """Raise Stopped if that is wanted."""
    if should_stop():
        raise Stopped("asked to stop")


def _check_local(path: Path, whole: Whole) -> str:
    """Compare the file with what it must be; gives the etag that S3 makes of it, sent as `storage.upload` sends it."""
    part_bytes = max(s3_upload.PART_BYTES, -(-whole.num_bytes // s3_upload.MOST_PARTS))
    digest, num_bytes = hashlib.sha256(), 0
    parts: list[bytes] = []
    with path.open("rb") as file:
        while part := file.read(part_bytes):
            digest.update(part)
            parts.append(_md5(part))
            num_bytes += len(part)
    if num_bytes != whole.num_bytes or digest.hexdigest() != whole.sha256:
        raise OSError(f"{path} is not what was committed: it has {num_bytes} bytes and another hash")
    if num_bytes <= s3_upload.PART_BYTES:
        return (parts[0] if parts else _md5(b"")).hex()
    return f"{_md5(b''.join(parts)).hex()}-{len(parts)}"


def _has_content(url: str, whole: Whole, tag: str, etag: str) -> bool:
    if tag == etag:
        return True
    path = storage.local_path(url)
    if path is not None:
        return _sha256(path) == whole.sha256
    digest = hashlib.sha256()
    for offset in range(0, whole.num_bytes, BLOCK_BYTES):
        digest.update(storage.read_range(url, offset, min(BLOCK_BYTES, whole.num_bytes - offset), tag=tag))
    return digest.hexdigest() == whole.sha256


def _download(url: str, path: Path, num_bytes: int, should_stop: Callable[[], bool]) -> str:
    """Write the object to a file; the hash of what came."""
    digest = hashlib.sha256()
    try:
        found, tag = storage.size_and_tag(url)
        if found != num_bytes:
            raise DamagedObject(f"{bare(url)} has {found} bytes instead of {num_bytes}")
        with path.open("wb") as file:
            for offset in range(0, num_bytes, BLOCK_BYTES):
                stop_if(should_stop)
                block = storage.read_range(url, offset, min(BLOCK_BYTES, num_bytes - offset), tag=tag)
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except FileNotFoundError:
        raise DamagedObject(f"{bare(url)} is missing") from None
    except storage.ObjectEndsError as error:
        raise DamagedObject(str(error)) from None
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()
