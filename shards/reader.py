"""The samples of one split by number: one byte range each, checksum compared at every read."""

from __future__ import annotations

import hashlib
import tarfile
import threading
import zlib
from pathlib import PurePosixPath
from typing import Any, cast

import numpy as np

from shards import storage
from shards.errors import SampleError, UserError
from shards.layout import RECORD_BYTES, RECORD_DTYPE, Manifest, Records
from shards.manifest import load_manifest, manifest_url

TAR_BLOCK_BYTES = 512


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
