"""What a run folder says about its run, read without torch: for the report and for `status`.

Every piece may be missing or damaged; then its part is empty. URLs are bare (C14).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from launch.goodput import Goodput, Started, goodput
from pretrain.metrics import Row, read_config, read_metrics, read_rows
from pretrain.redact import without_secrets


@dataclass(frozen=True)
class Attempt:
    """One start of the run: where it went on, how far it got, how much of that counts, how it ended."""

    number: int
    world_size: int | None
    nodes: tuple[str, ...]
    """Name of the node of each rank; empty where it is not told."""
    time: float | None
    """Clock time of the start."""
    ended: float | None
    """Clock time of the outcome."""
    start: int
    end: int
    kept: int
    """Step where a later attempt took over (or `end`)."""
    saves: tuple[int, ...]
    outcome: str
    reason: str


@dataclass(frozen=True)
class Run:
    """What the run folder holds."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    rows: list[Row]
    """Those that count."""
    attempts: list[Attempt]
    goodput: Goodput

    def points(self, kind: str, name: str) -> list[tuple[float, float]]:
        """(step, value) of the rows of one kind that have a number there."""
        return [
            (row["step"], row[name])
            for row in self.rows
            if row["kind"] == kind and isinstance(row.get(name), int | float)
        ]

    def last(self, kind: str, name: str) -> float | None:
        """Newest value."""
        points = self.points(kind, name)
        return points[-1][1] if points else None

    @property
    def objectives(self) -> list[str]:
        """Names of the objectives, as far as metrics mention them."""
        names = [name for row in self.rows for name in row if name.startswith("loss/")]
        return list(dict.fromkeys(name.removeprefix("loss/") for name in names))


def read_run(run_dir: Path) -> Run:
    """Read what is there."""
    every_row = read_rows(run_dir)
    attempts = _read_attempts(run_dir, every_row)
    started = [Started(each.number, each.time, each.ended, each.outcome, each.end) for each in attempts]
    return Run(
        folder=run_dir.resolve(),
        config=without_secrets(read_config(run_dir)),
        environment=without_secrets(read_json(run_dir / "environment.json")),
        rows=read_metrics(run_dir),
        attempts=attempts,
        goodput=goodput(started, every_row),
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none, or none that can be read."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return cast(dict[str, Any], content) if isinstance(content, dict) else {}


def _read_attempts(run_dir: Path, rows: list[Row]) -> list[Attempt]:
    """From attempts/, and from the metrics how far each one got."""
    started = {row["attempt"]: row["step"] for row in rows if row["kind"] == "start"}
    numbers = {int(file.stem) for file in (run_dir / "attempts").glob("*.json") if file.stem.isdigit()}
    attempts: list[Attempt] = []
    for n in sorted(numbers | {row["attempt"] for row in rows}):
        begun = read_json(run_dir / "attempts" / f"{n:04d}.json")
        ended = read_json(run_dir / "attempts" / f"{n:04d}.outcome.json")
        steps = [row["step"] for row in rows if row["attempt"] == n] + [int(ended.get("step", 0))]
        start = started.get(n, min(steps))
        end = max(steps)
        attempts.append(
            Attempt(
                number=n,
                world_size=begun.get("world_size"),
                nodes=tuple(str(name) for name in begun.get("nodes") or ()),
                time=_number(begun.get("time")),
                ended=_number(ended.get("time")),
                start=start,
                end=max(start, end),
                kept=min([step for later, step in started.items() if later > n], default=max(start, end)),
                saves=tuple(row["step"] for row in rows if row["attempt"] == n and row["kind"] == "save"),
                outcome=str(ended.get("outcome", "")),
                reason=str(without_secrets(str(ended.get("reason", "")))),
            )
        )
    return attempts


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
