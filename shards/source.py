"""One data set of a run: which rows of its index are drawn, in which order, and how it grew since the run began.

    draw of the source ─ its era (how many samples it had then) ─▶ epoch, place ─ selection ─▶ row of the index

A source that grew is used in its new length from the beginning of one of its epochs on; until then nothing changes.

Legend: K draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.brace import expand, is_pattern
from shards.errors import UserError
from shards.growth import Growth
from shards.layout import Manifest
from shards.manifest import load_manifest
from shards.order import sample_numbers
from shards.reader import SplitReader
from shards.select import Selection, select


@dataclass(frozen=True)
class SourceSpec:
    """One data set of a run, as the config names it."""

    url: str
    weight: float | None = None
    """Share of the positions; None: as large as it is."""


@dataclass(frozen=True)
class Epoch:
    """One epoch of one source, as far as some position."""

    source: int
    number: int
    is_whole: bool
    """Its last draw lies before that position."""
    num_rows: int
    """Rows of the index in this epoch, selected or not."""


@dataclass(frozen=True)
class Era:
    """Draws of a source over the same number of samples."""

    first_draw: int
    first_epoch: int
    num_samples: int
    """Of those selected."""


class Source:
    """One data set, its eras and its selection."""

    def __init__(self, number: int, reader: SplitReader, url: str, where: str, tars: Sequence[str]) -> None:
        self.number = number
        self.reader = reader
        self.url = url
        self.selection: Selection | None = None
        if where or tars:
            names = set(tars)  # a hundred thousand of them are looked up as often
            shards = [number for number, shard in enumerate(reader.split.shards) if shard.name in names]
            self.selection = select(reader.records, where, reader.manifest.labels, shards if tars else None)
        self.growth = [Growth(number, 0, reader.manifest.hash, len(reader))]
        self.eras = [Era(0, 0, self.num_selected(len(reader)))]

    def num_selected(self, num_rows: int) -> int:
        """Samples to draw from among the first `num_rows` of the index."""
        return num_rows if self.selection is None else self.selection.num_below(num_rows)

    def set_growth(self, growth: Sequence[Growth]) -> None:
        """Take over a history; the last one must be the manifest that is there now."""
        self.growth = list(growth)
        eras: list[Era] = []
        for step in growth:
            first_epoch = 0
            if eras:
                last = eras[-1]
                first_epoch = last.first_epoch + (step.first_draw - last.first_draw) // last.num_samples
            eras.append(Era(step.first_draw, first_epoch, self.num_selected(step.num_samples)))
        self.eras = eras

    def next_beginning(self, draw: int) -> int:
        """The first draw, this one or a later one, that begins an epoch."""
        last = self.eras[-1]
        passed = max(0, draw - last.first_draw)
        return last.first_draw + -(-passed // last.num_samples) * last.num_samples

    def places(
        self, seed: int, run_length: int, draws_K: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epoch, and row in the index, of each draw."""
        epoch_K, row_K = np.empty_like(draws_K), np.empty_like(draws_K)
        ends = [era.first_draw for era in self.eras[1:]] + [np.iinfo(np.int64).max]
        for era, end in zip(self.eras, ends, strict=True):
            mine = (draws_K >= era.first_draw) & (draws_K < end)
            if mine.any():
                epoch_K[mine], row_K[mine] = sample_numbers(
                    seed,
                    era.num_samples,
                    draws_K[mine],
                    run_length=run_length,
                    first_position=era.first_draw,
                    first_epoch=era.first_epoch,
                    source=self.number,
                )
        if self.selection is not None:
            row_K = self.selection.numbers[row_K].astype(np.int64)
        return epoch_K, row_K

    def epochs(self, first_draw: int, end_draw: int) -> Iterator[Epoch]:
        """Every epoch that has a draw among [first_draw, end_draw)."""
        ends = [era.first_draw for era in self.eras[1:]] + [end_draw]
        for era, step, era_end in zip(self.eras, self.growth, ends, strict=True):
            skipped = max(0, first_draw - era.first_draw) // era.num_samples
            starts = range(era.first_draw + skipped * era.num_samples, min(era_end, end_draw), era.num_samples)
            for number, first in enumerate(starts, era.first_epoch + skipped):
                is_whole = first + era.num_samples <= end_draw
                yield Epoch(self.number, number, is_whole, step.num_samples)


def load_manifests(sources: Sequence[SourceSpec]) -> list[Manifest]:
    """The manifest of every source. Raises UserError where there is none."""
    return [load_manifest(split_pattern(spec.url)[0]) for spec in expand_sources(sources)]


def expand_sources(sources: Sequence[SourceSpec]) -> list[SourceSpec]:
    """A pattern of folders becomes one source each (their weights are their sizes); one of tars stays together."""
    found: list[SourceSpec] = []
    for spec in sources:
        if is_pattern(spec.url) and not spec.url.endswith(".tar"):
            found += [SourceSpec(url, spec.weight) for url in expand(spec.url)]
        else:
            found.append(spec)
    return found


def split_pattern(url: str) -> tuple[str, tuple[str, ...]]:
    """A folder, or the folder and the names of tars that a URL or pattern of tars means."""
    if not url.endswith(".tar"):
        return url, ()
    urls = expand(url)
    folders = {one.rpartition("/")[0] for one in urls}
    if len(folders) != 1:
        raise UserError(f"data.shards is {url}; its tars must lie in one folder: give a list of folders instead")
    (folder,) = folders
    return folder or ".", tuple(one.rpartition("/")[2] for one in urls)
