"""Prove that a packed data set is readable and is what its manifest says: every byte is read."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

from shards import storage
from shards.errors import SampleError, UserError
from shards.layout import Manifest, Shard
from shards.manifest import load_manifest, manifest_url, sha256_of
from shards.reader import SplitReader

BUFFER_BYTES = 4 << 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in one line."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verify(url: str, on_shard: Callable[[str], None] | None = None) -> list[Problem]:
    """Check indexes, the hash of every tar, every sample's checksum, and tar members against index rows.

    Returns all problems, none for a sound data set; `on_shard` is told each tar before it is read. Raises UserError if
    there is no manifest to compare with.
    """
    manifest = load_manifest(url)
    folder = storage.parent(manifest_url(url))
    problems: list[Problem] = []
    for name in manifest.splits:
        try:
            reader = SplitReader(folder, manifest, name)
        except UserError as error:
            problems.append(Problem(manifest.splits[name].index, str(error)))
            continue
        problems += _check_counts(manifest, reader)
        for number, shard in enumerate(reader.split.shards):
            if on_shard is not None:
                on_shard(shard.name)
            problems += _check_shard(storage.join(folder, shard.name), shard, reader, number)
    return problems


def _check_counts(manifest: Manifest, reader: SplitReader) -> list[Problem]:
    split, records = reader.split, reader.records
    found: list[str] = []
    if len(records) != split.num_samples or sum(shard.num_samples for shard in split.shards) != len(records):
        found.append(f"{len(records)} rows, but the manifest counts {split.num_samples} samples")
    if len(records) and int(records["shard"].max()) >= len(split.shards):
        found.append("a row names a tar that the manifest does not have")
    if len(records) and int(records["label"].max()) >= len(manifest.labels):
        found.append("a row names a label that the manifest does not have")
    return [Problem(split.index, text) for text in found]


def _check_shard(url: str, shard: Shard, reader: SplitReader, number: int) -> list[Problem]:
    try:
        size, _ = storage.size_and_tag(url)
    except OSError as error:
        return [Problem(shard.name, f"cannot be read: {error}")]
    if size != shard.num_bytes:
        cut = "cut off" if size < shard.num_bytes else "longer"
        return [Problem(shard.name, f"{cut}: {size} bytes, {shard.num_bytes} were packed")]
    problems: list[Problem] = []
    if sha256_of(url) != shard.sha256:
        problems.append(Problem(shard.name, "its bytes are not those that were packed (sha256 differs)"))
    try:
        members = _members(url, size)
    except (tarfile.TarError, OSError) as error:
        return [*problems, Problem(shard.name, f"is no readable tar: {error}")]
    rows = [int(row) for row in (reader.records["shard"] == number).nonzero()[0]]
    places = {(int(reader.records[row]["offset"]), int(reader.records[row]["size"])): row for row in rows}
    problems += [
        Problem(shard.name, f"{name} is not in the index") for place, name in members.items() if place not in places
    ]
    for place, row in places.items():
        if place not in members:
            problems.append(Problem(shard.name, f"sample {row} has no member at byte {place[0]}"))
            continue
        try:
            reader.read(row)
        except (SampleError, UserError) as error:
            problems.append(Problem(shard.name, f"{members[place]}: {error}"))
    return problems


def _members(url: str, size: int) -> dict[tuple[int, int], str]:
    """(offset, size) -> name of every member of a tar that is not a description."""
    file = io.BufferedReader(_RangeFile(url, size), BUFFER_BYTES)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        return {(member.offset_data, member.size): member.name for member in tar if not member.name.endswith(".json")}


class _RangeFile(io.RawIOBase):
    """A URL as a seekable file, for `tarfile`."""

    def __init__(self, url: str, size: int) -> None:
        self._url = url
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # any buffer is a memoryview here
        size = min(len(buffer), max(self._size - self._position, 0))
        buffer[:size] = storage.read_range(self._url, self._position, size)
        self._position += size
        return size
