"""Prove that a packed data set is readable and is what its manifest says: every byte is read, once."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from shards import storage
from shards.errors import UserError
from shards.layout import PARTS_NAME, Manifest, Place, Records, Shard
from shards.manifest import load_manifest, manifest_url, sha256_of, shard_url
from shards.reader import SplitReader
from shards.rejected import read_rejected
from shards.tarstream import BrokenTarError, TarStream

TARS_AT_A_TIME = 4
OURS = ("train", "copy")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in one line."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass
class TarState:
    """A tar as it is now, against the index rows that name it."""

    num_bytes: int = 0
    tag: str = ""
    sha256: str = ""
    """"" where it cannot be read."""
    fault: str = ""
    """Why it is no readable tar; byte ranges of it may still be good."""
    lost: dict[int, str] = field(default_factory=dict[int, str])
    """Row -> what is wrong with that sample."""
    unlisted: dict[int, str] = field(default_factory=dict[int, str])
    """Offset -> name of each video that no row names."""


def verify(url: str, on_shard: Callable[[str], None] | None = None) -> list[Problem]:
    """Check indexes, the hash of every tar, every sample's checksum, and tar members against index rows.

    Returns all problems, none for a sound data set; `on_shard` is told each tar before it is read. Raises UserError if
    there is no manifest to compare with.
    """
    manifest = load_manifest(url)
    folder = storage.parent(manifest_url(url))
    left_out = {place for row in read_rejected(folder) for place in row.samples}
    problems: list[Problem] = []
    for name, split in manifest.splits.items():
        try:
            records = SplitReader(folder, manifest, name).records
        except UserError as error:
            problems.append(Problem(split.index, str(error)))
            continue
        problems += _check_counts(manifest, name, records)
        for shard, state in zip(split.shards, inspect_tars(folder, split.shards, records, on_shard), strict=True):
            problems += _problems(shard, state, left_out if is_ours(manifest, shard) else None)
    return problems


def is_ours(manifest: Manifest, shard: Shard) -> bool:
    """Whether `tubelet pack` made this tar, so that its index lists all of its videos."""
    return manifest.preset in OURS or shard.name.startswith(f"{PARTS_NAME}/")


def inspect_tars(
    folder: str, shards: Collection[Shard], records: Records, on_shard: Callable[[str], None] | None
) -> list[TarState]:
    """Read tars whole, several at a time."""
    by_shard = np.argsort(records["shard"], kind="stable")
    ends = np.searchsorted(records["shard"], np.arange(len(shards) + 1), sorter=by_shard)

    def inspect(number: int, shard: Shard) -> TarState:
        if on_shard is not None:
            on_shard(shard.name)
        rows = [int(row) for row in by_shard[ends[number] : ends[number + 1]]]
        return _inspect(shard_url(folder, shard.name), records, rows)

    with ThreadPoolExecutor(TARS_AT_A_TIME) as pool:
        return list(pool.map(inspect, range(len(shards)), shards))


def _inspect(url: str, records: Records, rows: list[int]) -> TarState:
    state = TarState()
    places = {(int(records[row]["offset"]), int(records[row]["size"])): row for row in rows}
    seen: set[int] = set()
    try:
        state.num_bytes, state.tag = storage.size_and_tag(url)
        try:
            with TarStream(url, state.num_bytes) as tar:
                for member in tar:
                    row = places.get((member.offset, member.size))
                    if row is None:
                        if member.kind == "file" and not member.name.endswith(".json"):
                            state.unlisted[member.offset] = member.name
                        continue
                    checksum = 0
                    for part in tar.body():
                        checksum = zlib.crc32(part, checksum)
                    seen.add(row)
                    if checksum != int(records[row]["checksum"]):
                        state.lost[row] = f"{member.name}: checksum: sample {row} is not what was packed"
                state.sha256 = tar.sha256
        except BrokenTarError as error:
            state.fault = str(error)
            state.sha256 = sha256_of(url)
    except OSError as error:
        state.fault = f"cannot be read: {error}"
        state.lost = dict.fromkeys(rows, state.fault)
        state.sha256 = ""
        return state
    for row in rows:
        if row not in seen and not (state.fault and _is_good(url, records, row)):
            state.lost[row] = f"sample {row} has no member at byte {int(records[row]['offset'])}"
    return state


def _is_good(url: str, records: Records, row: int) -> bool:
    """Whether a sample can be read where no tar leads to it any more."""
    record = records[row]
    try:
        data = storage.read_range(url, int(record["offset"]), int(record["size"]))
    except OSError:
        return False
    return zlib.crc32(data) == int(record["checksum"])


def _check_counts(manifest: Manifest, name: str, records: Records) -> list[Problem]:
    split = manifest.splits[name]
    found: list[str] = []
    if len(records) and int(records["shard"].max()) >= len(split.shards):
        found.append("a row names a tar that the manifest does not have")
    if len(records) and int(records["label"].max()) >= len(manifest.labels):
        found.append("a row names a label that the manifest does not have")
    return [Problem(split.index, text) for text in found]


def _problems(shard: Shard, state: TarState, left_out: set[Place] | None) -> list[Problem]:
    """What to say of one tar; `left_out` are the videos that need no row, None if none needs one."""
    if not state.sha256:
        return [Problem(shard.name, state.fault)]
    if state.num_bytes != shard.num_bytes:
        cut = "cut off" if state.num_bytes < shard.num_bytes else "longer"
        return [Problem(shard.name, f"{cut}: {state.num_bytes} bytes, {shard.num_bytes} were packed")]
    found: list[str] = []
    if shard.sha256 and state.sha256 != shard.sha256:
        found.append("its bytes are not those that were packed (sha256 differs)")
        if state.fault:
            found.append(f"is no readable tar: {state.fault}")
    if left_out is not None:
        unlisted = (name for at, name in state.unlisted.items() if (shard.name, at) not in left_out)
        found += [f"{name} is not in the index" for name in unlisted]
    return [Problem(shard.name, text) for text in (*found, *state.lost.values())]
