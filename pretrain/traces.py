"""Which checkpoints have seen a sample: what the ledger says of withdrawn ones (`tubelet forget`).

    run ─ its checkpoints ─ was it trained on this data set? (manifest hashes in the cursor) ─ lineage ─ ledger rows

Weights remember. A checkpoint that was started from other weights (`train.init_from`) has seen what those had seen.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pretrain.checkpoint import BrokenCheckpoint, Checkpoint, candidates
from pretrain.ledger import ROW_DTYPE, walk_lineage
from shards.errors import UserError
from shards.layout import MANIFEST_NAME
from shards.storage import local_path

SOURCE_SHIFT = 40
"""Bits of a sample number that are its row in the index of its source."""
ROWS_AT_A_TIME = 1 << 20
MOST_ANCESTORS = 16


@dataclass(frozen=True)
class Seen:
    """What one checkpoint has seen of the samples asked for."""

    checkpoint: str
    step: int
    num_samples: int = 0
    """Different ones; 0 is good news."""
    num_clips: int = 0
    first_steps: dict[int, int] = field(default_factory=dict[int, int], repr=False)
    """Row of the split's index -> the step that consumed it first."""
    through: str = ""
    """The weights it was started from, where it is those that have seen them."""
    unknown: str = ""
    """Why it cannot be said, where it cannot."""

    def line(self, num_asked: int) -> str:
        """For a terminal."""
        if self.unknown:
            return f"  {self.checkpoint}: cannot be said: {self.unknown}"
        if not self.num_samples:
            return f"  {self.checkpoint}: has seen none of them"
        first = min(self.first_steps.values())
        through = f" through {self.through}, which it was started from" if self.through else ""
        times = f"{self.num_clips} clip{'s' * (self.num_clips > 1)}"
        return (
            f"  {self.checkpoint}: has SEEN {self.num_samples} of {num_asked}, first in step {first} ({times}){through}"
        )


@dataclass(frozen=True)
class Trace:
    """One run."""

    run: str
    checkpoints: tuple[Seen, ...]
    why_not: str = ""
    """Why there is nothing to look at."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def lines(self, num_asked: int) -> list[str]:
        """For a terminal."""
        if self.why_not:
            return [f"{self.run}: {self.why_not}"]
        return [f"{self.run}:", *(seen.line(num_asked) for seen in self.checkpoints)]


def trace_runs(runs: Sequence[Path], url: str, hashes: Collection[str], samples: dict[str, set[int]]) -> list[Trace]:
    """What the checkpoints of each run have seen.

    `url` is the data set, `hashes` are those of its manifest and of all that it grew out of; `samples` gives rows by
    split.
    """
    return [_trace_run(run, _Looker(url, frozenset(hashes), samples)) for run in runs]


def find_runs(given: Sequence[Path]) -> list[Path]:
    """Run folders among these folders and right below them. Raises UserError for a path that holds none."""
    runs: list[Path] = []
    for path in given:
        found = [path] if candidates(path) else runs_below(path)
        if not found:
            raise UserError(f"--runs is {path}; it must be a run folder with checkpoints, or hold some: check the path")
        runs += found
    return list(dict.fromkeys(runs))


def runs_below(folder: Path) -> list[Path]:
    """The runs with checkpoints right below a folder."""
    return sorted(child for child in folder.glob("*") if candidates(child))


def _trace_run(run: Path, looker: _Looker) -> Trace:
    folders = candidates(run)[::-1]
    seen = [found for folder in folders if (found := looker.look(folder)) is not None]
    return Trace(str(run), tuple(seen), "" if seen else "was not trained on this data set")


class _Looker:
    """Looks into checkpoints; each ledger file is read once, however many checkpoints stand on it."""

    def __init__(self, url: str, hashes: frozenset[str], samples: dict[str, set[int]]) -> None:
        self._place, self._hashes, self._samples = _place(url), hashes, samples
        self._found: dict[tuple[Path, bytes], NDArray[np.void]] = {}

    def look(self, folder: Path, depth: int = 0) -> Seen | None:
        """What a checkpoint has seen; None if neither it nor what it was started from used the data set."""
        step = int(folder.name.removeprefix("step-"))
        try:
            checkpoint = Checkpoint(folder)
            own = self._own(checkpoint, step)
            before = checkpoint.facts.config["train"].get("init_from")
        except (BrokenCheckpoint, ValueError, KeyError, OSError) as error:
            return Seen(folder.name, step, unknown=str(error))
        if before is None or (own is not None and own.num_samples):
            return own
        earlier = self._before(Path(before), depth)
        if earlier is None or not (earlier.num_samples or earlier.unknown):
            return own
        return replace(earlier, checkpoint=folder.name, step=step, through=earlier.through or before)

    def _before(self, path: Path, depth: int) -> Seen | None:
        """The same of weights that a run was started from: a checkpoint, or the newest one of a run."""
        is_checkpoint = path.name.startswith("step-") and (path / "manifest.json").is_file()
        folder = path if is_checkpoint else next(iter(candidates(path)), None)
        if folder is None or depth == MOST_ANCESTORS:
            return Seen(path.name, 0, unknown=f"it was started from {path}, which has no ledger to look into")
        return self.look(folder, depth + 1)

    def _own(self, checkpoint: Checkpoint, step: int) -> Seen | None:
        """What the checkpoint's own run fed to it."""
        facts, ledger = checkpoint.facts, checkpoint.folder.parent.parent / "ledger"
        sources = _sources(facts.cursor, self._hashes)
        if not sources:
            if self._place in map(_place, _urls(facts.config["data"])):
                then = str(facts.cursor["manifest_hash"])[:12]
                raise ValueError(
                    f"what lay at {self._place} was another data set then (manifest {then}), with other sample numbers"
                )
            return None
        rows = sorted(self._samples.get(facts.config["data"]["split"], ()))
        numbers = np.array([(source << SOURCE_SHIFT) | row for source in sources for row in rows], np.uint64)
        first_steps: dict[int, int] = {}
        num_clips = 0
        for _, link in walk_lineage(ledger, checkpoint.lineage):
            for segment in link.segments:
                hits = self._hits(ledger / segment.file, segment.num_rows, numbers)
                num_clips += len(hits)
                for at, sample in zip(hits["step"].tolist(), hits["sample"].tolist(), strict=True):
                    row = sample & ((1 << SOURCE_SHIFT) - 1)
                    first_steps[row] = min(at, first_steps.get(row, at))
        return Seen(checkpoint.folder.name, step, len(first_steps), num_clips, first_steps)

    def _hits(self, path: Path, num_rows: int, numbers: NDArray[np.uint64]) -> NDArray[np.void]:
        """Rows of a ledger file whose sample is one of these."""
        key = (path, numbers.tobytes())
        if key not in self._found:
            if path.stat().st_size != num_rows * ROW_DTYPE.itemsize:
                raise ValueError(f"{path} is not the file that was committed (see tubelet audit)")
            found = [np.empty(0, ROW_DTYPE)]
            with path.open("rb") as file:
                while len(rows := np.fromfile(file, ROW_DTYPE, ROWS_AT_A_TIME)):
                    found.append(rows[np.isin(rows["sample"], numbers)])
            self._found[key] = np.concatenate(found)
        return self._found[key]


def _sources(cursor: dict[str, Any], hashes: frozenset[str]) -> list[int]:
    """Numbers of the run's sources that are this data set, now or before it grew."""
    sources = cast("list[list[list[Any]]]", cursor.get("sources") or [[[0, cursor["manifest_hash"], None]]])
    return [number for number, steps in enumerate(sources) if any(step[1] in hashes for step in steps)]


def _urls(data: dict[str, Any]) -> list[str]:
    """The data sets that a config names."""
    shards = cast("str | list[dict[str, Any]]", data.get("shards", ""))
    return [shards] if isinstance(shards, str) else [str(source["url"]) for source in shards]


def _place(url: str) -> str:
    """The folder of a data set, however it is written."""
    folder = url.removesuffix(f"/{MANIFEST_NAME}").rstrip("/")
    path = local_path(folder)
    return folder if path is None else str(path.resolve())
