"""The samples of a run as one numbered stream: several data sets, what is selected of them, and how they grow.

    position ─ mixture ─▶ source, draw ─ its era (how many samples it had then) ─▶ epoch, place ─ selection ─▶ sample

A sample's number in a run is its source in the high bits and its row in that source's index in the low ones: numbers
stay what they are when a source grows. A source that grew is used in its new length from the beginning of one of its
epochs on; until then nothing changes. Which beginning was settled when the run first saw the longer manifest, and is
written down (`Growth`), so that every later start does the same.

Legend: K positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.cache import SampleCache
from shards.errors import SampleError, UserError
from shards.growth import Growth
from shards.layout import SOURCE_SHIFT
from shards.mixture import CYCLE, Mixture, Phase, quotas
from shards.order import substitute
from shards.reader import open_split
from shards.source import Epoch, Source, SourceSpec, expand_sources, split_pattern

ROW_MASK = (1 << SOURCE_SHIFT) - 1


@dataclass(frozen=True)
class Recipe:
    """Which samples a run draws, in which order: everything but the cursor."""

    sources: tuple[SourceSpec, ...]
    split: str
    seed: int
    run_length: int = 1
    where: str = ""
    mix: tuple[tuple[int, tuple[float, ...]], ...] = ()
    """(cycle, weights): from that cycle on, other weights than those of the sources."""


@dataclass(frozen=True)
class Reading:
    """How samples are read: nothing here changes which."""

    attempt_s: float = 30.0
    deadline_s: float = 300.0
    hedge_s: float = 0.0
    cache: SampleCache | None = None
    node_folder: Path | None = None


class DataSet:
    """All sources of a run, opened: places, records, bytes. Safe to share between threads."""

    def __init__(self, recipe: Recipe, reading: Reading | None = None) -> None:
        """Raises UserError for sources that are not there, weights or a condition that do not fit them."""
        self.recipe = recipe
        self._reading = reading or Reading()
        self._sources = [self._open(number, spec) for number, spec in enumerate(expand_sources(recipe.sources))]
        self._mixture = Mixture(recipe.seed, list(self._phases()))
        splits = [source.reader.split for source in self._sources]
        self.max_frames = max(split.max_frames for split in splits)
        self.max_pixels = max(split.max_pixels for split in splits)
        self.max_bytes = max(split.max_bytes for split in splits)

    @property
    def num_sources(self) -> int:
        """Data sets that are mixed."""
        return len(self._sources)

    @property
    def num_samples(self) -> int:
        """Samples to draw from, over all sources, as they are now."""
        return sum(source.eras[-1].num_samples for source in self._sources)

    @property
    def manifest_hash(self) -> str:
        """Hash of the content: of the manifest, or over those of several sources."""
        hashes = [source.reader.manifest.hash for source in self._sources]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    @property
    def selection_hash(self) -> str:
        """Hash over what `where` selects; empty where nothing is left out."""
        return _joined([source.selection.hash for source in self._sources if source.selection is not None])

    @property
    def cache_counters(self) -> tuple[int, int]:
        """(hits, misses) of the node's cache by this process."""
        cache = self._reading.cache
        return (0, 0) if cache is None else (cache.counters.num_hits, cache.counters.num_misses)

    # ------------------------------------------------------------------ order

    def places(self, positions_K: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(epoch of its source, sample) of each position: two int64 arrays."""
        source_K, draw_K = self._mixture.places(positions_K)
        epoch_K, sample_K = np.empty_like(draw_K), np.empty_like(draw_K)
        for source in self._sources:
            mine = source_K == source.number
            if mine.any():
                epoch_K[mine], row = source.places(self.recipe.seed, self.recipe.run_length, draw_K[mine])
                sample_K[mine] = (source.number << SOURCE_SHIFT) | row
        return epoch_K, sample_K

    def substitutes(self, position: int, wanted: int) -> Iterator[int]:
        """The samples to try at a position instead of the wanted one: every other one of its source, once."""
        source, row = self._locate(wanted)
        _, draw_K = self._mixture.places(np.array([position]))
        era = next(era for era in reversed(source.eras) if era.first_draw <= int(draw_K[0]))
        place = row if source.selection is None else source.selection.num_below(row)
        for attempt in range(era.num_samples - 1):
            other = substitute(self.recipe.seed, era.num_samples, position, place, attempt)
            chosen = other if source.selection is None else int(source.selection.numbers[other])
            yield (source.number << SOURCE_SHIFT) | chosen

    def epochs(self, begin: int, end: int) -> Iterator[Epoch]:
        """Every epoch of every source that has a draw at the positions [begin, end)."""
        for source in self._sources:
            first_draw = self._mixture.num_draws(source.number, begin)
            yield from source.epochs(first_draw, self._mixture.num_draws(source.number, end))

    def selected(self, source: int, num_rows: int) -> NDArray[np.bool_]:
        """Which of the first rows of a source's index are drawn at all."""
        selection = self._sources[source].selection
        if selection is None:
            return np.ones(num_rows, np.bool_)
        chosen = np.zeros(num_rows, np.bool_)
        chosen[selection.numbers[: selection.num_below(num_rows)]] = True
        return chosen

    # ------------------------------------------------------------------ samples

    def record(self, sample: int) -> np.void:
        """The index record of a sample."""
        source, row = self._locate(sample)
        return source.reader.records[row]

    def is_withdrawn(self, sample: int) -> bool:
        """Whether it must not be used any more (`tubelet forget`)."""
        source, row = self._locate(sample)
        return row in source.reader.withdrawn

    def groups(self, samples: Sequence[int]) -> list[list[int]]:
        """Cut samples into groups that one read each can fetch."""
        found: list[list[int]] = []
        for source in self._sources:
            rows = [sample & ROW_MASK for sample in samples if sample >> SOURCE_SHIFT == source.number]
            found += [[(source.number << SOURCE_SHIFT) | row for row in group] for group in source.reader.groups(rows)]
        return found

    def read_group(self, samples: Sequence[int]) -> list[bytes | SampleError]:
        """Bytes of each sample of a group, or why there are none; see `SplitReader.read_group`."""
        source, _ = self._locate(samples[0])
        return source.reader.read_group([sample & ROW_MASK for sample in samples])

    def checksums(self, samples_K: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.uint32]]:
        """(whether there is such a sample, the checksum of its bytes) for each number."""
        exists_K, checksum_K = np.zeros(len(samples_K), np.bool_), np.zeros(len(samples_K), np.uint32)
        for source in self._sources:
            row_K = samples_K - (source.number << SOURCE_SHIFT)
            mine = (row_K >= 0) & (row_K < len(source.reader))
            exists_K |= mine
            checksum_K[mine] = source.reader.records["checksum"][row_K[mine]]
        return exists_K, checksum_K

    def name(self, sample: int) -> str:
        """How to speak of a sample: split, number, key."""
        source, row = self._locate(sample)
        where = f"{source.url} " if len(self._sources) > 1 else ""
        try:
            return f"{where}{source.reader.name} sample {row} {source.reader.key(row)!r}"
        except (SampleError, UserError):  # its tar may be what is broken
            return f"{where}{source.reader.name} sample {row}"

    # ------------------------------------------------------------------ growing

    def state(self) -> dict[str, Any]:
        """What a cursor says of the data: hashes, and how the sources grew."""
        growth = [[[g.first_draw, g.manifest_hash, g.num_samples] for g in s.growth] for s in self._sources]
        mix = [[phase.first_cycle, list(phase.quotas)] for phase in self._mixture.phases]
        return {
            "manifest_hash": self.manifest_hash,
            "selection": self.selection_hash,
            "sources": growth,
            "mix": mix,
        }

    def go_on(self, state: dict[str, Any], position: int, written: Sequence[Growth]) -> list[Growth]:
        """Take over the sources of a cursor at `position`, which may have grown since.

        `written` are the changes that earlier starts settled. Returns those settled now: write them down before the
        first sample is drawn. Raises UserError where a source is neither what it was nor grown out of that.
        """
        saved: list[list[list[Any]]] = state.get("sources") or [[[0, state["manifest_hash"], None]]]
        if len(saved) != len(self._sources):
            raise UserError(
                f"data.shards has {len(self._sources)} sources; the run has {len(saved)}: name the same ones in the "
                "same order, or use run.dir=NEW"
            )
        for source, steps in zip(self._sources, saved, strict=True):
            rows = len(source.reader)
            growth = [Growth(source.number, int(first), str(hash_), int(num or rows)) for first, hash_, num in steps]
            growth += [g for g in written if g.source == source.number and g.first_draw > growth[-1].first_draw]
            self._refuse_other_data(source, growth)
            source.set_growth(growth)
        rows_then = [
            int(steps[-1][2] or len(source.reader)) for source, steps in zip(self._sources, saved, strict=True)
        ]
        chosen_then = [
            source.selection.hash_of(rows)
            for source, rows in zip(self._sources, rows_then, strict=True)
            if source.selection is not None
        ]
        if (state.get("selection") or "") != _joined(chosen_then):
            raise UserError(
                f"data.where is {self.recipe.where!r}; it selects other samples than when the run was saved (the tars "
                "in data.shards count too): the order would change: restore the config or the data set, or use "
                "run.dir=NEW"
            )
        # Weights that follow from sizes follow from those at the beginning of the run.
        self._mixture = Mixture(self.recipe.seed, list(self._phases()))
        self._refuse_other_mix(state.get("mix", []), position)
        settled: list[Growth] = []
        for source in self._sources:
            hash_ = source.reader.manifest.hash
            if source.growth[-1].manifest_hash != hash_:
                draw = source.next_beginning(self._mixture.num_draws(source.number, position))
                settled.append(Growth(source.number, draw, hash_, len(source.reader)))
                source.set_growth([*source.growth, settled[-1]])
        return settled

    def _refuse_other_data(self, source: Source, growth: Sequence[Growth]) -> None:
        manifest = source.reader.manifest
        sizes = {version.hash: version.num_samples.get(source.reader.name, 0) for version in manifest.history}
        sizes[manifest.hash] = len(source.reader)
        for step in growth:
            if sizes.get(step.manifest_hash) != step.num_samples:
                raise UserError(
                    f"data.shards is {source.url}; it is not the data set of this run, nor that one grown by appending "
                    f"(manifest {manifest.hash[:12]}, the run's is {step.manifest_hash[:12]}): name the right one, or "
                    "start a new run with run.dir=NEW"
                )

    def _refuse_other_mix(self, saved: Sequence[Any], position: int) -> None:
        """Weights may change in cycles to come, not in those that have begun."""
        begun = [phase for phase in self._mixture.phases if phase.first_cycle * CYCLE < max(position, 1)]
        before = [(first, tuple(shares)) for first, shares in saved if first * CYCLE < max(position, 1)]
        if saved and [(phase.first_cycle, phase.quotas) for phase in begun] != before:
            raise UserError(
                f"data.shards and data.mix give other weights than before position {position}; they may change from "
                f"cycle {-(-position // CYCLE)} on only: restore the former ones and add an entry to data.mix"
            )

    # ------------------------------------------------------------------ opening

    def _open(self, number: int, spec: SourceSpec) -> Source:
        reading = self._reading
        url, tars = split_pattern(spec.url)
        reader = open_split(
            url,
            self.recipe.split,
            attempt_s=reading.attempt_s,
            deadline_s=reading.deadline_s,
            hedge_s=reading.hedge_s,
            cache=reading.cache,
            node_folder=reading.node_folder,
        )
        unknown = set(tars) - {shard.name for shard in reader.split.shards}
        if unknown:
            raise UserError(
                f"data.shards is {spec.url}; every tar must be in the index beside them, and {min(unknown)} is not: "
                f"run tubelet index '{spec.url}'"
            )
        return Source(number, reader, spec.url, self.recipe.where, tars)

    def _phases(self) -> Iterator[Phase]:
        specs = expand_sources(self.recipe.sources)
        given = [spec.weight for spec in specs]
        if any(weight is None for weight in given) != all(weight is None for weight in given):
            raise UserError("data.shards gives some sources a weight; it must give all of them one, or none: add it")
        sizes = [float(source.eras[0].num_samples) for source in self._sources]
        first = [weight if weight is not None else size for weight, size in zip(given, sizes, strict=True)]
        for cycle, weights in [(0, first), *self.recipe.mix]:
            if len(weights) != len(specs):
                raise UserError(
                    f"data.mix gives {len(weights)} weights from cycle {cycle} on; data.shards has {len(specs)} "
                    "sources: give one each"
                )
            yield Phase(cycle, quotas(weights))

    def _locate(self, sample: int) -> tuple[Source, int]:
        return self._sources[sample >> SOURCE_SHIFT], sample & ROW_MASK


def _joined(hashes: Sequence[str]) -> str:
    """One hash over several; empty for none."""
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest() if hashes else ""
