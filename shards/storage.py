"""The one place that reads and writes URLs: byte ranges, retries, deadlines, counts.

A path without a scheme (or with file://) is local and read with `os.pread`. Everything else goes through fsspec. File
systems are made in the process that uses them, never inherited over a fork, and never read ahead.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shards.errors import UserError

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 15.0
FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, UserError)
FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError")
BUGS = (TypeError, AttributeError, NameError, NotImplementedError)
"""Asking again mends none of these three."""

T = TypeVar("T")


class ShortReadError(OSError):
    """Fewer bytes came than there should be."""


@dataclass
class StorageCounters:
    """What this process read, and how often it had to ask again."""

    num_reads: int = 0
    num_bytes: int = 0
    num_retries: int = 0
    num_failures: int = 0


counters = StorageCounters()
_lock = threading.Lock()
_filesystems: dict[tuple[int, str], Any] = {}


def local_path(url: str) -> Path | None:
    """The path of a local URL, None for a remote one."""
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    return None if "://" in url else Path(url)


def join(folder: str, name: str) -> str:
    """URL of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}" if folder != "/" else f"/{name}"


def parent(url: str) -> str:
    """URL of the folder that holds a file."""
    head, _, _ = url.rstrip("/").rpartition("/")
    return head or ("/" if url.startswith("/") else ".")


def read_range(url: str, offset: int, size: int, *, attempt_s: float = 30.0, deadline_s: float = 300.0) -> bytes:
    """Exactly `size` bytes from `offset` on.

    Remote reads are tried again, with jittered exponential waits, until `deadline_s` is over; one attempt may take
    `attempt_s`. Raises FileNotFoundError or PermissionError at once, ShortReadError if the object ends too early,
    OSError for what still fails at the deadline.
    """
    path = local_path(url)
    if path is not None:
        data = _persist(url, lambda _: _pread(path, offset, size), attempt_s, deadline_s, (ShortReadError,))
    else:
        data = _persist(url, lambda limit_s: _remote_range(url, offset, size, limit_s), attempt_s, deadline_s)
    with _lock:
        counters.num_reads += 1
        counters.num_bytes += len(data)
    return data


def read_bytes(url: str, *, attempt_s: float = 30.0, deadline_s: float = 300.0) -> bytes:
    """A whole small file."""
    path = local_path(url)
    if path is not None:
        data = path.read_bytes()
        with _lock:
            counters.num_reads += 1
            counters.num_bytes += len(data)
        return data
    size, _ = size_and_tag(url, attempt_s=attempt_s, deadline_s=deadline_s)
    return read_range(url, 0, size, attempt_s=attempt_s, deadline_s=deadline_s)


def size_and_tag(url: str, *, attempt_s: float = 30.0, deadline_s: float = 300.0) -> tuple[int, str]:
    """Size in bytes, and a word that changes when the object does: its etag, locally its time of modification."""
    path = local_path(url)
    if path is not None:
        facts = path.stat()
        return facts.st_size, str(facts.st_mtime_ns)
    row = _persist(url, lambda limit_s: _call(url, "info", limit_s), attempt_s, deadline_s)
    tag = next((str(row[name]) for name in ("ETag", "etag", "LastModified", "mtime") if row.get(name)), "")
    return int(row["size"]), tag


def exists(url: str, *, attempt_s: float = 30.0, deadline_s: float = 300.0) -> bool:
    """Whether there is such an object."""
    try:
        size_and_tag(url, attempt_s=attempt_s, deadline_s=deadline_s)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def write_atomic(path: Path, data: bytes) -> None:
    """A local file that is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pread(path: Path, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        parts: list[bytes] = []
        missing = size
        while missing > 0:  # one pread gives at most 2 GiB
            part = os.pread(descriptor, missing, offset + size - missing)
            if not part:
                raise ShortReadError(f"{path} ends at {offset + size - missing} bytes, {offset + size} are needed")
            parts.append(part)
            missing -= len(part)
    finally:
        os.close(descriptor)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _remote_range(url: str, offset: int, size: int, attempt_s: float) -> bytes:
    data = bytes(_call(url, "cat_file", attempt_s, start=offset, end=offset + size)) if size else b""
    if len(data) != size:
        raise ShortReadError(f"{url}: {len(data)} bytes came from offset {offset}, {size} were asked for")
    return data


def _call(url: str, method: str, attempt_s: float, **arguments: int) -> Any:
    """One request of one file system. Asynchronous ones (s3fs) are given up after `attempt_s`."""
    from fsspec.asyn import sync  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    filesystem = _filesystem(url)
    name = filesystem._strip_protocol(url)
    if not filesystem.async_impl:
        return getattr(filesystem, method)(name, **arguments)
    call = getattr(filesystem, f"_{method}")
    return sync(filesystem.loop, call, name, timeout=attempt_s, **arguments)  # pyright: ignore[reportUnknownVariableType]


def _filesystem(url: str) -> Any:
    import fsspec  # pyright: ignore[reportMissingTypeStubs]

    scheme = url.split("://", 1)[0]
    with _lock:
        key = (os.getpid(), scheme)
        if key not in _filesystems:
            options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
            try:
                if scheme == "s3":
                    _filesystems[key] = _s3(options)
                else:
                    _filesystems[key] = fsspec.filesystem(scheme, **options)  # pyright: ignore[reportUnknownMemberType]
            except (ValueError, ImportError) as error:
                raise UserError(
                    f"{url} cannot be opened: {error}; use a path, s3://, or install that protocol"
                ) from error
        return _filesystems[key]


def _s3(options: dict[str, Any]) -> Any:
    """S3 and what speaks like it. Endpoint and credentials come from the usual AWS variables and files.

    Checksums only where a request requires them: newer botocore adds them everywhere, and other stores refuse that.
    """
    import s3fs  # pyright: ignore[reportMissingTypeStubs]

    when = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    untyped: Any = s3fs
    return untyped.S3FileSystem(config_kwargs=when, **options)


def _persist(
    url: str,
    attempt: Callable[[float], T],
    attempt_s: float,
    deadline_s: float,
    also_final: tuple[type[Exception], ...] = (),
) -> T:
    """Try until it works or the deadline is over; `attempt` is told the seconds it may take.

    Local reads come through here too: on a cluster they go to a file server. There a short file is short for good.
    """
    start_s = time.monotonic()
    wait_s = FIRST_WAIT_S
    while True:
        try:
            return attempt(max(min(attempt_s, start_s + deadline_s - time.monotonic()), 0.01))
        except Exception as error:  # remote clients raise many kinds that are no OSError
            if isinstance(error, FINAL_ERRORS + BUGS + also_final) or type(error).__name__ in FINAL_NAMES:
                raise
            pause_s = wait_s * random.uniform(0.5, 1.5)
            left_s = start_s + deadline_s - time.monotonic()
            if left_s <= pause_s:
                with _lock:
                    counters.num_failures += 1
                kind = ShortReadError if isinstance(error, ShortReadError) else OSError
                raise kind(f"{url}: gave up after {deadline_s:g} s: {error!r}") from error
            with _lock:
                counters.num_retries += 1
            time.sleep(pause_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
