"""`tubelet replay RUN --step K`: the batch of one step again, on one CPU, compared with what the ledger says (C4)."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain import checkpoint
from pretrain.data.loader import ClipLoader
from pretrain.gallery import draw
from pretrain.journal import Journal
from pretrain.ledger import ROW_DTYPE, LineageHead, walk_lineage
from pretrain.witness import config_of
from shards.errors import UserError

NUM_DRAWN = 4


@dataclass(frozen=True)
class Replay:
    """What was rebuilt and whether it is what the run consumed."""

    step: int
    positions: tuple[int, ...]
    samples: tuple[int, ...]
    checksums: tuple[int, ...]
    is_committed: bool
    """Whether a checkpoint covers the step; else there are no rows to compare with."""
    matches: bool
    weights_of_step: int | None
    pictures: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a terminal."""
        verdict = "no checkpoint covers this step: nothing to compare with"
        if self.is_committed:
            verdict = "equal to the ledger" if self.matches else "NOT what the ledger says was consumed"
        lines = [f"step {self.step}: {len(self.samples)} clips rebuilt, {verdict}"]
        lines += [
            f"  position {position}  sample {sample}  crc32 {checksum:08x}"
            for position, sample, checksum in zip(self.positions, self.samples, self.checksums, strict=True)
        ]
        if self.weights_of_step is None:
            lines.append("no picture: no checkpoint of this step or before is kept (checkpoint.keep)")
        else:
            lines += [f"picture (weights of step {self.weights_of_step}): {path}" for path in self.pictures]
        return lines


def replay_step(run_dir: Path, step: int) -> Replay:
    """Rebuild the global batch of `step` (counted from 0) in one process and draw its first clips.

    Raises UserError where the run has no checkpoint, or the step lies beyond its end.
    """
    newest = checkpoint.newest(run_dir)
    if newest is None:
        raise UserError(f"{run_dir} has no checkpoint; a replay needs the config of one: train until one is saved")
    config = config_of(newest)
    if step >= config.train.steps:
        raise UserError(f"--step is {step}; the run has the steps 0 to {config.train.steps - 1}: name one of these")
    with ClipLoader(
        config.data.model_copy(update={"workers": 0}),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        micro_batch=1,
        journal=Journal(run_dir / "journal", is_read_only=True),
        num_clips=(step + 1) * config.train.global_batch,  # the steps behind it are not even begun
        limits=config.limits,
    ) as loader:
        loader.load_state_dict(newest.facts.cursor)
        loader.go_to_step(step)
        batches = list(itertools.islice(loader, loader.num_micro_steps))
    rebuilt = sorted(
        (int(b.position_B[0]), int(b.draw_B[0]), int(b.sample_B[0]), int(b.checksum_B[0])) for b in batches
    )
    try:
        consumed = _rows_of(run_dir, newest.lineage, step)
    except (OSError, ValueError) as error:
        raise UserError(f"the ledger of {run_dir} is damaged ({error}): see tubelet audit {run_dir}") from error
    weights = checkpoint.newest(run_dir, at_most=step)
    pictures: list[Path] = []
    if weights is not None:
        folder = run_dir / "pictures"
        for number, batch in enumerate(batches[:NUM_DRAWN]):
            pictures += draw(weights, config, batch, folder, f"replay-step-{step:06d}-clip-{number}")
    return Replay(
        step=step,
        positions=tuple(row[0] for row in rebuilt),
        samples=tuple(row[2] for row in rebuilt),
        checksums=tuple(row[3] for row in rebuilt),
        is_committed=step < newest.facts.step,
        matches=step >= newest.facts.step or rebuilt == consumed,
        weights_of_step=None if weights is None else weights.facts.step,
        pictures=tuple(str(path) for path in pictures),
    )


def _rows_of(run_dir: Path, head: LineageHead, step: int) -> list[tuple[int, int, int, int]]:
    """(position, draw, sample, checksum) of a step, from the committed lineage."""
    for _, link in walk_lineage(run_dir / "ledger", head):
        if link.step <= step:
            return []
        found: list[tuple[int, int, int, int]] = []
        for segment in link.segments:
            rows = np.fromfile(run_dir / "ledger" / segment.file, ROW_DTYPE)
            found += [
                (int(row["position"]), int(row["draw"]), int(row["sample"]), int(row["checksum"]))
                for row in rows[rows["step"] == step]
            ]
        if found:
            return sorted(found)
    return []
