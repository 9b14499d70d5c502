"""Index the tars of a packed folder, describe them in a manifest, and read samples back by number.

The index is made from the finished tars alone (member positions by `tarfile`, facts from KEY.json), so it says what is
really there. At training a sample is one byte range; its checksum is compared at every read.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards import storage
from shards.content import Content, content_text
from shards.errors import UserError
from shards.layout import (
    CONTENT_NAME,
    MANIFEST_NAME,
    RECORD_DTYPE,
    Manifest,
    Place,
    Records,
    Shard,
    Split,
    group_number,
    index_name,
    is_url,
)
from shards.tarstream import BrokenTarError, TarStream

BLOCK_BYTES = 8 << 20
TARS = "*-[0-9][0-9][0-9][0-9][0-9][0-9].tar"
SCANS = 4
"""Tars read at the same time: hashing runs outside of the interpreter's lock."""


def build_manifest(folder: Path, preset: str) -> Manifest:
    """Index every SPLIT-NNNNNN.tar of a folder; write indexes and content.jsonl, then manifest.json. Returns it.

    Labels are numbered in sorted order over all splits (by value where all are whole numbers).
    """
    names: dict[str, list[str]] = {}
    for path in sorted([*folder.glob(TARS), *folder.glob(f"*/{TARS}")], key=lambda path: path.name):
        names.setdefault(path.name[:-11], []).append(path.relative_to(folder).as_posix())
    with ThreadPoolExecutor(SCANS) as pool:
        scans = {
            split: list(pool.map(scan_tar, [str(folder / name) for name in shards], shards))
            for split, shards in names.items()
        }
    found = {sample.label for shards in scans.values() for scan in shards for sample in scan.samples}
    labels = sort_labels({label for label in found if label is not None})
    numbers = {label: number for number, label in enumerate(labels)}
    splits: dict[str, Split] = {}
    for split, shards in scans.items():
        records = np.concatenate([make_records(scan, number, numbers) for number, scan in enumerate(shards)])
        data = records.tobytes()
        storage.write_atomic(folder / index_name(split), data)
        sha256 = hashlib.sha256(data).hexdigest()
        splits[split] = describe(records, index_name(split), sha256, [scan.shard for scan in shards])
    storage.write_atomic(folder / CONTENT_NAME, content_text(_content(scans)))
    manifest = Manifest.make(preset=preset, labels=tuple(labels), splits=splits)
    storage.write_atomic(folder / MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def describe(records: Records, index: str, sha256: str, shards: Sequence[Shard]) -> Split:
    """What the manifest says of a split that has samples."""
    frames = records["num_frames"]
    pixels = records["width"].astype(np.int64) * records["height"]
    return Split(
        index=index,
        num_samples=len(records),
        num_frames=int(frames.sum(dtype=np.int64)),
        min_frames=int(frames.min()),
        max_frames=int(frames.max()),
        max_pixels=int(pixels.max()),
        max_bytes=int(records["size"].max()),
        sha256=sha256,
        shards=tuple(shards),
    )


def _content(scans: Mapping[str, Sequence[Scan]]) -> list[Content]:
    places: dict[tuple[str, str, str], list[Place]] = {}
    for split, shards in scans.items():
        for scan in shards:
            for sample in scan.samples:
                key = (sample.facts["source"], sample.facts["source_sha256"], split)
                places.setdefault(key, []).append((scan.shard.name, sample.offset))
    return [Content(*key, tuple(samples)) for key, samples in sorted(places.items())]


def sort_labels(labels: set[str]) -> list[str]:
    """Label names in the order of their numbers."""
    if all(label.isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


@dataclass(frozen=True)
class ScannedSample:
    """One sample as found in a tar."""

    key: str
    offset: int
    size: int
    checksum: int
    label: str | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class Scan:
    """One tar as found on disk."""

    shard: Shard
    samples: tuple[ScannedSample, ...]


def scan_tar(url: str, name: str) -> Scan:
    """Read a tar that we packed once: where each video lies, its checksum, and what its KEY.json says.

    Raises BrokenTarError for one that is not as it was packed.
    """
    videos: dict[str, tuple[int, int, int]] = {}
    facts: dict[str, dict[str, Any]] = {}
    num_bytes, _ = storage.size_and_tag(url)
    with TarStream(url, num_bytes) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if extension == "json":
                try:
                    facts[key] = json.loads(b"".join(tar.body()))
                except ValueError as error:
                    raise BrokenTarError(f"{url}: {member.name} is damaged ({error})") from error
            else:
                checksum = 0
                for part in tar.body():
                    checksum = zlib.crc32(part, checksum)
                videos[key] = (member.offset, member.size, checksum)
    if videos.keys() != facts.keys():
        raise BrokenTarError(f"{url}: {min(videos.keys() ^ facts.keys())} lacks its video or its description")
    samples = tuple(ScannedSample(key, *place, facts[key]["label"], facts[key]) for key, place in videos.items())
    return Scan(Shard(name, num_bytes, len(samples), tar.sha256), samples)


def sha256_of(url: str) -> str:
    """Hash of a whole file, read in blocks."""
    size, _ = storage.size_and_tag(url)
    digest = hashlib.sha256()
    for offset in range(0, size, BLOCK_BYTES):
        digest.update(storage.read_range(url, offset, min(BLOCK_BYTES, size - offset)))
    return digest.hexdigest()


def make_records(scan: Scan, shard: int, numbers: Mapping[str, int]) -> Records:
    """Index rows of a tar; `shard` is its number in the split, `numbers` are those of the labels."""
    records = np.zeros(len(scan.samples), RECORD_DTYPE)
    for record, sample in zip(records, scan.samples, strict=True):
        facts = sample.facts
        record["offset"], record["size"], record["checksum"] = sample.offset, sample.size, sample.checksum
        record["shard"] = shard
        record["label"] = -1 if sample.label is None else numbers[sample.label]
        record["group"] = group_number(facts["group"])
        for name in ("num_frames", "rate", "width", "height", "grid", "motion", "matrix", "full_range"):
            record[name] = facts[name]
    return records


def load_manifest(url: str) -> Manifest:
    """The manifest of a packed folder, given the folder or manifest.json itself. Raises UserError if there is none."""
    where = manifest_url(url)
    path = storage.local_path(url)
    if path is not None and path.name != MANIFEST_NAME and path.is_file():
        raise UserError(
            f"{url} is a file that is no {MANIFEST_NAME}; a data set is named by the folder that `tubelet pack` made, "
            f"or by the {MANIFEST_NAME} in it: give one of the two"
        )
    try:
        return Manifest.from_json(storage.read_bytes(where), where)
    except FileNotFoundError as error:
        raise UserError(
            f"{where} does not exist; a data set is a folder that `tubelet pack` made: check the path or pack one"
        ) from error
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{where} cannot be read: {error}; check the path and the permissions") from error


def shard_url(folder: str, name: str) -> str:
    """URL of a tar, given the folder of its manifest."""
    return name if is_url(name) else storage.join(folder, name)


def manifest_url(url: str) -> str:
    """URL of manifest.json, for a folder or for the manifest itself."""
    return url if url.endswith(".json") else storage.join(url, MANIFEST_NAME)
