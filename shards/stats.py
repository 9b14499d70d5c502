"""What a data set holds, counted from its index alone: a million rows at a time, whatever the number of rows.

Values are counted in classes 6 % wide, so that quantiles need no second pass and no memory for the rows.
"""

from __future__ import annotations

import bisect
import math
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import storage
from shards.layout import LEVEL_DECODE, LEVEL_HEADER, LEVEL_PACKETS, Manifest, Records
from shards.manifest import load_manifest, manifest_url
from shards.reader import SplitReader
from shards.rejected import read_rejected
from shards.withdraw import read_withdrawals

ROWS_AT_A_TIME = 1 << 20
PER_DECADE = 40
LOWEST, NUM_DECADES = -3, 15
"""Classes from 10^-3 on; the first one also takes what is smaller, and 0."""
NUM_BARS = 24
NUM_SHOWN = 8
MOST_EXACT_GROUPS = 1 << 20
GROUP_BITS = 27
LEVEL_NAMES = {LEVEL_DECODE: "every frame decoded", LEVEL_PACKETS: "packets counted", LEVEL_HEADER: "header believed"}
SPARKS = " ▁▂▃▄▅▆▇█"

Values = Callable[[Records], NDArray[np.float64]]
MEASURES: dict[str, tuple[str, Values]] = {
    "duration": ("s", lambda rows: rows["num_frames"] / np.maximum(rows["rate"].astype(np.float64), 1e-9)),
    "rate": ("frames/s", lambda rows: rows["rate"].astype(np.float64)),
    "short side": ("pixels", lambda rows: np.minimum(rows["width"], rows["height"]).astype(np.float64)),
    "bytes per second": (
        "B/s",
        lambda rows: rows["size"] * rows["rate"].astype(np.float64) / np.maximum(rows["num_frames"], 1),
    ),
    "motion": ("grey levels", lambda rows: rows["motion"].astype(np.float64)),
}


@dataclass(frozen=True)
class Distribution:
    """How one measure is spread. Quantiles are right within 6 %."""

    name: str
    unit: str
    lowest: float
    q05: float
    median: float
    q95: float
    highest: float
    edges: tuple[float, ...]
    """Borders of the bars, rising by equal factors; one more than `counts`."""
    counts: tuple[int, ...]

    def line(self) -> str:
        """A row of at most 80 columns, with a picture of the bars."""
        top = max(self.counts)
        bars = "".join(SPARKS[math.ceil(count / top * (len(SPARKS) - 1))] for count in self.counts)
        name = f"{self.name}, {self.unit}"
        low, median, high = (short(value) for value in (self.lowest, self.median, self.highest))
        return f"    {name:<21} {low:>6} {bars:^{NUM_BARS}} {high:>6}  median {median}"


@dataclass(frozen=True)
class SplitStats:
    """One split."""

    name: str
    num_samples: int
    num_frames: int
    hours: float
    num_shards: int
    num_bytes: int
    """Of the videos."""
    num_shard_bytes: int
    distributions: tuple[Distribution, ...]
    sizes: tuple[tuple[str, int], ...]
    """WIDTHxHEIGHT and how many samples have it, most frequent first."""
    num_sizes: int
    labels: tuple[tuple[str, int], ...]
    """Every label that has samples here, most frequent first."""
    num_unlabelled: int
    num_groups: int
    are_groups_exact: bool
    levels: dict[str, int]
    num_withdrawn: int


@dataclass(frozen=True)
class Stats:
    """A data set."""

    url: str
    preset: str
    num_versions: int
    """How often it has been published: 1, and 1 for every time it grew."""
    splits: tuple[SplitStats, ...]
    rejected: dict[str, int]
    """Reason -> rows of rejected.jsonl."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a terminal of 80 columns."""
        kind = "tars made by others" if self.preset == "index" else f"packed with preset {self.preset}"
        lines = [f"{self.url}: {kind}" + (f", grown {self.num_versions - 1} times" if self.num_versions > 1 else "")]
        for split in self.splits:
            lines += _split_lines(split)
        if self.rejected:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.rejected.items())
            lines.append(f"rejected {sum(self.rejected.values())}: {reasons}")
        return lines


def stats(url: str) -> Stats:
    """Count what a data set holds. Raises UserError if there is none, or its index is not what was packed."""
    manifest = load_manifest(url)
    folder = storage.parent(manifest_url(url))
    withdrawn = Counter(row.split for row in read_withdrawals(url))
    with tempfile.TemporaryDirectory(prefix="tubelet-stats-") as scratch:
        splits = tuple(
            count_split(manifest, name, _open(folder, manifest, name, Path(scratch)), withdrawn[name])
            for name in sorted(manifest.splits)
        )
    rejected = Counter(row.reason for row in read_rejected(folder))
    return Stats(url, manifest.preset, len(manifest.history) + 1, splits, dict(rejected.most_common()))


def count_split(manifest: Manifest, name: str, records: Records, num_withdrawn: int) -> SplitStats:
    """Count one split, given its rows: memory-mapped or in memory."""
    split = manifest.splits[name]
    spreads = {measure: _Spread() for measure in MEASURES}
    sizes: Counter[int] = Counter()
    labels, levels = np.zeros(len(manifest.labels) + 1, np.int64), np.zeros(256, np.int64)
    groups = _Groups(len(records))
    num_bytes, seconds = 0, 0.0
    for rows in _pieces(records):
        for measure, (_, values) in MEASURES.items():
            spreads[measure].add(values(rows))
        seconds += float(MEASURES["duration"][1](rows).sum())
        num_bytes += int(rows["size"].sum(dtype=np.int64))
        shapes, counts = np.unique(rows["width"].astype(np.uint32) << 16 | rows["height"], return_counts=True)
        for shape, count in zip(shapes.tolist(), counts.tolist(), strict=True):
            sizes[shape] += count
        labels += np.bincount(rows["label"] + 1, minlength=len(labels))
        levels += np.bincount(rows["level"], minlength=256)
        groups.add(rows["group"])
    order: list[int] = np.argsort(-labels[1:], kind="stable").tolist()
    num_groups, are_exact = groups.count()
    return SplitStats(
        name=name,
        num_samples=len(records),
        num_frames=split.num_frames,
        hours=seconds / 3600,
        num_shards=len(split.shards),
        num_bytes=num_bytes,
        num_shard_bytes=sum(shard.num_bytes for shard in split.shards),
        distributions=tuple(spreads[measure].summary(measure, unit) for measure, (unit, _) in MEASURES.items()),
        sizes=tuple((f"{shape >> 16}x{shape & 0xFFFF}", count) for shape, count in sizes.most_common(NUM_SHOWN)),
        num_sizes=len(sizes),
        labels=tuple((manifest.labels[label], int(labels[label + 1])) for label in order if labels[label + 1]),
        num_unlabelled=int(labels[0]),
        num_groups=num_groups,
        are_groups_exact=are_exact,
        levels={LEVEL_NAMES.get(level, str(level)): int(levels[level]) for level in np.flatnonzero(levels).tolist()},
        num_withdrawn=num_withdrawn,
    )


def _open(folder: str, manifest: Manifest, name: str, scratch: Path) -> Records:
    """The rows of a split; a remote index is copied first, as it may be larger than the memory."""
    return SplitReader(folder, manifest, name, node_folder=scratch).records


def _pieces(records: Records) -> Iterator[Records]:
    for start in range(0, len(records), ROWS_AT_A_TIME):
        yield records[start : start + ROWS_AT_A_TIME]


class _Spread:
    """Counts of values in classes of equal ratio."""

    def __init__(self) -> None:
        self._counts = np.zeros(NUM_DECADES * PER_DECADE, np.int64)
        self._sums = np.zeros(len(self._counts))
        self._lowest, self._highest = math.inf, -math.inf

    def add(self, values: NDArray[np.float64]) -> None:
        self._lowest, self._highest = min(self._lowest, float(values.min())), max(self._highest, float(values.max()))
        place = (np.log10(np.maximum(values, 10.0**LOWEST)) - LOWEST) * PER_DECADE
        classes = np.minimum(place.astype(np.int64), len(self._counts) - 1)
        self._counts += np.bincount(classes, minlength=len(self._counts))
        self._sums += np.bincount(classes, values, len(self._counts))

    def summary(self, name: str, unit: str) -> Distribution:
        used = np.flatnonzero(self._counts)
        first, end = int(used[0]), int(used[-1]) + 1
        width = -(-(end - first) // NUM_BARS)
        starts = range(first, end, width)
        q05, median, q95 = (self._quantile(share) for share in (0.05, 0.5, 0.95))
        return Distribution(
            name=name,
            unit=unit,
            lowest=self._lowest,
            q05=q05,
            median=median,
            q95=q95,
            highest=self._highest,
            edges=tuple(_border(start) for start in (*starts, starts[-1] + width)),
            counts=tuple(int(self._counts[start : start + width].sum()) for start in starts),
        )

    def _quantile(self, share: float) -> float:
        """The mean of the class that holds it: exact where that is one value, as with rates."""
        total = float(self._counts.sum())
        place = bisect.bisect_left(np.cumsum(self._counts).tolist(), share * total)
        return float(self._sums[place] / self._counts[place])


def _border(place: float) -> float:
    return 10.0 ** (LOWEST + place / PER_DECADE)


class _Groups:
    """How many different groups there are: exact for small sets, else by linear counting (within 0.1 %)."""

    def __init__(self, num_rows: int) -> None:
        self._is_exact = num_rows <= MOST_EXACT_GROUPS
        self._seen = np.zeros(0, np.uint32)
        self._marks = np.zeros(0 if self._is_exact else 1 << GROUP_BITS, np.bool_)

    def add(self, groups: NDArray[np.uint32]) -> None:
        if self._is_exact:
            self._seen = np.union1d(self._seen, groups)
        else:
            self._marks[groups >> (32 - GROUP_BITS)] = True

    def count(self) -> tuple[int, bool]:
        if self._is_exact:
            return len(self._seen), True
        share = min(float(self._marks.mean()), 1 - 1 / len(self._marks))
        return round(-len(self._marks) * math.log1p(-share)), False


# ---------------------------------------------------------------------------------------------- words


def short(value: float) -> str:
    """A number of at most six letters."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:.3g}" if abs(value) >= 0.1 else f"{value:.3f}".rstrip("0").rstrip(".")


def _split_lines(split: SplitStats) -> Iterator[str]:
    length = f"{split.hours:.2f} hours" if split.hours >= 1 else f"{60 * split.hours:.2f} minutes"
    yield (
        f"  {split.name}: {split.num_samples} samples, {length}, {split.num_frames} frames, "
        f"{short(split.num_bytes)}B in {split.num_shards} tars"
    )
    for spread in split.distributions:
        if spread.name == "motion" and not spread.highest:
            yield "    motion                not measured"
        else:
            yield spread.line()
    yield from _listed("sizes", split.sizes, split.num_sizes)
    if split.labels:
        yield from _listed("labels", split.labels[:NUM_SHOWN], len(split.labels))
        if split.num_unlabelled:
            yield f"    without a label: {split.num_unlabelled}"
    about = "" if split.are_groups_exact else "about "
    yield f"    groups: {about}{split.num_groups}"
    yield from _listed("frames known from", tuple(split.levels.items()), len(split.levels))
    if split.num_withdrawn:
        yield f"    withdrawn: {split.num_withdrawn} (not used from the next start on)"


def _listed(name: str, counts: tuple[tuple[str, int], ...], num_all: int) -> Iterator[str]:
    more = f", and {num_all - len(counts)} more" if num_all > len(counts) else ""
    text = f"    {name}: " + ", ".join(f"{value} {count}" for value, count in counts) + more
    yield from textwrap.wrap(text, 80, subsequent_indent="      ", break_long_words=False)
