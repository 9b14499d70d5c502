"""The one place that reads and writes URLs: byte ranges, whole files, lists; retries, deadlines, counts.

    path, file://  ─▶ os.pread, temporary file and rename
    s3://          ─▶ shards/s3.py (s3fs's client), a second request beside a slow one (shards/loop.py)
    other schemes  ─▶ whatever fsspec has for them

All three are tried again by shards/retry.py. File systems are made in the process that uses them, never inherited over
a fork, and never read ahead. Any number of threads may call these functions at the same time.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards import s3, s3_upload
from shards.errors import UserError
from shards.loop import first_good, on_loop
from shards.retry import ChangedObjectError as ChangedObjectError
from shards.retry import ObjectEndsError as ObjectEndsError
from shards.retry import ShortReadError as ShortReadError
from shards.retry import StorageCounters as StorageCounters
from shards.retry import bare, count, persist
from shards.retry import counters as counters
from shards.s3 import Part

ATTEMPT_S = 30.0
WRITE_ATTEMPT_S = 120.0
DEADLINE_S = 300.0
BLOCK_BYTES = 2**22
TEMPORARY = ".tmp"

_filesystems: dict[tuple[int, str], Any] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class FileFacts:
    """One file of a folder: its name relative to the folder, its size, and a word that changes when the file does."""

    name: str
    num_bytes: int
    tag: str


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


def read_range(
    url: str,
    offset: int,
    size: int,
    *,
    tag: str = "",
    attempt_s: float = ATTEMPT_S,
    deadline_s: float = DEADLINE_S,
    hedge_s: float = 0.0,
) -> bytes:
    """Exactly `size` bytes from `offset` on, with one request where all goes well.

    Tried again, with jittered exponential waits, until `deadline_s` is over; one attempt may take `attempt_s`. With
    `hedge_s` > 0 a slow request gets a second one beside it (shards/loop.py; s3:// and other asynchronous stores).
    `tag` is what `size_and_tag` or `list_files` said: another object than that is refused (local paths and s3://; other
    stores cannot compare it in the same request).

    Raises at once: FileNotFoundError, PermissionError, ObjectEndsError (the object is shorter than the range),
    ChangedObjectError, RefusedError. At the deadline: ShortReadError if too few bytes came, OSError for the rest.
    """
    path = local_path(url)
    if path is not None:
        return persist(url, lambda _: _pread(path, offset, size, tag), attempt_s, deadline_s)
    if size == 0:
        return b""
    return persist(url, lambda limit_s: _remote_range(url, offset, size, tag, hedge_s, limit_s), attempt_s, deadline_s)


def first_range(
    url: str,
    offset: int,
    size: int,
    *,
    attempt_s: float = ATTEMPT_S,
    deadline_s: float = DEADLINE_S,
    hedge_s: float = 0.0,
) -> Part:
    """A range together with size and tag of its object: on S3 the same request says both. Raises as `read_range`."""
    if not _is_s3(url) or size == 0:
        num_bytes, tag = size_and_tag(url, attempt_s=attempt_s, deadline_s=deadline_s)
        return Part(read_range(url, offset, size, attempt_s=attempt_s, deadline_s=deadline_s), num_bytes, tag)

    def attempt(limit_s: float) -> Part:
        return on_loop(first_good(lambda: s3.get(url, offset, size, ""), hedge_s), limit_s)

    return persist(url, attempt, attempt_s, deadline_s)


def read_bytes(url: str, *, attempt_s: float = ATTEMPT_S, deadline_s: float = DEADLINE_S) -> bytes:
    """A whole small file."""
    path = local_path(url)
    if path is not None:
        data = path.read_bytes()
        count(num_reads=1, num_bytes=len(data))
        return data
    return persist(url, lambda limit_s: _remote_range(url, 0, None, "", 0.0, limit_s), attempt_s, deadline_s)


def size_and_tag(url: str, *, attempt_s: float = ATTEMPT_S, deadline_s: float = DEADLINE_S) -> tuple[int, str]:
    """Size in bytes, and a word that changes when the object does: its etag, locally its time of modification."""
    path = local_path(url)
    if path is not None:
        facts = path.stat()
        return facts.st_size, str(facts.st_mtime_ns)
    if _is_s3(url):
        return persist(url, lambda limit_s: on_loop(s3.facts(url), limit_s), attempt_s, deadline_s)
    row = persist(url, lambda limit_s: _call(url, "info", limit_s), attempt_s, deadline_s)
    return int(row["size"]), _tag(row)


def exists(url: str, *, attempt_s: float = ATTEMPT_S, deadline_s: float = DEADLINE_S) -> bool:
    """Whether there is such an object."""
    try:
        size_and_tag(url, attempt_s=attempt_s, deadline_s=deadline_s)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def list_files(url: str, *, attempt_s: float = ATTEMPT_S, deadline_s: float = DEADLINE_S) -> list[FileFacts]:
    """All files below a folder, sorted by name. A folder that is not there has none: S3 knows no folders."""
    path = local_path(url)
    if path is not None:
        return _list_local(path)
    if not _is_s3(url):
        try:
            rows = persist(url, lambda limit_s: _call(url, "find", limit_s, detail=True), attempt_s, deadline_s)
        except FileNotFoundError:
            return []
        top = _filesystem(url)._strip_protocol(url).rstrip("/") + "/"
        return sorted(
            (FileFacts(name.removeprefix(top), int(row["size"]), _tag(row)) for name, row in rows.items()),
            key=lambda facts: facts.name,
        )
    return _list_s3(url, attempt_s, deadline_s)


def write_bytes(url: str, data: bytes, *, attempt_s: float = WRITE_ATTEMPT_S, deadline_s: float = DEADLINE_S) -> None:
    """A small file, there whole or not at all. Local folders are made where they are missing."""
    path = local_path(url)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    elif _is_s3(url):
        persist(url, lambda limit_s: on_loop(s3.put(url, data), limit_s), attempt_s, deadline_s)
    else:
        persist(url, lambda limit_s: _call(url, "pipe_file", limit_s, value=data), attempt_s, deadline_s)


def upload(path: Path, url: str, *, attempt_s: float = WRITE_ATTEMPT_S, deadline_s: float = DEADLINE_S) -> None:
    """Copy a local file to a URL, where it appears whole or not at all; `attempt_s` and `deadline_s` are per request.

    Large ones go to S3 in parts, each with its checksum. A failed upload is aborted; one whose process was killed
    leaves parts that nobody sees until the bucket's rule for incomplete uploads removes them. Other stores than S3: as
    atomic as what fsspec has for them.
    """
    target = local_path(url)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(target) as temporary, path.open("rb") as source, temporary.open("wb") as file:
            shutil.copyfileobj(source, file, BLOCK_BYTES)
    elif not _is_s3(url):
        persist(url, lambda limit_s: _call(url, "put_file", limit_s, source=str(path)), attempt_s, deadline_s)
    elif path.stat().st_size <= s3_upload.PART_BYTES:
        write_bytes(url, path.read_bytes(), attempt_s=attempt_s, deadline_s=deadline_s)
    else:
        s3_upload.in_parts(path, url, attempt_s, deadline_s)


def remove(url: str, *, attempt_s: float = ATTEMPT_S, deadline_s: float = DEADLINE_S) -> None:
    """Delete a file; one that is not there is fine."""
    path = local_path(url)
    if path is not None:
        path.unlink(missing_ok=True)
    elif _is_s3(url):
        persist(url, lambda limit_s: on_loop(s3.delete(url), limit_s), attempt_s, deadline_s)
    else:
        try:
            persist(url, lambda limit_s: _call(url, "rm_file", limit_s), attempt_s, deadline_s)
        except FileNotFoundError:
            return


def write_atomic(path: Path, data: bytes) -> None:
    """A local file that is there whole or not at all, also after a power cut."""
    with _replacing(path) as temporary:
        temporary.write_bytes(data)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _replacing(path: Path) -> Generator[Path]:
    """A temporary file to fill; it becomes `path` once it is on the disk, and is gone after a failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{TEMPORARY}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def _list_local(folder: Path) -> list[FileFacts]:
    files: list[FileFacts] = []
    for top, _, names in os.walk(folder):
        for name in names:
            path = Path(top) / name
            if name.startswith(".") and name.endswith(TEMPORARY):
                continue
            try:
                facts = path.stat()
            except FileNotFoundError:  # removed meanwhile, or a link to nowhere
                continue
            files.append(FileFacts(path.relative_to(folder).as_posix(), facts.st_size, str(facts.st_mtime_ns)))
    return sorted(files, key=lambda facts: facts.name)


def _list_s3(folder: str, attempt_s: float, deadline_s: float) -> list[FileFacts]:
    prefix = s3.split(folder)[1].rstrip("/")
    prefix = f"{prefix}/" if prefix else ""
    files: list[FileFacts] = []
    token = ""

    def page(limit_s: float) -> tuple[list[tuple[str, int, str]], str]:
        return on_loop(s3.list_page(folder, prefix, token), limit_s)

    while True:
        rows, token = persist(folder, page, attempt_s, deadline_s)
        # Names that end in a slash are what some tools leave where they made a "folder".
        files += [FileFacts(key.removeprefix(prefix), size, tag) for key, size, tag in rows if not key.endswith("/")]
        if not token:
            return sorted(files, key=lambda facts: facts.name)


def _pread(path: Path, offset: int, size: int, tag: str) -> bytes:
    count(num_reads=1)
    descriptor = os.open(path, os.O_RDONLY)
    parts: list[bytes] = []
    missing = size
    try:
        if tag and str(os.fstat(descriptor).st_mtime_ns) != tag:
            raise ChangedObjectError(f"{path} was written again since it was first seen")
        while missing > 0:  # one pread gives at most 2 GiB
            part = os.pread(descriptor, missing, offset + size - missing)
            if not part:
                raise ObjectEndsError(f"{path} ends at {offset + size - missing} bytes, {offset + size} are needed")
            parts.append(part)
            missing -= len(part)
    finally:
        os.close(descriptor)
        count(num_bytes=size - missing)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _is_s3(url: str) -> bool:
    return url.startswith("s3://")


def _remote_range(url: str, offset: int, size: int | None, tag: str, hedge_s: float, limit_s: float) -> bytes:
    """One attempt. The whole file where size is None."""
    if _is_s3(url):
        return on_loop(first_good(lambda: s3.get(url, offset, size, tag), hedge_s), limit_s).data
    end = None if size is None else offset + size
    count(num_reads=1)
    data = bytes(_call(url, "cat_file", limit_s, start=offset, end=end))
    count(num_bytes=len(data))
    if size is not None and len(data) != size:
        raise ShortReadError(f"{bare(url)}: {len(data)} bytes came from offset {offset}, {size} were asked for")
    return data


def _call(url: str, method: str, limit_s: float, *, source: str = "", **arguments: Any) -> Any:
    """One request of another file system than S3. Asynchronous ones are given up after `limit_s`."""
    filesystem = _filesystem(url)
    names = [name for name in (source, filesystem._strip_protocol(url)) if name]
    if filesystem.async_impl:
        return on_loop(getattr(filesystem, f"_{method}")(*names, **arguments), limit_s)
    return getattr(filesystem, method)(*names, **arguments)


def _filesystem(url: str) -> Any:
    import fsspec  # pyright: ignore[reportMissingTypeStubs]

    scheme = url.split("://", 1)[0]
    with _lock:
        key = (os.getpid(), scheme)
        if key not in _filesystems:
            try:
                _filesystems[key] = fsspec.filesystem(  # pyright: ignore[reportUnknownMemberType]
                    scheme, skip_instance_cache=True, use_listings_cache=False
                )
            except (ValueError, ImportError) as error:
                raise UserError(
                    f"{bare(url)} cannot be opened: {error}; use a path, s3://, or install that protocol"
                ) from error
        return _filesystems[key]


def _tag(row: dict[str, Any]) -> str:
    found = next((str(row[name]) for name in ("ETag", "etag", "LastModified", "mtime") if row.get(name)), "")
    return found.strip('"')
