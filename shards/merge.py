"""Join packed parts into one data set; its samples keep their numbers, what is new comes after them.

    DST/parts/NAME/        every part is a packed folder of its own, and stays as it is
    DST/SPLIT-HASH.index   rows of what was there, unchanged and first, then those of each new part
    DST/manifest.json      lists all tars; written last, so the data set grows in one moment or not at all

An index file is never written again under its name: who has the older one open, or still has the older manifest,
goes on with it. A file whose bytes are in the data set already is left out, whatever its name.
"""

from __future__ import annotations

import fcntl
import hashlib
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shards import storage
from shards.content import Content, find_duplicates, read_content
from shards.errors import UserError
from shards.layout import (
    MANIFEST_NAME,
    PACKED_NAME,
    PARTS_NAME,
    RECORD_DTYPE,
    REJECTED_NAME,
    Manifest,
    Place,
    Records,
    Shard,
    Split,
    group_number,
    index_name,
)
from shards.manifest import describe, load_manifest, sort_labels
from shards.reader import SplitReader
from shards.rejected import DUPLICATE, LOST, Rejection, read_rejected, rejected_text
from shards.slice import is_slice, missing_slices
from shards.summary import held_out_lines, split_lines

OFFSET_BITS = 40
"""Of a place as one number: tars up to 1 TB, 16 million of them."""


@dataclass(frozen=True)
class MergeSummary:
    """What was joined. `lines()` says it in words."""

    manifest: Manifest
    parts: tuple[str, ...]
    """Those that are new in it."""
    duplicates: tuple[Rejection, ...]
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people."""
        what = f"joined {len(self.parts)} parts" if self.parts else "nothing new to join"
        lines = [what, *split_lines(self.manifest), *held_out_lines(self.manifest)]
        if self.manifest.labels:
            lines.append(f"labels: {len(self.manifest.labels)}")
        return lines + [f"warning: {warning}" for warning in self.warnings]


def merge(url: str) -> MergeSummary:
    """Join the parts of a data set that it does not list yet. `url` is the folder or URL that they were packed into.

    Raises UserError if slices are missing (naming them), if there is nothing to join, or if a part is damaged.
    """
    url = url.rstrip("/")
    try:
        with _alone(url):
            return _merge(url)
    except OSError as error:
        raise UserError(f"{url} cannot be written ({error}); check the permissions and the room there") from error


def known_content(url: str) -> dict[bytes, str]:
    """sha256 -> name of every file that the data set holds samples of."""
    base = load_manifest(url)
    known: dict[bytes, str] = {}
    for part, row in _content(url, ["", *sorted(_listed(base))]):
        known.setdefault(bytes.fromhex(row.sha256), _said(row, part))
    return known


def settled_groups(url: str, groups: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Those of these groups that the data set has already, and the splits that they are in."""
    manifest = load_manifest(url)
    numbers = {group: group_number(group) for group in groups}
    wanted = np.fromiter(numbers.values(), np.uint32, len(numbers))
    found: dict[str, tuple[str, ...]] = {}
    for split in sorted(manifest.splits):
        records = SplitReader(url, manifest, split).records
        there = set(wanted[np.isin(wanted, records["group"])].tolist())
        for group, number in numbers.items():
            if number in there:
                found[group] = (*found.get(group, ()), split)
    return found


def _merge(url: str) -> MergeSummary:
    base = load_manifest(url) if storage.exists(storage.join(url, MANIFEST_NAME)) else None
    parts = _complete_parts(url)
    if not parts:
        raise UserError(
            f"{storage.join(url, PARTS_NAME)} holds no packed part; pack --slice makes them: check the folder's name"
        )
    if base is None and (missing := missing_slices(parts)):
        raise UserError(
            f"{url} lacks the slices {', '.join(map(str, missing))}; all must be packed before they are joined: pack "
            f"them (tubelet pack SRC {url} --slice {missing[0]})"
        )
    if base is None and storage.exists(storage.join(url, PACKED_NAME)):
        raise UserError(
            f"{storage.join(url, MANIFEST_NAME)} is missing; it lists more tars than those of the parts: put it back "
            "(from a copy of the folder)"
        )
    new = [part for part in parts if base is None or part not in _listed(base)]
    manifests = {part: load_manifest(storage.join(url, _prefix(part))) for part in new}
    duplicates = _duplicates(url, base, new)
    labels = _labels(base, manifests.values())
    rejected = read_rejected(url)
    dropped = {place for row in (*rejected, *duplicates) for place in row.samples}
    splits = dict(base.splits) if base else {}
    for split in sorted({split for manifest in manifests.values() for split in manifest.splits}):
        with tempfile.TemporaryDirectory() as folder:
            splits[split] = _join(url, Path(folder) / "index", base, manifests, split, labels, dropped)
    for part in new:
        rejected += [replace(row, part=part) for row in read_rejected(storage.join(url, _prefix(part)))]
    splits = {name: split for name, split in splits.items() if split.num_samples}
    if not splits:
        raise UserError(f"{url} has no part with a usable sample; rejected.jsonl in each part says why: mend the files")
    storage.write_bytes(storage.join(url, REJECTED_NAME), rejected_text([*rejected, *duplicates]))
    if base is None or splits != base.splits:
        presets = {manifest.preset for manifest in (*manifests.values(), *([base] if base else []))}
        preset = presets.pop() if len(presets) == 1 else "mixed"
        history = (*base.history, base.version()) if base else ()
        base = Manifest.make(preset=preset, labels=labels, splits=splits, history=history)
        storage.write_bytes(storage.join(url, MANIFEST_NAME), base.to_json().encode())
    joined = tuple(part for part in new if part in _listed(base))
    return MergeSummary(base, joined, duplicates, tuple(_warnings(duplicates)))


def _complete_parts(url: str) -> list[str]:
    names = [file.name.split("/") for file in storage.list_files(storage.join(url, PARTS_NAME))]
    return sorted(name[0] for name in names if len(name) == 2 and name[1] == MANIFEST_NAME)


def _listed(base: Manifest) -> set[str]:
    """Parts that a manifest lists already."""
    names = [shard.name.split("/") for split in base.splits.values() for shard in split.shards]
    return {name[1] for name in names if name[0] == PARTS_NAME and len(name) > 2}


def _prefix(part: str) -> str:
    return f"{PARTS_NAME}/{part}/" if part else ""


def _content(url: str, parts: Iterable[str]) -> Iterator[tuple[str, Content]]:
    """The files that these parts were made from; not those that a repair found lost, so they may come again."""
    lost = {place for row in read_rejected(url) if row.reason == LOST for place in row.samples}
    for part in parts:
        prefix = _prefix(part)
        for row in read_content(storage.join(url, prefix)) or []:
            if any((prefix + tar, offset) not in lost for tar, offset in row.samples):
                yield part, row


def _said(row: Content, part: str) -> str:
    return f"{row.source} in {part}" if part else row.source


def _duplicates(url: str, base: Manifest | None, new: list[str]) -> tuple[Rejection, ...]:
    """Files of the new parts that are in the data set, or in an earlier of these files: by name over all slices."""
    rows = list(_content(url, new))
    rows.sort(key=lambda item: ("" if is_slice(item[0]) else item[0], item[1].source, item[0]))
    by_name = {_said(row, part): (part, row) for part, row in rows}
    hashes = {name: row.sha256 for name, (_, row) in by_name.items()}
    found: list[Rejection] = []
    for name, first in find_duplicates(hashes, known_content(url) if base else {}).items():
        part, row = by_name[name]
        samples = tuple((_prefix(part) + tar, offset) for tar, offset in row.samples)
        found.append(Rejection(row.source, DUPLICATE, f"has the same bytes as {first}", part, samples))
    return tuple(found)


def _labels(base: Manifest | None, manifests: Iterable[Manifest]) -> tuple[str, ...]:
    """Labels keep their numbers; new ones follow."""
    old = base.labels if base else ()
    return (*old, *sort_labels({label for manifest in manifests for label in manifest.labels}.difference(old)))


def _join(
    url: str,
    file: Path,
    base: Manifest | None,
    manifests: Mapping[str, Manifest],
    split: str,
    labels: tuple[str, ...],
    dropped: set[Place],
) -> Split:
    """Write the index of a split that grew; returns what the manifest says of it."""
    old = base.splits.get(split) if base else None
    label_numbers = {label: number for number, label in enumerate(labels)}
    shards: list[Shard] = list(old.shards) if old else []
    blocks: list[Records] = [SplitReader(url, base, split).records] if base and old else []
    for part, manifest in manifests.items():
        if split not in manifest.splits:
            continue
        records = _part_records(url, part, manifest, split, dropped)
        if len(records):
            numbers = np.array([*(label_numbers[label] for label in manifest.labels), -1], np.int32)
            records["label"] = numbers[records["label"]]
            records["shard"] += len(shards)
            blocks.append(records)
            shards += [replace(shard, name=_prefix(part) + shard.name) for shard in manifest.splits[split].shards]
    if old is not None and len(blocks) == 1:
        return old
    if not blocks:
        return Split("", 0, 0, 0, 0, 0, 0, "", ())
    digest = hashlib.sha256()
    with file.open("wb") as out:
        for block in blocks:
            block.tofile(out)
            digest.update(block.data.cast("B"))
    name = index_name(split, digest.hexdigest() if base else "")
    storage.upload(file, storage.join(url, name))
    return describe(np.memmap(file, RECORD_DTYPE, "r"), name, digest.hexdigest(), shards)


def _part_records(url: str, part: str, manifest: Manifest, split: str, dropped: set[Place]) -> Records:
    """The rows of a part, without those of duplicates."""
    records: Records = np.array(SplitReader(storage.join(url, f"{PARTS_NAME}/{part}"), manifest, split).records)
    shards = {_prefix(part) + shard.name: number for number, shard in enumerate(manifest.splits[split].shards)}
    out = [shards[tar] << OFFSET_BITS | offset for tar, offset in dropped if tar in shards]
    places = records["shard"].astype(np.uint64) << np.uint64(OFFSET_BITS) | records["offset"]
    return records[~np.isin(places, np.array(out, np.uint64))]


def _warnings(duplicates: tuple[Rejection, ...]) -> list[str]:
    if not duplicates:
        return []
    first = duplicates[0]
    return [
        f"{len(duplicates)} files are left out as duplicates ({REJECTED_NAME} names them; for example {first.path} of "
        f"{first.part} {first.detail})"
    ]


@contextmanager
def _alone(url: str) -> Generator[None]:
    """On a disk, one process at a time joins."""
    path = storage.local_path(url)
    if path is None or not (path / PARTS_NAME).is_dir():
        yield
        return
    with (path / PARTS_NAME / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
