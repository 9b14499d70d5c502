"""What a packing says when it is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shards.convert import Outcome
from shards.layout import REJECTED_NAME, Manifest
from shards.sources import Listing, Source


@dataclass(frozen=True)
class PackSummary:
    """What was packed. `lines()` says it in words."""

    manifest: Manifest
    num_files: int
    num_ignored_files: int
    num_reused: int
    rejected: dict[str, int]
    """Reason -> number of files."""
    split_rule: str
    """How files were given to splits, in words."""
    warnings: tuple[str, ...]
    title: str = ""
    """Which part of a larger data set this is."""
    is_old: bool = False
    """It was packed before; nothing was done."""

    @property
    def num_rejected(self) -> int:
        """Files that gave no sample."""
        return sum(self.rejected.values())

    @property
    def num_samples(self) -> int:
        """Samples over all splits."""
        return sum(split.num_samples for split in self.manifest.splits.values())

    def lines(self) -> list[str]:
        """For people: counts, the split rule, rejections by reason, warnings."""
        if self.is_old:
            return [f"{self.title} is packed already ({self.num_samples} samples); nothing to do"]
        title = f"{self.title}: " if self.title else ""
        lines = [f"{title}packed {self.num_files - self.num_rejected} of {self.num_files} files"]
        if self.num_reused:
            lines[0] += f" ({self.num_reused} of them converted before the interruption)"
        if self.num_ignored_files:
            lines[0] += f"; {self.num_ignored_files} other files in the folder are no videos"
        lines += split_lines(self.manifest)
        lines.append(self.split_rule)
        if not self.title:
            lines += held_out_lines(self.manifest)
        if self.manifest.labels:
            lines.append(f"labels: {len(self.manifest.labels)}")
        if self.rejected:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.rejected.items()))
            lines.append(f"rejected {self.num_rejected}: {reasons} ({REJECTED_NAME} names each file and why)")
        return lines + [f"warning: {warning}" for warning in self.warnings]


def split_lines(manifest: Manifest) -> list[str]:
    """A line per split: samples, frames, bytes, tars."""
    lines: list[str] = []
    for name, split in sorted(manifest.splits.items()):
        num_bytes = sum(shard.num_bytes for shard in split.shards)
        lines.append(
            f"  {name}: {split.num_samples} samples, {split.num_frames} frames ({split.min_frames} to "
            f"{split.max_frames} each), {num_bytes / 1e6:.1f} MB in {len(split.shards)} tars"
        )
    return lines


def held_out_lines(manifest: Manifest) -> list[str]:
    """What to say of a data set without a split to evaluate on."""
    if "val" in manifest.splits:
        return []
    return [
        "nothing is held out, so training will not evaluate; to hold something out, pack two source files or more with "
        "--val-fraction above 0, or give splits (folders train/ and val/, or a column split)"
    ]


def find_warnings(listing: Listing, rejected: Mapping[str, Outcome], manifest: Manifest) -> Iterator[str]:
    """What a person should know of a whole data set that was packed."""
    if listing.ignored_columns:
        yield f"columns that mean nothing here were ignored: {', '.join(listing.ignored_columns)}"
    by_label: dict[str, list[Source]] = {}
    for source in listing.sources:
        if source.label is not None:
            by_label.setdefault(source.label, []).append(source)
    for label, sources in sorted(by_label.items()):
        if all(source.name in rejected for source in sources):
            yield f"class {label!r} has nothing readable ({len(sources)} files rejected) and is not among the labels"
    num_samples = {name: split.num_samples for name, split in manifest.splits.items()}
    if num_samples.get("val", 0) > num_samples.get("train", 0):
        yield (
            f"val holds more samples ({num_samples['val']}) than train ({num_samples.get('train', 0)}): give splits "
            "(folders train/ and val/, or a column split) to choose what is held out"
        )
