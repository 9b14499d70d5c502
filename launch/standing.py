"""How a run stands, read from its folder and nothing else: alive, dead, finished or never started.

Needs neither torch nor Slurm; every piece may be missing or torn.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from launch.run_folder import read_json
from pretrain.attempt import newest_attempt
from pretrain.metrics import Row, read_config, read_rows

RECENT_ROWS = 50


@dataclass(frozen=True)
class Ended:
    """How the newest attempt ended."""

    outcome: str
    step: int
    reason: str
    time: float | None


@dataclass(frozen=True)
class Durable:
    """The newest checkpoint that is whole on disk."""

    step: int
    age_s: float
    folder: Path


@dataclass(frozen=True)
class Standing:
    """What the run folder says."""

    steps: int | None
    """Steps asked for."""
    done_step: int | None
    """Step of the DONE file."""
    attempt: int
    """Newest one; 0 if the run never started."""
    attempt_age_s: float | None
    world_size: int | None
    start: str
    """Token of the newest start: slurm-JOB.RESTARTS, or random."""
    step: int
    """Steps done, as far as anybody wrote down."""
    steps_per_s: float | None
    """Over the last rows of the newest attempt, saves and evaluations included."""
    clips_per_s: float | None
    durable: Durable | None
    mirrored_step: int | None
    ended: Ended | None
    refused: str
    """Why a start after the newest attempt was refused; empty where none was."""
    num_unborn: int
    """Starts since the newest attempt that ended before they took a number."""
    quiet_s: float | None
    """Since the run last wrote anything."""

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last step at the present rate."""
        if self.steps is None or not self.steps_per_s:
            return None
        return max(0, self.steps - self.step) / self.steps_per_s


def read_standing(run_dir: Path) -> Standing:
    """Look at the run folder."""
    now = time.time()
    number = newest_attempt(run_dir)
    begun = read_json(run_dir / "attempts" / f"{number:04d}.json")
    rows = read_rows(run_dir)
    mine = [row for row in rows if row["attempt"] == number]
    durable = _durable(run_dir, now)
    ended = _ended(run_dir, number)
    seen = [row["step"] for row in mine] + [durable.step if durable else 0, ended.step if ended else 0]
    mirrored = [row["step"] for row in rows if row["kind"] == "event" and row.get("event") == "mirrored"]
    clips_per_s = [row["clips_per_s"] for row in mine if row["kind"] == "train" and row.get("clips_per_s")]
    return Standing(
        steps=_steps(run_dir),
        done_step=done_step(run_dir),
        attempt=number,
        attempt_age_s=now - begun["time"] if isinstance(begun.get("time"), int | float) else None,
        world_size=begun.get("world_size"),
        start=str(begun.get("start", "")),
        step=max(seen),
        steps_per_s=_rate(mine),
        clips_per_s=clips_per_s[-1] if clips_per_s else None,
        durable=durable,
        mirrored_step=max(mirrored, default=None),
        ended=ended,
        refused=_refused(run_dir, number),
        num_unborn=len(_since_attempt(run_dir, number, "unborn-*.json")),
        quiet_s=_quiet(run_dir, now),
    )


def done_step(run_dir: Path) -> int | None:
    """The step at which the run finished, if it did."""
    step = read_json(run_dir / "DONE").get("step")
    return step if isinstance(step, int) else None


def newest_start(run_dir: Path) -> str:
    """Token of whoever started the newest attempt; empty without one."""
    return str(read_json(run_dir / "attempts" / f"{newest_attempt(run_dir):04d}.json").get("start", ""))


def _rate(rows: Sequence[Row]) -> float | None:
    """Steps per second between the first and last of the recent rows."""
    recent = [row for row in rows if row["kind"] == "train" and isinstance(row.get("time"), int | float)][-RECENT_ROWS:]
    if len(recent) < 2:
        return None
    steps, seconds = (recent[-1][name] - recent[0][name] for name in ("step", "time"))
    return steps / seconds if steps > 0 and seconds > 0 else None


def _steps(run_dir: Path) -> int | None:
    """What was asked for last: a job that waits may ask for more than the run it goes on with."""
    configs = [read_config(run_dir)]
    for folder in sorted((run_dir / "code").glob("[0-9]*"))[-1:]:
        try:
            configs.insert(0, yaml.safe_load((folder / "config.yaml").read_text()))
        except (OSError, yaml.YAMLError):
            continue
    found = [config["train"]["steps"] for config in configs if config and "steps" in (config.get("train") or {})]
    return found[0] if found else None


def _durable(run_dir: Path, now: float) -> Durable | None:
    found: list[tuple[int, float, Path]] = []
    for file in (run_dir / "checkpoints").glob("step-*/manifest.json"):
        step = file.parent.name.removeprefix("step-")
        try:
            if step.isdigit():
                found.append((int(step), file.stat().st_mtime, file.parent))
        except OSError:
            continue  # retention took it meanwhile
    if not found:
        return None
    step, written, folder = max(found)
    return Durable(step, max(0.0, now - written), folder)


def _ended(run_dir: Path, number: int) -> Ended | None:
    row = read_json(run_dir / "attempts" / f"{number:04d}.outcome.json")
    if "outcome" not in row:
        return None
    return Ended(str(row["outcome"]), int(row.get("step", 0)), str(row.get("reason", "")), row.get("time"))


def _refused(run_dir: Path, number: int) -> str:
    found = _since_attempt(run_dir, number, "refused-*.json")
    return str(read_json(found[-1]).get("reason", "")) if found else ""


def _since_attempt(run_dir: Path, number: int, pattern: str) -> list[Path]:
    """Files in attempts/ that are younger than the newest attempt's, the oldest first."""
    begun = run_dir / "attempts" / f"{number:04d}.json"
    since = begun.stat().st_mtime if begun.exists() else 0.0
    times = {file: file.stat().st_mtime for file in (run_dir / "attempts").glob(pattern)}
    return sorted((file for file, time_ in times.items() if time_ > since), key=times.__getitem__)


def _quiet(run_dir: Path, now: float) -> float | None:
    """Age of the newest sign of life."""
    files = [run_dir / "metrics.jsonl", *run_dir.glob("logs/rank-*.log"), *run_dir.glob("attempts/*.json")]
    times = [file.stat().st_mtime for file in files if file.exists()]
    return max(0.0, now - max(times)) if times else None
