"""A tar read once, front to back, in large blocks: its members with their places, its sha256, and whether it is whole.

`tarfile` ends quietly where a tar was cut off at a block, and seeks about. This reader knows how long the object is:
what is missing at the end, or follows after it, is an error that names the tar.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from shards import storage

READ_BYTES = 8 << 20
BLOCK_BYTES = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 1 << 20
LOOK_BACK_BYTES = 4096
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
Kind = Literal["file", "sparse", "link", "other"]


class BrokenTarError(Exception):
    """This is no whole tar, or cannot be read. The text names it, the place and what is wrong there."""


@dataclass(frozen=True)
class Member:
    """One entry of a tar."""

    name: str
    kind: Kind
    offset: int
    """Of its bytes in the tar."""
    size: int
    """Bytes that it takes there."""


class TarStream:
    """The members of one tar, in order. Iterate; between two members `body()` gives the bytes of the first.

    `tag` is what `storage.size_and_tag` said. One block of `READ_BYTES` is in use while the next one is fetched.
    `sha256` is that of the whole tar, once the iteration is over. Raises BrokenTarError, also for what cannot be read.
    """

    def __init__(self, url: str, num_bytes: int, tag: str = "") -> None:
        self._url = url
        self._tag = tag
        self._num_bytes = num_bytes
        self._block = memoryview(b"")
        self._block_start = 0
        self._position = 0
        self._end = 0
        self._hash = hashlib.sha256()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="tar")
        self._next: Future[bytes] | None = None
        self._fetch(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)

    @property
    def sha256(self) -> str:
        """Hash of all bytes so far; of the whole tar at its end."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Member]:
        long_name = ""
        pax: dict[str, str] = {}
        global_pax: dict[str, str] = {}
        while (info := self._header()) is not None:
            start = self._position
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = self._words(info).partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                pax = self._pax(self._words(info), start)
            elif info.type == tarfile.XGLTYPE:
                global_pax |= self._pax(self._words(info), start)
            elif info.type == tarfile.GNUTYPE_LONGLINK:
                self._words(info)
            else:
                yield self._member(info, long_name, global_pax | pax)
                for _ in self.body():
                    pass
                long_name, pax = "", {}
            self._skip_padding()
        self._check_rest()

    def body(self) -> Iterator[memoryview]:
        """What is left of the current member's bytes, in pieces that are valid until the next one is asked for."""
        while self._position < self._end:
            yield self._take(min(self._end - self._position, READ_BYTES))

    def _member(self, info: tarfile.TarInfo, long_name: str, pax: dict[str, str]) -> Member:
        name = pax.get("path") or long_name or info.name
        kind: Kind = "file"
        size = self._number(pax["size"]) if "size" in pax else info.size
        if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in pax):
            kind = "sparse"
        elif info.islnk() or info.issym():
            kind = "link"
        elif not info.isreg():
            kind = "other"
        if kind in ("link", "other") and info.type in tarfile.SUPPORTED_TYPES:
            size = 0  # whatever the header says, nothing follows
        self._end = self._position + size
        if self._end > self._num_bytes:
            raise self._broken(f"{name!r} needs the bytes up to {self._end}: it is cut off")
        return Member(name, kind, self._position, size)

    def _header(self) -> tarfile.TarInfo | None:
        """The next header, None at the end marker."""
        start = self._position
        if start + BLOCK_BYTES > self._num_bytes:
            raise self._broken("it has no end marker: it is cut off")
        block = bytes(self._take(BLOCK_BYTES))
        if start == 0 and (kind := next((COMPRESSED[m] for m in COMPRESSED if block.startswith(m)), None)):
            raise BrokenTarError(f"{self._url} is compressed ({kind}); byte ranges need a plain tar: unpack it")
        if not any(block):
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if info.type == tarfile.GNUTYPE_SPARSE:
                is_extended = bool(block[482])
                while is_extended:
                    is_extended = bool(self._take(BLOCK_BYTES)[504])
            if info.size < 0:
                raise tarfile.HeaderError("negative size")
            return info
        except tarfile.HeaderError as error:
            raise self._broken(f"no member begins at byte {start} ({error})") from error

    def _words(self, info: tarfile.TarInfo) -> bytes:
        """The body of a header that says more about the next one."""
        self._end = self._position + info.size
        if info.size > MAX_HEADER_BYTES or self._end > self._num_bytes:
            raise self._broken(f"a header of {info.size} bytes at byte {self._position - BLOCK_BYTES}: it is damaged")
        return b"".join(bytes(part) for part in self.body())

    def _pax(self, text: bytes, start: int) -> dict[str, str]:
        records: dict[str, str] = {}
        while text.strip(b"\0"):
            length, blank, _ = text.partition(b" ")
            if not blank or not length.isdigit() or not len(length) + 2 < int(length) <= len(text):
                raise self._broken(f"the extended header at byte {start} is damaged")
            key, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
            records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
            text = text[int(length) :]
        return records

    def _number(self, text: str) -> int:
        if not text.isdecimal():
            raise self._broken(f"a size of {text!r} before byte {self._position}")
        return int(text)

    def _skip_padding(self) -> None:
        self._end = min(self._position + -self._position % BLOCK_BYTES, self._num_bytes)
        for _ in self.body():
            pass

    def _check_rest(self) -> None:
        """Zeros follow the end marker, else readers would pass over members that are there."""
        end = self._position
        self._end = self._num_bytes
        for part in self.body():
            if bytes(part).count(0) != len(part):
                raise self._broken(
                    f"bytes follow its end marker at {end} (joined tars?), which readers of WebDataset never see: "
                    "make one tar of it"
                )

    def _take(self, size: int) -> memoryview:
        """The next bytes, at most `size` but at least one; headers come whole."""
        inside = self._position - self._block_start
        if inside == len(self._block):
            self._advance()
            inside = 0
        part = self._block[inside : inside + size]
        self._position += len(part)
        if len(part) < size == BLOCK_BYTES:  # reads are whole blocks of a tar, so only a cut end comes here
            raise self._broken(f"it ends at byte {self._position}: it is cut off")
        return part

    def _advance(self) -> None:
        if self._next is None:
            raise self._broken(f"it ends at byte {self._position}: it is cut off")
        try:
            self._block, self._block_start = memoryview(self._next.result()), self._position
        except storage.ChangedObjectError as error:
            raise changed(self._url) from error
        except OSError as error:
            raise BrokenTarError(f"{self._url} cannot be read: {error}") from error
        self._hash.update(self._block)
        self._fetch(self._position + len(self._block))

    def _fetch(self, offset: int) -> None:
        size = min(READ_BYTES, self._num_bytes - offset)
        self._next = None
        if size > 0:
            self._next = self._reader.submit(storage.read_range, self._url, offset, size, tag=self._tag)

    def _broken(self, what: str) -> BrokenTarError:
        return BrokenTarError(f"{self._url} ({self._num_bytes} bytes) is no whole tar: {what}")


def changed(url: str) -> BrokenTarError:
    """What to say of a tar that is not the one that was begun with."""
    return BrokenTarError(f"{url} was changed while it was read; it must stay as it is: start again")


def member_name(read: Callable[[int, int], bytes], offset: int) -> str:
    """The name of the member whose bytes begin at `offset`; long names too.

    `read(offset, size)` gives bytes of the tar. Raises tarfile.HeaderError where no header is.
    """
    start = max(offset - LOOK_BACK_BYTES, 0)
    data = read(start, offset - start)
    info = tarfile.TarInfo.frombuf(data[-BLOCK_BYTES:], "utf-8", "surrogateescape")
    # A longer name stands in a header of its own before this one: [header][its text, padded][header of the member]
    for num_blocks in range(1, len(data) // BLOCK_BYTES - 1):
        place = len(data) - (num_blocks + 2) * BLOCK_BYTES
        try:
            before = tarfile.TarInfo.frombuf(data[place : place + BLOCK_BYTES], "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            continue
        text = data[place + BLOCK_BYTES : place + BLOCK_BYTES + before.size]
        if -(-before.size // BLOCK_BYTES) != num_blocks:
            continue
        if before.type == tarfile.GNUTYPE_LONGNAME:
            return text.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        if before.type == tarfile.XHDTYPE:
            return _pax_path(text) or info.name
    return info.name


def _pax_path(text: bytes) -> str:
    while text:
        length, _, _ = text.partition(b" ")
        if not length.isdigit() or not int(length):
            return ""
        record = text[len(length) + 1 : int(length) - 1]
        if record.startswith(b"path="):
            return record[5:].decode("utf-8", "surrogateescape")
        text = text[int(length) :]
    return ""
