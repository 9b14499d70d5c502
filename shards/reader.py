"""The samples of one split by number: neighbours in one range read, checksum compared at every read.

    sample numbers ─ groups of neighbours (one GET each) ─ node cache, else storage ─ bytes, or why there are none

A tar is checked at first touch (size and tag); every later read of a remote one names the tag it must still have.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shards import storage
from shards.cache import SampleCache, node_copy
from shards.errors import SampleError, UserError
from shards.layout import RECORD_BYTES, RECORD_DTYPE, Manifest, Records, is_url
from shards.manifest import BLOCK_BYTES, load_manifest, manifest_url
from shards.tarstream import member_name
from shards.withdraw import withdrawn

MAX_GAP_BYTES = 4096
"""Neighbours are apart by tar headers and a description. Reading over them costs less than another request."""
MAX_GROUP_BYTES = 64 << 20


def open_split(
    url: str,
    split: str,
    *,
    attempt_s: float = 30.0,
    deadline_s: float = 300.0,
    hedge_s: float = 0.0,
    cache: SampleCache | None = None,
    node_folder: Path | None = None,
) -> SplitReader:
    """One split of a packed data set, ready to read. Raises UserError if it is not there or not what was packed.

    A read gets a second one beside it after `hedge_s` seconds (0 = never). `node_folder` is where a remote index is
    kept for all processes of this node.
    """
    manifest = load_manifest(url)
    if split not in manifest.splits:
        raise UserError(
            f"{url} has no split {split!r}; it must be one of {', '.join(manifest.splits)}: choose one of these"
        )
    folder = storage.parent(manifest_url(url))
    return SplitReader(
        folder,
        manifest,
        split,
        attempt_s=attempt_s,
        deadline_s=deadline_s,
        hedge_s=hedge_s,
        cache=cache,
        node_folder=node_folder,
    )


class SplitReader:
    """The samples of one split by number. Safe to share between threads.

    `records` is the memory-mapped index: one `RECORD_DTYPE` row per sample. `withdrawn` holds the samples that must
    not be used any more; reading one is a SampleError.
    """

    def __init__(
        self,
        folder: str,
        manifest: Manifest,
        split: str,
        *,
        attempt_s: float = 30.0,
        deadline_s: float = 300.0,
        hedge_s: float = 0.0,
        cache: SampleCache | None = None,
        node_folder: Path | None = None,
    ) -> None:
        self.manifest = manifest
        self.name = split
        self.split = manifest.splits[split]
        self._folder = folder
        self._limits = {"attempt_s": attempt_s, "deadline_s": deadline_s}
        self._hedge_s = hedge_s
        self._cache = cache
        self._tags: dict[int, str] = {}
        self._lock = threading.Lock()
        self.records = self._open_index(node_folder)
        self.withdrawn = withdrawn(folder, split, **self._limits)

    def __len__(self) -> int:
        return self.split.num_samples

    def groups(self, samples: Sequence[int]) -> list[list[int]]:
        """Cut samples into groups that one read each can fetch: neighbours in a tar, in the order they lie there."""
        places = sorted(
            (int(r["shard"]), int(r["offset"]), int(r["size"]), s) for s in samples for r in [self.records[s]]
        )
        groups: list[list[int]] = []
        first_shard, begin, end = -1, 0, 0
        for shard, offset, size, sample in places:
            is_near = (
                shard == first_shard and offset - end <= MAX_GAP_BYTES and offset + size - begin <= MAX_GROUP_BYTES
            )
            if is_near:
                groups[-1].append(sample)
            else:
                groups.append([sample])
                first_shard, begin = shard, offset
            end = offset + size
        return groups

    def read_group(self, samples: Sequence[int]) -> list[bytes | SampleError]:
        """The video bytes of each sample of a group, or why it cannot be had: `checksum`, `short`, `io`, `withdrawn`.

        Raises UserError if their tar is missing or is not the one that was indexed.
        """
        found: dict[int, bytes | SampleError] = {}
        for sample in samples:
            if sample in self.withdrawn:
                found[sample] = SampleError("withdrawn", f"sample {sample} was withdrawn")
            elif self._cache is not None and (data := self._cached(self._cache, sample)) is not None:
                found[sample] = data
        missing = [sample for sample in samples if sample not in found]
        for group in self.groups(missing) if found else [missing] * bool(missing):
            found.update(zip(group, self._fetch(group), strict=True))
        return [found[sample] for sample in samples]

    def read(self, sample: int) -> bytes:
        """The video bytes of a sample. Raises SampleError where it cannot be had, UserError as `read_group`."""
        (data,) = self.read_group([sample])
        if isinstance(data, SampleError):
            raise data
        return data

    def key(self, sample: int) -> str:
        """The sample's key, from its tar header: the name up to the first dot of its last part (WebDataset's rule)."""
        folder, slash, name = self._member_name(sample).removeprefix("./").rpartition("/")
        return folder + slash + name.partition(".")[0]

    def extension(self, sample: int) -> str:
        """What its bytes are (mp4, webm, ...), from its tar header."""
        return self._member_name(sample).rpartition(".")[2]

    def label_name(self, sample: int) -> str | None:
        """The sample's label, None if it has none."""
        label = int(self.records[sample]["label"])
        return None if label < 0 else self.manifest.labels[label]

    # ------------------------------------------------------------------ bytes

    def _cached(self, cache: SampleCache, sample: int) -> bytes | None:
        record = self.records[sample]
        return cache.get(self._cache_name(sample), int(record["size"]), int(record["checksum"]))

    def _cache_name(self, sample: int) -> str:
        """Names the content: the same bytes in a data set that grew or moved are found again."""
        record = self.records[sample]
        shard = self.split.shards[int(record["shard"])]
        place = f"{shard.sha256 or shard.name}:{shard.tag}:{int(record['offset'])}:{int(record['checksum'])}"
        return hashlib.blake2b(place.encode(), digest_size=16).hexdigest()

    def _fetch(self, samples: Sequence[int]) -> list[bytes | SampleError]:
        """One range read for all samples of a group, which are neighbours in one tar."""
        records = [self.records[sample] for sample in samples]
        shard, begin = int(records[0]["shard"]), int(records[0]["offset"])
        size = int(records[-1]["offset"]) + int(records[-1]["size"]) - begin
        try:
            data = self._bytes(shard, begin, size)
            return [
                self._checked(sample, shard, data[int(r["offset"]) - begin :][: int(r["size"])], int(r["checksum"]))
                for sample, r in zip(samples, records, strict=True)
            ]
        except SampleError as error:
            return [SampleError(error.reason, f"sample {sample}: {error.detail}") for sample in samples]

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        """One read. Raises SampleError where it fails, UserError where the tar is not what was indexed."""
        try:
            is_first = shard not in self._tags
            return self._first_range(shard, offset, size) if is_first else self._range(shard, offset, size)
        except storage.ShortReadError as error:
            self._recheck_shard(shard)
            raise SampleError("short", str(error)) from error
        except storage.ChangedObjectError as error:
            raise self._changed(shard) from error
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._missing(shard) from error
        except OSError as error:
            raise SampleError("io", f"{self._url(shard)}: {error}") from error

    def _checked(self, sample: int, shard: int, data: bytes, checksum: int) -> bytes | SampleError:
        if zlib.crc32(data) != checksum:
            self._recheck_shard(shard)
            return SampleError("checksum", f"sample {sample} in {self._url(shard)} is not what was packed")
        if self._cache is not None:
            self._cache.put(self._cache_name(sample), data)
        return data

    def _first_range(self, shard: int, offset: int, size: int) -> bytes:
        part = storage.first_range(self._url(shard), offset, size, hedge_s=self._hedge_s, **self._limits)
        self._check_facts(shard, part.object_bytes, part.tag)
        return part.data

    def _range(self, shard: int, offset: int, size: int) -> bytes:
        tag = self._tags[shard] if is_url(self._url(shard)) else ""
        return storage.read_range(self._url(shard), offset, size, tag=tag, hedge_s=self._hedge_s, **self._limits)

    def _member_name(self, sample: int) -> str:
        record = self.records[sample]
        shard, offset = int(record["shard"]), int(record["offset"])
        self._check_shard(shard)
        try:
            return member_name(partial(self._range, shard), offset)
        except tarfile.HeaderError as error:
            raise SampleError("checksum", f"no tar header before sample {sample} in {self._url(shard)}") from error

    # ------------------------------------------------------------------ is it what was packed?

    def _open_index(self, node_folder: Path | None) -> Records:
        url, num_bytes = storage.join(self._folder, self.split.index), self.split.num_samples * RECORD_BYTES
        path = storage.local_path(url)
        try:
            if path is None:
                # Checked against its hash while it is copied, once per node.
                folder = node_folder or Path(tempfile.gettempdir()) / f"tubelet-index-{os.getuid()}"
                copy = node_copy(url, self.split.sha256, num_bytes, folder, **self._limits)
                return np.memmap(copy, RECORD_DTYPE, "r")
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise UserError(f"{url} is missing; it must lie beside its manifest: copy the whole folder") from error
        except storage.ChangedObjectError as error:
            raise self._other_index(url) from error
        data: Any = np.memmap(path, RECORD_DTYPE, "r") if size == num_bytes and size else np.empty(0, RECORD_DTYPE)
        digest = hashlib.sha256()
        for first in range(0, num_bytes, BLOCK_BYTES):
            digest.update(memoryview(data).cast("B")[first : first + BLOCK_BYTES])
        if size != num_bytes or digest.hexdigest() != self.split.sha256:
            raise self._other_index(url)
        return data

    def _other_index(self, url: str) -> UserError:
        return UserError(
            f"{url} is not the index its manifest names; it must not be changed after packing: "
            "copy the folder again or repack"
        )

    def _url(self, shard: int) -> str:
        name = self.split.shards[shard].name
        return name if is_url(name) or name.startswith("/") else storage.join(self._folder, name)

    def _check_shard(self, shard: int) -> None:
        """The tar is there and is the one that was indexed."""
        if shard not in self._tags:
            self._check_facts(shard, *self._size_and_tag(shard))

    def _check_facts(self, shard: int, size: int, tag: str) -> None:
        """At first touch: a tar must have the size that was indexed (and the tag, where that is recorded)."""
        facts = self.split.shards[shard]
        if size != facts.num_bytes or (facts.tag and tag != facts.tag):
            raise UserError(
                f"{self._url(shard)} has {size} bytes (tag {tag}); it must have the {facts.num_bytes} that were indexed"
                f"{f' (tag {facts.tag})' if facts.tag else ''} (cut off or changed since): copy it again or repack"
            )
        with self._lock:
            self._tags.setdefault(shard, tag)

    def _recheck_shard(self, shard: int) -> None:
        """After a bad read: was the whole tar exchanged under the run, or cut before it?"""
        self._check_shard(shard)
        size, tag = self._size_and_tag(shard)
        if size != self.split.shards[shard].num_bytes or tag != self._tags[shard]:
            raise self._changed(shard)

    def _size_and_tag(self, shard: int) -> tuple[int, str]:
        try:
            return storage.size_and_tag(self._url(shard), **self._limits)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._missing(shard) from error
        except OSError as error:
            raise SampleError("io", f"{self._url(shard)}: {error}") from error

    def _changed(self, shard: int) -> UserError:
        return UserError(
            f"{self._url(shard)} was changed while it was in use; a packed tar must stay as it is: "
            "copy it again or repack, then resume"
        )

    def _missing(self, shard: int) -> UserError:
        return UserError(
            f"{self._url(shard)} is missing; every tar of the manifest must be there: copy it again or repack"
        )
