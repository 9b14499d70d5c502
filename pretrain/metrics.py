"""metrics.jsonl: one JSON line per row, written by the first rank, read by the report and by who resumes.

Every row has kind, step, attempt and time. Kinds: start, train, eval, save, event. No torch is imported.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, cast

import yaml

from pretrain.redact import without_secrets

FILE = "metrics.jsonl"
_ALWAYS_KEPT = ("start", "event")
"""Kinds of rows that say what happened to the run, not what it learned: no roll-back takes them away."""

Row = dict[str, Any]


def read_rows(run_dir: Path) -> list[Row]:
    """Every whole row of metrics.jsonl in the order of writing; lines torn by a kill are left out."""
    rows: list[Row] = []
    try:
        lines = (run_dir / FILE).read_bytes().split(b"\n")
    except FileNotFoundError:
        return rows
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"kind", "step", "attempt"} <= cast(Row, row).keys():
            rows.append(cast(Row, row))
    return rows


def read_metrics(run_dir: Path) -> list[Row]:
    """The rows that count, by step: what an attempt measured beyond the step where a later one took over is dropped,
    and of two rows of one kind and step the later attempt's is kept. `start` and `event` rows are all kept.
    """
    rows = read_rows(run_dir)
    taken_over = {row["attempt"]: row["step"] for row in rows if row["kind"] == "start"}
    kept: dict[tuple[Any, ...], Row] = {}
    for place, row in enumerate(sorted(rows, key=lambda row: row["attempt"])):
        later = [step for attempt, step in taken_over.items() if attempt > row["attempt"]]
        is_always = row["kind"] in _ALWAYS_KEPT
        if is_always or row["step"] <= min(later, default=row["step"]):
            kept[(place,) if is_always else (row["kind"], row["step"])] = row
    return sorted(kept.values(), key=lambda row: (row["step"], row["attempt"]))


def committed_step(run_dir: Path) -> int:
    """Up to which step the rows of `read_metrics` are covered by a checkpoint of the run's own lineage.

    A checkpoint's row may be missing (a kill right after the commit), so the newest manifests are asked as well.
    """
    rows = read_metrics(run_dir)
    starts = {row["attempt"]: row["step"] for row in rows if row["kind"] == "start"}
    newest_attempt = max(starts, default=0)
    steps = [row["step"] for row in rows if row["kind"] == "save"] + [starts.get(newest_attempt, 0)]
    for file in (run_dir / "checkpoints").glob("step-*/manifest.json"):
        number = file.parent.name.removeprefix("step-")
        if not number.isdigit() or int(number) <= max(steps):
            continue
        try:
            manifest = json.loads(file.read_bytes())
            if manifest["attempt"] >= newest_attempt:  # older ones: the newest attempt did not trust them
                steps.append(int(manifest["step"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no checkpoint
    return max(steps)


def read_config(run_dir: Path) -> dict[str, Any]:
    """The run folder's config.yaml as plain data; empty where there is none or it cannot be read."""
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return cast(dict[str, Any], config) if isinstance(config, dict) else {}


def append_row(run_dir: Path, row: Row) -> None:
    """One line, on a line of its own even where an earlier write was torn."""
    data = json.dumps(row, allow_nan=False).encode()
    with (run_dir / FILE).open("ab+") as opened:
        end = opened.seek(0, os.SEEK_END)
        if end:
            opened.seek(end - 1)
            data = data if opened.read(1) == b"\n" else b"\n" + data
        opened.write(data + b"\n")


def plain(row: Row) -> Row:
    """Strict JSON: NaN and infinities become null, also inside a list, and `not_finite` names them."""
    bad = [name for name, value in row.items() if value != _finite(value)]
    whole = {name: _finite(value) for name, value in row.items()}
    return without_secrets({**whole, **({"not_finite": bad} if bad else {})})


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in cast(list[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
