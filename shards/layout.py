"""Names and fields of a packed data set: what lies where, in which bytes.

    DST/manifest.json            what there is, with hashes (`Manifest`)
    DST/SPLIT.index              one `RECORD_DTYPE` row per sample, memory-mapped at training
    DST/SPLIT-000000.tar         WebDataset tars: KEY.mp4, then KEY.json
    DST/rejected.jsonl           files that were refused, and why
    DST/content.jsonl            sha256 of every file that was packed: finds duplicates when parts are joined
    DST/packed.json              how it was packed: tells the same command, started again, that it is done
    DST/parts/NAME/              a packed folder of its own, which DST's manifest lists as well (shards/merge.py)

All names in the manifest are relative, so a packed folder can be moved or uploaded as it is. Only tars made by others
are named by their full URL.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"
CONTENT_NAME = "content.jsonl"
PACKED_NAME = "packed.json"
PARTS_NAME = "parts"
MATRIX_BT601 = 0
MATRIX_BT709 = 1
LEVEL_DECODE = 0
"""How sure the number of frames is: every frame was decoded."""
LEVEL_PACKETS = 1
"""Packets were counted."""
LEVEL_HEADER = 2
"""It is the container's word."""

RECORD_DTYPE: np.dtype[np.void] = np.dtype(
    [
        ("offset", "<u8"),  # of the video bytes in their tar
        ("size", "<u4"),  # of the video, in bytes
        ("checksum", "<u4"),  # zlib.crc32 of the video bytes
        ("num_frames", "<u4"),  # that really decode
        ("rate", "<f4"),  # frames per second
        ("shard", "<u4"),  # number of the tar within the split
        ("label", "<i4"),  # number in `Manifest.labels`, -1 for none
        ("group", "<u4"),  # crc32 of the group's name
        ("width", "<u2"),
        ("height", "<u2"),
        ("grid", "<u2"),  # every frame number divisible by it is a reference frame; 0 = irregular: no skipping
        ("motion", "<f2"),  # mean change of luma between frames a stride apart, in grey levels
        ("matrix", "u1"),  # MATRIX_BT601 or MATRIX_BT709
        ("full_range", "u1"),
        ("level", "u1"),  # LEVEL_DECODE, LEVEL_PACKETS or LEVEL_HEADER
        ("spare", "u1"),  # keeps the row at 48 bytes, the offsets aligned
    ]
)
RECORD_BYTES = 48
SOURCE_SHIFT = 40
"""A run's number of a sample: its source's place in `data.shards` << SOURCE_SHIFT, plus its row in that index."""
assert RECORD_DTYPE.itemsize == RECORD_BYTES

Records = NDArray[np.void]
Place = tuple[str, int]
"""Where a sample lies: name of its tar, offset of the video bytes in it. Stays right when rows of an index change."""


@dataclass(frozen=True)
class Shard:
    """One tar of a split."""

    name: str
    """Relative to the manifest; the full URL of a tar made by others."""
    num_bytes: int
    num_samples: int
    sha256: str
    """"" where it is not known: tars made by others are not read whole."""
    tag: str = ""
    """Its etag when it was indexed, where sha256 is not known."""


@dataclass(frozen=True)
class Split:
    """One part of the data set (train, val, ...): its index, its tars, and what a plan must know of its samples."""

    index: str
    num_samples: int
    num_frames: int
    min_frames: int
    max_frames: int
    max_pixels: int
    """Largest width x height of a sample."""
    max_bytes: int
    """Largest sample."""
    sha256: str
    """Of the index file."""
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Version:
    """A manifest that a data set had before it grew: its samples are the first `num_samples` of each split."""

    hash: str
    num_samples: dict[str, int]
    """Split -> number of samples."""


@dataclass(frozen=True)
class Manifest:
    """What a packed folder holds. `hash` covers everything else here, and so, through the index, every sample."""

    format: int
    preset: str
    labels: tuple[str, ...]
    splits: dict[str, Split]
    hash: str
    history: tuple[Version, ...] = ()
    """What this one grew out of, oldest first."""

    @classmethod
    def make(
        cls, *, preset: str, labels: tuple[str, ...], splits: dict[str, Split], history: tuple[Version, ...] = ()
    ) -> Manifest:
        """The manifest of these splits, with its hash."""
        body = _body(FORMAT_VERSION, preset, labels, splits, history)
        return cls(FORMAT_VERSION, preset, labels, splits, _hash(body), history)

    def version(self) -> Version:
        """This manifest as those that grow out of it remember it."""
        return Version(self.hash, {name: split.num_samples for name, split in self.splits.items()})

    def to_json(self) -> str:
        """Readable JSON, with the hash; `from_json` reads it back."""
        body = _body(self.format, self.preset, self.labels, self.splits, self.history)
        return json.dumps({**body, "hash": self.hash}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Read a manifest. Raises UserError, naming `where`, if it is damaged, edited or of another format."""
        try:
            row = cast("dict[str, Any]", json.loads(text))
            version = int(row["format"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where} is no manifest of a packed data set ({error}); pack the data again") from error
        if version != FORMAT_VERSION:
            raise UserError(
                f"{where} has format {version}; this version of tubelet reads format {FORMAT_VERSION}: "
                "use the version that packed it, or pack again"
            )
        try:
            splits = {str(name): _split(value) for name, value in row["splits"].items()}
            history = tuple(Version(**value) for value in row.get("history", []))
            found = cls(version, str(row["preset"]), tuple(map(str, row["labels"])), splits, str(row["hash"]), history)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where} is damaged ({error!r}); copy the packed folder again or repack") from error
        if found.hash != _hash(_body(found.format, found.preset, found.labels, found.splits, found.history)):
            raise UserError(f"{where} does not match its own hash: it was edited or damaged; copy it again or repack")
        indexes = {split.index for split in found.splits.values()}
        for name in found.file_names():
            if is_url(name) and name not in indexes:
                continue
            if name.startswith("/") or ".." in name.split("/") or is_url(name):
                raise UserError(f"{where} names the file {name!r} outside its folder; do not use this data set")
        return found

    def file_names(self) -> list[str]:
        """Every index and tar, relative to the folder of the manifest; tars made by others by their URL."""
        names = [split.index for split in self.splits.values()]
        return names + [shard.name for split in self.splits.values() for shard in split.shards]


def is_url(name: str) -> bool:
    """Whether a tar is named by its full URL."""
    return "://" in name


def shard_name(split: str, number: int) -> str:
    """File name of a tar."""
    return f"{split}-{number:06d}.tar"


def spread_name(name: str) -> str:
    """The name of a tar in an object store, below one of 256 prefixes: requests per second are limited per prefix."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:2]}/{name}"


def index_name(split: str, sha256: str = "") -> str:
    """File name of a split's index. One that replaces another has its hash in the name: none changes while in use."""
    return f"{split}-{sha256[:12]}.index" if sha256 else f"{split}.index"


def sample_key(split: str, number: int, part: str = "") -> str:
    """The key of a sample: unique in the data set, without a dot (WebDataset cuts names at the first one)."""
    return f"{split}-{part}-{number:09d}" if part else f"{split}-{number:09d}"


def group_number(group: str) -> int:
    """What a record keeps of a group's name."""
    return zlib.crc32(group.encode())


def _split(row: dict[str, Any]) -> Split:
    row.update(shards=tuple(Shard(**shard) for shard in row["shards"]))
    return Split(**row)


def _body(
    version: int, preset: str, labels: tuple[str, ...], splits: dict[str, Split], history: tuple[Version, ...]
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "format": version,
        "preset": preset,
        "labels": list(labels),
        "splits": {name: asdict(split) for name, split in splits.items()},
    }
    for split in body["splits"].values():  # what is not used is left out: older manifests keep their hash
        for shard in split["shards"]:
            if not shard["tag"]:
                del shard["tag"]
    if history:
        body["history"] = [asdict(version) for version in history]
    return body


def _hash(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
