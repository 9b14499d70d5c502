"""Metrics: one JSON line per row in metrics.jsonl, always; the same rows to wandb when asked.

    row ─ metrics.jsonl, at once
        ├ what the system did ─ wandb, at once (own axis: seconds since the run began)
        └ what was learned ─ waits until a checkpoint covers its step ─ wandb (own axis: step)

Only the first rank writes. Neither a full disk nor trouble with wandb stops training: both are counted, told once, and
what wandb missed is fed to it by the next attempt. No torch is imported: the report reads metrics on a login node.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain.metrics import FILE, Row, append_row, committed_step, plain, read_config, read_metrics, read_rows
from pretrain.sections import TrackConfig
from pretrain.wandb_run import Point, WandbRun, begin_anew, sync_line
from shards.errors import UserError

log = logging.getLogger(__name__)

Unit = Literal["", "s", "ms", "bytes", "share", "ratio"]

# ---------------------------------------------------------------------------------------------- panels


@dataclass(frozen=True)
class Panel:
    """One plot: its title, the unit of its axis, and which numbers of the rows of one kind it shows, with words."""

    title: str
    unit: Unit
    names: Mapping[str, str]
    kind: str = "train"
    is_trouble: bool = False
    """Drawn only where a number is not zero."""


@dataclass(frozen=True)
class Group:
    """Panels that belong together, under one heading."""

    title: str
    panels: tuple[Panel, ...]
    is_system: bool = True
    """Measured whether or not the step will count: goes to wandb at once, on the axis of time."""


GROUPS: dict[str, Group] = {
    "optimizer": Group(
        "How it is steered",
        (
            Panel("Learning rate", "", {"lr": "learning rate"}),
            Panel("Gradient norm", "", {"grad_norm": "before clipping"}),
        ),
        is_system=False,
    ),
    "speed": Group(
        "How fast, and with what",
        (
            Panel("Clips per second", "", {"clips_per_s": "all ranks"}),
            Panel("Seconds per step", "s", {"step_s": "step"}),
            Panel(
                "Where a step's time goes, mean of the ranks",
                "s",
                {"compute_s": "computing", "comm_wait_s": "waiting for ranks", "data_wait_s": "waiting for data"},
            ),
            Panel(
                "Waiting for data",
                "share",
                {"data_wait_fraction": "slowest rank", "data_wait_mean_fraction": "mean of the ranks"},
            ),
            Panel("Computing time of the slowest rank", "ratio", {"slowest_compute_ratio": "times the median rank's"}),
            Panel("Model FLOPs utilisation", "share", {"mfu": "of the peak"}),
        ),
    ),
    "memory": Group(
        "Memory",
        (Panel("Memory", "bytes", {"gpu_memory_bytes": "GPU, fullest rank", "memory_bytes": "host, fullest rank"}),),
    ),
    "saves": Group(
        "How it is saved",
        (
            Panel("A save holds up training", "s", {"seconds": "until the next step"}, kind="save"),
            Panel("A save is written beside training", "s", {"write_s": "in the background"}, kind="save"),
            Panel("Size of a checkpoint", "bytes", {"bytes": "all ranks"}, kind="save"),
            Panel("Age of the newest whole checkpoint", "s", {"durable_age_s": "work at risk"}),
        ),
    ),
    "data": Group(
        "Where the data comes from",
        (
            Panel("Decoding: milliseconds per clip", "ms", {"decode_ms": "mean of all ranks"}),
            Panel("Bytes read, per row", "bytes", {"bytes_read": "all ranks"}),
            Panel(
                "Requests, per row",
                "",
                {"requests": "to storage", "cache_hits": "answered by the node's cache", "cache_misses": "not in it"},
            ),
            Panel(
                "Storage trouble, per row",
                "",
                {"retries": "tried again", "hedges": "asked twice", "throttled": "told to slow down"},
                is_trouble=True,
            ),
            Panel(
                "Other incidents, per row",
                "",
                {"decoder_respawns": "decoders replaced", "stride_dropped": "clips with a lowered stride"},
                is_trouble=True,
            ),
        ),
    ),
}
"""Group -> panels, in the order of the report. In wandb a number of a panel is called GROUP/NAME, and wandb makes one
section of its page per GROUP and one plot per name. Sections, names and axes are all that the data of a run can settle:
which plots share a frame, their order, titles and units are a workspace's, which wandb keeps on its server."""

_UNMEASURED = ("kind", "attempt", "time", "step", "not_finite")
_PLACES = {
    (panel.kind, name): (group, GROUPS[group].is_system)
    for group in GROUPS
    for panel in GROUPS[group].panels
    for name in panel.names
} | {("train", name): ("speed", True) for name in ("slowest_rank", "slowest_compute_rank", "data_wait_max_s")}


def training_points(rows: Iterable[Row]) -> dict[int, Point]:
    """What the rows say of the training: one point per step, whatever kinds of rows it has."""
    points: dict[int, Point] = {}
    for row in rows:
        if values := split_row(row)[0]:
            points.setdefault(row["step"], {}).update(values)
    return points


def system_points(rows: Iterable[Row], began: float | None) -> list[tuple[float, Point]]:
    """What the rows say of the system, by seconds since the run began."""
    timed = sorted((row for row in rows if row.get("time")), key=lambda row: row["time"])
    points = [(row["time"] - (began or 0.0), split_row(row)[1]) for row in timed]
    return [(seconds, values) for seconds, values in points if values]


def began(rows: Iterable[Row]) -> float | None:
    """Clock time of the first row."""
    return min((row["time"] for row in rows if row.get("time")), default=None)


def split_row(row: Row) -> tuple[Point, Point]:
    """A row's numbers by their names in wandb: (of the training, of the system). Words and lists stay behind."""
    of_training: Point = {}
    of_system: Point = {}
    kind = row["kind"]
    if kind == "event":
        return of_training, {f"events/{row.get('event')}": 1}
    for name, value in row.items():
        if name in _UNMEASURED or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        group, is_system = _PLACES.get((kind, name), ("", kind in ("start", "save")))
        if name.startswith("substituted/"):
            group, is_system = "data", True
        if not group and (kind != "train" or "/" not in name):
            group = kind
        (of_system if is_system else of_training)[f"{group}/{name}" if group else name] = value
    return of_training, of_system


# ---------------------------------------------------------------------------------------------- writing


class Tracker:
    """Where a run's numbers go. On other ranks than the first every method does nothing."""

    def __init__(
        self, run_dir: Path, attempt: int, settings: TrackConfig, *, is_first: bool = True, resumed_from: int = 0
    ) -> None:
        """Begin attempt `attempt`, which goes on from step `resumed_from`; wandb gets what it missed up to there."""
        self.num_unwritten = 0
        """Rows that could not be written to metrics.jsonl."""
        self._run_dir, self._attempt, self._is_first = run_dir, attempt, is_first
        self._pending: list[Row] = []
        self._wandb = WandbRun(run_dir, settings) if is_first and settings.wandb != "off" else None
        self._began: float | None = None
        """Clock time of the run's first row."""
        if self._wandb is not None:
            rows = read_rows(run_dir)
            self._began = began(rows)
            self._wandb.open(read_config(run_dir))
            self._wandb.send_system(system_points(rows, self._began))
            self._pending = read_metrics(run_dir)
            self.publish(resumed_from)
            self._pending = []  # beyond the checkpoint: will be measured again

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; it needs `kind` and `step` (steps done). Numbers that are not finite become null, named."""
        if not self._is_first:
            return
        whole = plain({"attempt": self._attempt, "time": time.time(), **row})
        try:
            append_row(self._run_dir, whole)
        except OSError as error:
            if not self.num_unwritten:
                log.warning("%s cannot be written (%s); training goes on, rows are lost", FILE, error.strerror)
            self.num_unwritten += 1
        if self._wandb is not None:
            self._began = whole["time"] if self._began is None else self._began
            self._wandb.send_system(system_points([whole], self._began))
            self._pending.append(whole)

    def publish(self, up_to_step: int) -> None:
        """Send to wandb the rows up to a step that a checkpoint covers: they will not be made again."""
        if self._wandb is not None:
            covered = [row for row in self._pending if row["step"] <= up_to_step]
            self._wandb.send_training(training_points(covered), up_to_step)
            self._pending = [row for row in self._pending if row["step"] > up_to_step]

    def close(self) -> None:
        """End of an attempt. Prints how to upload an offline run."""
        if self._wandb is not None:
            self._wandb.close()
            if line := sync_line(self._run_dir):
                print(line, flush=True)

    @property
    def num_wandb_failures(self) -> int:
        """Times wandb refused or failed."""
        return 0 if self._wandb is None else self._wandb.num_failures


def rebuild_wandb(run_dir: Path) -> str:
    """Make the run's wandb run anew as one offline file, from the committed lineage alone: one id, every step once.

    What earlier starts left in RUN/wandb is set aside, not deleted. Returns the command that uploads the file. Raises
    UserError where there is nothing to send, or wandb could not write.
    """
    rows = [row for row in read_metrics(run_dir) if row["step"] <= committed_step(run_dir) or row["kind"] == "event"]
    if not any(row["kind"] not in ("start", "event") for row in rows):
        raise UserError(
            f"{run_dir} has no metrics that a checkpoint covers: train until checkpoint.every_steps, then again"
        )
    config = read_config(run_dir)
    section = {
        name: value for name, value in dict(config.get("track") or {}).items() if name in TrackConfig.model_fields
    }
    settings = TrackConfig.model_validate({**section, "wandb": "offline"})
    set_aside = begin_anew(run_dir)
    run = WandbRun(run_dir, settings)
    run.open(config)
    run.send_training(training_points(rows), committed_step(run_dir))
    run.send_system(system_points(rows, began(rows)))
    run.close()
    if run.num_failures or not sync_line(run_dir):
        raise UserError(
            f"wandb could not write its file in {run_dir / 'wandb'}: mend what it says above, then again; "
            f"{len(set_aside)} older ones lie in wandb/set-aside"
        )
    return sync_line(run_dir)
