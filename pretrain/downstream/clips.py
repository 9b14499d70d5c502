"""Videos that somebody names -> samples of a packed data set -> one clip of each.

A folder of videos, or one file, is packed into a temporary folder first. So every command sees the same frames that
training would see (rotation, rate and colour treated alike), and files that training would reject are rejected here,
with the same reasons.

Legend: T frames.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.data.clip import pick_frames
from pretrain.data.decode import Frames, VideoFacts, decode_frames
from pretrain.load import Geometry
from shards.layout import MANIFEST_NAME
from shards.manifest import load_manifest
from shards.pack import PackOptions, PackProgress, pack
from shards.reader import SplitReader, open_split

HELD_OUT = ("val", "test")
MIDDLE = 0.5
ANY_LENGTH = 2
"""Frames. What is too short for the network is left out, and named, by the command that looks at it."""


@dataclass(frozen=True)
class Sample:
    """One sample of one split."""

    reader: SplitReader
    number: int

    @property
    def label(self) -> int:
        """Number of its class, -1 for none."""
        return int(self.reader.records[self.number]["label"])

    @property
    def group(self) -> int:
        """Samples of one group come from one source."""
        return int(self.reader.records[self.number]["group"])

    @property
    def is_held_out(self) -> bool:
        """Of a split that is not for training."""
        return self.reader.name in HELD_OUT

    @property
    def num_frames(self) -> int:
        """Frames that decode."""
        return int(self.reader.records[self.number]["num_frames"])

    @property
    def rate(self) -> float:
        """Frames per second."""
        return float(self.reader.records[self.number]["rate"])

    def decode(self, frame_numbers_T: NDArray[np.int32]) -> Frames:
        """Read and decode these frames. Raises SampleError."""
        record = self.reader.records[self.number]
        facts = VideoFacts(
            num_frames=int(record["num_frames"]),
            height=int(record["height"]),
            width=int(record["width"]),
            grid=int(record["grid"]),
            matrix=int(record["matrix"]),
            full_range=int(record["full_range"]),
        )
        return decode_frames(self.reader.read(self.number), frame_numbers_T, "pyav", facts)

    def middle_clip(self, frames: int, stride: int) -> Frames:
        """The clip in the middle; the stride drops to the largest that fits. Raises SampleError("short")."""
        grid = int(self.reader.records[self.number]["grid"])
        frame_numbers_T, _ = pick_frames(self.num_frames, frames, stride, MIDDLE, grid=grid)
        return self.decode(frame_numbers_T)


@dataclass(frozen=True)
class Samples:
    """Samples to look at, with the names of their classes."""

    labels: tuple[str, ...]
    items: Sequence[Sample]
    rejected: dict[str, int]
    """Files that could not be packed, by reason."""

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.items)


@contextmanager
def open_samples(
    data: str | Path, geometry: Geometry, *, progress: Callable[[PackProgress], None] | None = None
) -> Generator[Samples]:
    """Open a packed data set, or pack a folder of videos or a single video for as long as the context lasts.

    Args:
        data: Folder or manifest URL of a packed data set; else a folder (its subfolders name classes, or `train/CLASS`
            and `val/CLASS`), a CSV or JSONL list of videos, or one video file.
        geometry: Of the network: how long a sample must be.
        progress: Told how far the packing is.

    Raises:
        UserError: nothing of that name, or nothing usable in it.
    """
    if _is_packed(str(data)):
        yield _open(str(data), {})
        return
    span = geometry.frames * geometry.stride
    options = PackOptions(
        min_frames=ANY_LENGTH, max_frames=max(128, 2 * span), stride=geometry.stride, val_fraction=0.0
    )
    with tempfile.TemporaryDirectory(prefix="tubelet-") as temporary:
        packed = Path(temporary) / "packed"
        summary = pack(Path(data), packed, options, progress)
        yield _open(str(packed), summary.rejected)


def _open(url: str, rejected: dict[str, int]) -> Samples:
    manifest = load_manifest(url)
    readers = [open_split(url, name) for name, split in manifest.splits.items() if split.num_samples]
    items = [Sample(reader, number) for reader in readers for number in range(len(reader))]
    return Samples(manifest.labels, items, rejected)


def _is_packed(data: str) -> bool:
    return "://" in data or data.endswith(MANIFEST_NAME) or (Path(data) / MANIFEST_NAME).is_file()
