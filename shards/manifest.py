"""Index the tars of a packed folder, describe them in a manifest, and read samples back by number.

The index is made from the finished tars alone (member positions by `tarfile`, facts from KEY.json), so it says what is
really there. At training a sample is one byte range; its checksum is compared at every read.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards import storage
from shards.errors import UserError
from shards.layout import (
    MANIFEST_NAME,
    RECORD_DTYPE,
    Manifest,
    Records,
    Shard,
    Split,
    group_number,
    index_name,
)

BLOCK_BYTES = 8 << 20


def build_manifest(folder: Path, preset: str) -> Manifest:
    """Index every SPLIT-NNNNNN.tar of a folder; write the indexes, then manifest.json. Returns the manifest.

    Labels are numbered in sorted order over all splits (by value where all are whole numbers).
    """
    names: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].tar")):
        names.setdefault(path.name[:-11], []).append(path.name)
    scans = {split: [scan_tar(folder / name) for name in shards] for split, shards in names.items()}
    found = {sample.label for shards in scans.values() for scan in shards for sample in scan.samples}
    labels = sort_labels({label for label in found if label is not None})
    numbers = {label: number for number, label in enumerate(labels)}
    splits: dict[str, Split] = {}
    for split, shards in scans.items():
        records = np.concatenate([_records(scan, number, numbers) for number, scan in enumerate(shards)])
        data = records.tobytes()
        storage.write_atomic(folder / index_name(split), data)
        frames, sizes = records["num_frames"], records["size"]
        pixels = records["width"].astype(np.int64) * records["height"]
        splits[split] = Split(
            index=index_name(split),
            num_samples=len(records),
            num_frames=int(frames.sum(dtype=np.int64)),
            min_frames=int(frames.min()),
            max_frames=int(frames.max()),
            max_pixels=int(pixels.max()),
            max_bytes=int(sizes.max()),
            sha256=hashlib.sha256(data).hexdigest(),
            shards=tuple(scan.shard for scan in shards),
        )
    manifest = Manifest.make(preset=preset, labels=tuple(labels), splits=splits)
    storage.write_atomic(folder / MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def sort_labels(labels: set[str]) -> list[str]:
    """Label names in the order of their numbers."""
    if all(label.isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


@dataclass(frozen=True)
class ScannedSample:
    """One sample as found in a tar."""

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


def scan_tar(path: Path) -> Scan:
    """Read a finished tar once: where each video lies, its checksum, and what its KEY.json says."""
    videos: dict[str, tuple[int, int, int]] = {}
    facts: dict[str, dict[str, Any]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            if extension == "json":
                facts[key] = json.loads(data)
            else:
                videos[key] = (member.offset_data, member.size, zlib.crc32(data))
    assert videos.keys() == facts.keys()
    samples = tuple(ScannedSample(*place, facts[key]["label"], facts[key]) for key, place in videos.items())
    shard = Shard(path.name, path.stat().st_size, len(samples), sha256_of(str(path)))
    return Scan(shard, samples)


def sha256_of(url: str) -> str:
    """Hash of a whole file, read in blocks."""
    size, _ = storage.size_and_tag(url)
    digest = hashlib.sha256()
    for offset in range(0, size, BLOCK_BYTES):
        digest.update(storage.read_range(url, offset, min(BLOCK_BYTES, size - offset)))
    return digest.hexdigest()


def _records(scan: Scan, shard: int, numbers: dict[str, int]) -> Records:
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


def manifest_url(url: str) -> str:
    """URL of manifest.json, for a folder or for the manifest itself."""
    return url if url.endswith(".json") else storage.join(url, MANIFEST_NAME)
