"""Make a damaged data set usable again without its sources: what is still good stays, the rest leaves the index.

    what a tar holds and its index row says alike   stays, also in a tar that is cut off or damaged elsewhere
    a sample whose bytes are damaged or gone        leaves the index; rejected.jsonl names it (reason `lost`, or
                                                    `withdrawn`: then its file cannot be packed again)
    an index that is missing or wrong               is made again from the tars that are as they were packed

Tars are not touched. The older manifest stays as manifest.json.before-repair. Where samples were lost the data has
changed, so runs on the older manifest are refused; an index that is only made again gives the very same data set.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shards import storage
from shards.content import read_content
from shards.errors import UserError
from shards.layout import MANIFEST_NAME, PARTS_NAME, REJECTED_NAME, Manifest, Place, Records, Shard, Split, index_name
from shards.manifest import describe, load_manifest, make_records, manifest_url, scan_tar, sha256_of, shard_url
from shards.reader import SplitReader
from shards.rejected import LOST, WITHDRAWN, Rejection, read_rejected, rejected_text
from shards.tarstream import BrokenTarError
from shards.verify import TarState, inspect_tars, is_ours
from shards.withdraw import WITHDRAWN_NAME, Withdrawal, read_withdrawals

BACKUP_NAME = "manifest.json.before-repair"
OnShard = Callable[[str], None]


@dataclass(frozen=True)
class RepairSummary:
    """What was done. `lines()` says it in words."""

    before: Manifest
    after: Manifest
    rebuilt: tuple[str, ...]
    """Splits whose index was made again."""
    lost: tuple[Rejection, ...]
    """Samples that left the index; one without a place stands for all of a tar."""
    backup: str
    """Where the older manifest is, "" if it is still the one."""

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"the index of {split} was made again from the tars" for split in self.rebuilt]
        if self.before.hash == self.after.hash:
            return [*lines, "every sample is as it was packed" if self.rebuilt else "nothing to repair"]
        for name, split in self.before.splits.items():
            left = self.after.splits[name].num_samples if name in self.after.splits else 0
            lines.append(f"  {name}: {left} of {split.num_samples} samples are left")
        sources = sorted({row.path for row in self.lost if row.path and row.reason == LOST})
        names = f" (of {len(sources)} files, for example {sources[0]})" if sources else ""
        return [
            *lines,
            f"what was lost is named in {REJECTED_NAME}{names}; those files may be packed again with --append",
            f"the data has changed: runs that began on it are refused from now on; the older manifest is {self.backup}",
        ]


@dataclass(frozen=True)
class _Split:
    """What is left of a split."""

    records: Records
    shards: list[Shard]
    lost: list[tuple[str, int | None, str]]
    """(tar, offset of the sample or None for all of the tar, what is wrong)"""
    renumber: Callable[[Withdrawal], int | None]
    """New number of a withdrawn sample, None if it is lost."""
    places: Callable[[Withdrawal], set[Place]]
    """Where a withdrawn sample may lie that is lost."""
    is_rebuilt: bool = False


def repair(url: str, on_shard: OnShard | None = None) -> RepairSummary:
    """Repair a data set in place. `on_shard` is told each tar before it is read.

    Raises UserError if there is no manifest, or if nothing usable is left; then nothing was changed.
    """
    manifest = load_manifest(url)
    folder = storage.parent(manifest_url(url))
    old_rejected = read_rejected(folder)
    left_out = {place for row in old_rejected for place in row.samples}
    found = {name: _repair_split(folder, manifest, name, left_out, on_shard) for name in manifest.splits}
    kept = {name: split for name, split in found.items() if len(split.records)}
    if not kept:
        raise UserError(f"{url} has no usable sample left; it must be copied or packed again (nothing was changed)")
    rebuilt = tuple(name for name, split in found.items() if split.is_rebuilt)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            after = _publish_indexes(folder, manifest, kept, Path(temporary))
        if after.hash == manifest.hash:
            return RepairSummary(manifest, manifest, rebuilt, (), "")
        withdrawn = read_withdrawals(folder)
        lost = tuple(_rejections(folder, found, withdrawn, left_out))
        backup = _keep(folder, manifest)
        storage.write_bytes(storage.join(folder, REJECTED_NAME), rejected_text([*old_rejected, *lost]))
        renumbered = [replace(row, sample=new) for row in withdrawn if (new := _renumber(row, found)) is not None]
        if withdrawn:  # between these two moments rather too many are withdrawn than too few
            _write_withdrawn(folder, [*withdrawn, *renumbered])
        storage.write_bytes(storage.join(folder, MANIFEST_NAME), after.to_json().encode())
        if withdrawn:
            _write_withdrawn(folder, renumbered)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}); check the permissions and the room there") from error
    return RepairSummary(manifest, after, rebuilt, lost, backup)


def _repair_split(folder: str, manifest: Manifest, name: str, left_out: set[Place], on_shard: OnShard | None) -> _Split:
    try:
        records = SplitReader(folder, manifest, name).records
    except UserError:
        return _rebuild(folder, manifest, name, left_out, on_shard)
    return _keep_good(folder, manifest, name, records, left_out, on_shard)


def _keep_good(
    folder: str, manifest: Manifest, name: str, records: Records, left_out: set[Place], on_shard: OnShard | None
) -> _Split:
    """The rows whose bytes are good."""
    old = manifest.splits[name].shards
    shards: list[Shard] = []
    lost: list[tuple[str, int | None, str]] = []
    numbers = np.full(len(old), -1)  # old number of a tar -> new one
    good = np.ones(len(records), np.bool_)
    for number, (shard, state) in enumerate(zip(old, inspect_tars(folder, old, records, on_shard), strict=True)):
        good[list(state.lost)] = False
        lost += [(shard.name, int(records[row]["offset"]), what) for row, what in state.lost.items()]
        if not state.sha256:
            continue
        if is_ours(manifest, shard) and state.sha256 != shard.sha256:
            new = [(at, key) for at, key in state.unlisted.items() if (shard.name, at) not in left_out]
            lost += [(shard.name, at, f"{key}: no row of the index names it") for at, key in new]
        numbers[number] = len(shards)
        shards.append(_as_it_is(shard, state))
    kept: Records = np.array(records[good])
    kept["shard"] = numbers[kept["shard"]]
    positions = np.cumsum(good) - 1

    def renumber(row: Withdrawal) -> int | None:
        return int(positions[row.sample]) if row.sample < len(good) and good[row.sample] else None

    def places(row: Withdrawal) -> set[Place]:
        found = records[row.sample : row.sample + 1]
        return {(old[int(record["shard"])].name, int(record["offset"])) for record in found}

    return _Split(kept, shards, lost, renumber, places)


def _as_it_is(shard: Shard, state: TarState) -> Shard:
    if not shard.sha256 and state.num_bytes == shard.num_bytes:
        return shard
    return replace(shard, num_bytes=state.num_bytes, sha256=state.sha256, tag=state.tag if shard.tag else "")


def _rebuild(folder: str, manifest: Manifest, name: str, left_out: set[Place], on_shard: OnShard | None) -> _Split:
    """Every row anew, from those tars that are as they were packed."""
    labels = {label: number for number, label in enumerate(manifest.labels)}
    blocks: list[Records] = []
    shards: list[Shard] = []
    lost: list[tuple[str, int | None, str]] = []
    numbers: dict[str, int] = {}  # key -> row
    for shard in manifest.splits[name].shards:
        url = shard_url(folder, shard.name)
        if not is_ours(manifest, shard):
            raise UserError(f"the index of {name} is damaged, and tars made by others: make it with `tubelet index`")
        if on_shard is not None:
            on_shard(shard.name)
        if not _is_as_packed(url, shard):
            lost.append((shard.name, None, "neither its index nor the tar is what was packed"))
            continue
        try:
            scan = scan_tar(url, shard.name)
        except BrokenTarError as error:  # it was damaged when an earlier repair took it as it is
            lost.append((shard.name, None, str(error)))
            continue
        used = [sample for sample in scan.samples if (shard.name, sample.offset) not in left_out]
        numbers |= {sample.key: row for row, sample in enumerate(used, len(numbers))}
        blocks.append(make_records(replace(scan, samples=tuple(used)), len(shards), labels))
        shards.append(shard)
    records: Records = np.concatenate(blocks) if blocks else np.zeros(0, np.void)
    gone = set(_sources(folder, lost))  # which of them it was cannot be told any more, so none of them may come back
    return _Split(records, shards, lost, lambda row: numbers.get(row.key), lambda _: gone, is_rebuilt=True)


def _is_as_packed(url: str, shard: Shard) -> bool:
    try:
        return storage.size_and_tag(url)[0] == shard.num_bytes and sha256_of(url) == shard.sha256
    except OSError:
        return False


def _publish_indexes(folder: str, before: Manifest, kept: dict[str, _Split], temporary: Path) -> Manifest:
    """Write every index that is not as the manifest says; returns the manifest of what is left."""
    splits: dict[str, Split] = {}
    for name, split in kept.items():
        old = before.splits[name]
        sha256 = hashlib.sha256(split.records.data.cast("B")).hexdigest()
        is_old = sha256 == old.sha256
        index = old.index if is_old else index_name(name, sha256)
        if split.is_rebuilt or not is_old:
            split.records.tofile(temporary / name)
            storage.upload(temporary / name, storage.join(folder, index))
        splits[name] = describe(split.records, index, sha256, split.shards)
    after = Manifest.make(preset=before.preset, labels=before.labels, splits=splits)
    return before if splits == before.splits else after


def _rejections(
    folder: str, found: dict[str, _Split], withdrawn: list[Withdrawal], left_out: set[Place]
) -> list[Rejection]:
    """One per sample that was lost now; what was `left_out` before keeps the reason it was given then."""
    lost = [row for split in found.values() for row in split.lost]
    sources = _sources(folder, lost)
    used = [place for place in sources if place not in left_out]
    tars = {tar: [place for place in used if place[0] == tar] for tar, offset, _ in lost if offset is None}
    gone = [row for row in withdrawn if row.split in found and _renumber(row, found) is None]
    unwanted = {place for row in gone for place in found[row.split].places(row)}
    return [
        Rejection(
            sources.get(place, ""), WITHDRAWN if place in unwanted else LOST, f"{tar}: {what}", _part(tar), (place,)
        )
        for tar, offset, what in lost
        for place in ([(tar, offset)] if offset is not None else tars[tar])
    ]


def _sources(folder: str, lost: list[tuple[str, int | None, str]]) -> dict[Place, str]:
    """The files that the samples of the packings with a loss were made from."""
    tars = {tar for tar, _, _ in lost}
    sources: dict[Place, str] = {}
    for prefix in sorted({_prefix(tar) for tar in tars}):
        for row in read_content(storage.join(folder, prefix)) or []:
            sources.update({(prefix + tar, at): row.source for tar, at in row.samples if prefix + tar in tars})
    return sources


def _part(tar: str) -> str:
    """The part that a tar came with, "" for none."""
    names = tar.split("/")
    return names[1] if names[0] == PARTS_NAME and len(names) > 2 else ""


def _prefix(tar: str) -> str:
    """Its folder."""
    part = _part(tar)
    return f"{PARTS_NAME}/{part}/" if part else ""


def _keep(folder: str, manifest: Manifest) -> str:
    """Write the older manifest beside the new one; nothing that an earlier repair kept is overwritten."""
    number = 1
    url = storage.join(folder, BACKUP_NAME)
    while storage.exists(url):
        number += 1
        url = storage.join(folder, f"{BACKUP_NAME}-{number}")
    storage.write_bytes(url, manifest.to_json().encode())
    return url


def _renumber(row: Withdrawal, found: dict[str, _Split]) -> int | None:
    return found[row.split].renumber(row) if row.split in found else None


def _write_withdrawn(folder: str, rows: list[Withdrawal]) -> None:
    text = "".join(f"{row.to_json()}\n" for row in dict.fromkeys(rows))
    storage.write_bytes(storage.join(folder, WITHDRAWN_NAME), text.encode())
