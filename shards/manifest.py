"""Index the tars of a packed folder, describe them in a manifest, and read samples back by number.

The index is made from the finished tars alone (member positions by `tarfile`, facts from KEY.json), so it says what is
really there. At training a sample is one byte range; its checksum is compared at every read.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np

from shards import storage
from shards.errors import SampleError, UserError
from shards.layout import (
    MANIFEST_NAME,
    RECORD_BYTES,
    RECORD_DTYPE,
    Manifest,
    Records,
    Shard,
    Split,
    group_number,
    index_name,
)

BLOCK_BYTES = 8 << 20
TAR_BLOCK_BYTES = 512


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


def open_split(url: str, split: str, *, attempt_s: float = 30.0, deadline_s: float = 300.0) -> SplitReader:
    """One split of a packed data set, ready to read. Raises UserError if it is not there or not what was packed."""
    manifest = load_manifest(url)
    if split not in manifest.splits:
        raise UserError(
            f"{url} has no split {split!r}; it must be one of {', '.join(manifest.splits)}: choose one of these"
        )
    folder = storage.parent(manifest_url(url))
    return SplitReader(folder, manifest, split, attempt_s=attempt_s, deadline_s=deadline_s)


class SplitReader:
    """The samples of one split by number. Safe to share between threads.

    `.records` is the index (memory-mapped where it is local). `.read` gives the checked bytes of a sample.
    """

    def __init__(
        self, folder: str, manifest: Manifest, name: str, *, attempt_s: float = 30.0, deadline_s: float = 300.0
    ) -> None:
        self.manifest = manifest
        self.name = name
        self.split = manifest.splits[name]
        self._folder = folder
        self._attempt_s = attempt_s
        self._deadline_s = deadline_s
        self._tags: dict[int, str] = {}
        self._lock = threading.Lock()
        self.records: Records = self._open_index()

    def __len__(self) -> int:
        return self.split.num_samples

    def read(self, sample: int) -> bytes:
        """The video bytes of a sample, checksum compared.

        Raises SampleError (`checksum`, `short`, `io`) if this sample cannot be had, UserError if its tar is missing or
        is not the one that was indexed.
        """
        record = self.records[sample]
        shard = int(record["shard"])
        self._check_shard(shard)
        try:
            data = self._range(shard, int(record["offset"]), int(record["size"]))
        except storage.ShortReadError as error:
            self._recheck_shard(shard)
            raise SampleError("short", str(error)) from error
        except FileNotFoundError as error:
            raise self._missing(shard) from error
        except OSError as error:
            raise SampleError("io", f"sample {sample} in {self._url(shard)}: {error}") from error
        if zlib.crc32(data) != int(record["checksum"]):
            self._recheck_shard(shard)
            raise SampleError("checksum", f"sample {sample} in {self._url(shard)} is not what was packed")
        return data

    def key(self, sample: int) -> str:
        """The sample's key, from its tar header."""
        return PurePosixPath(self._member_name(sample)).name.partition(".")[0]

    def extension(self, sample: int) -> str:
        """What its bytes are (mp4, webm, ...), from its tar header."""
        return self._member_name(sample).rpartition(".")[2]

    def label_name(self, sample: int) -> str | None:
        """The sample's label, None if it has none."""
        label = int(self.records[sample]["label"])
        return None if label < 0 else self.manifest.labels[label]

    def _member_name(self, sample: int) -> str:
        record = self.records[sample]
        shard, offset = int(record["shard"]), int(record["offset"])
        self._check_shard(shard)
        header = self._range(shard, offset - TAR_BLOCK_BYTES, TAR_BLOCK_BYTES)
        try:
            return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.HeaderError as error:
            raise SampleError("checksum", f"no tar header before sample {sample} in {self._url(shard)}") from error

    def _open_index(self) -> Records:
        url = storage.join(self._folder, self.split.index)
        path = storage.local_path(url)
        try:
            if path is not None:
                size = path.stat().st_size
                data: Any = np.memmap(path, RECORD_DTYPE, "r") if size % RECORD_BYTES == 0 and size else b""
            else:
                data = storage.read_bytes(url, attempt_s=self._attempt_s, deadline_s=self._deadline_s)
        except FileNotFoundError as error:
            raise UserError(f"{url} is missing; it must lie beside its manifest: copy the whole folder") from error
        if hashlib.sha256(memoryview(data).cast("B") if len(data) else b"").hexdigest() != self.split.sha256:
            raise UserError(
                f"{url} is not the index its manifest names; it must not be changed after packing: "
                "copy the folder again or repack"
            )
        return data if path is not None else np.frombuffer(cast("bytes", data), RECORD_DTYPE)

    def _url(self, shard: int) -> str:
        return storage.join(self._folder, self.split.shards[shard].name)

    def _range(self, shard: int, offset: int, size: int) -> bytes:
        return storage.read_range(
            self._url(shard), offset, size, attempt_s=self._attempt_s, deadline_s=self._deadline_s
        )

    def _check_shard(self, shard: int) -> None:
        """At first touch: the tar is there and has the size that was indexed."""
        if shard in self._tags:
            return
        wanted = self.split.shards[shard].num_bytes
        size, tag = self._size_and_tag(shard)
        if size != wanted:
            raise UserError(
                f"{self._url(shard)} has {size} bytes; it must have the {wanted} that were indexed (cut off or changed "
                "after packing): copy it again or repack"
            )
        with self._lock:
            self._tags.setdefault(shard, tag)

    def _recheck_shard(self, shard: int) -> None:
        """After a bad read: was the whole tar exchanged under the run?"""
        size, tag = self._size_and_tag(shard)
        if size != self.split.shards[shard].num_bytes or tag != self._tags[shard]:
            raise UserError(
                f"{self._url(shard)} was changed while it was in use; a packed tar must stay as it is: "
                "copy it again or repack, then resume"
            )

    def _size_and_tag(self, shard: int) -> tuple[int, str]:
        try:
            return storage.size_and_tag(self._url(shard), attempt_s=self._attempt_s, deadline_s=self._deadline_s)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._missing(shard) from error
        except OSError as error:
            raise SampleError("io", f"{self._url(shard)}: {error}") from error

    def _missing(self, shard: int) -> UserError:
        return UserError(
            f"{self._url(shard)} is missing; every tar of the manifest must be there: copy it again or repack"
        )
