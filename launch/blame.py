"""Which nodes were found at fault, by whom, and which of them the run does without from now on.

The watchdog blames ranks (`attempts/0003.outcome.json`), whose nodes stand in `attempts/0003.json`; the doctor blames
nodes (`attempts/blamed.jsonl`). Anything may fail once: a node is left out when it was blamed twice. Once it is mended,
`touch RUN/attempts/forgiven`: what was blamed earlier counts no more.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

BLAMES_TO_EXCLUDE = 2
FORGIVEN = "attempts/forgiven"


@dataclass(frozen=True)
class Blame:
    """One node found at fault once."""

    node: str
    attempt: int
    by: str
    reason: str
    time: float


def read_blames(run_dir: Path) -> list[Blame]:
    """What watchdog and doctor found, in order; a node with several ranks at fault in one attempt counts once."""
    folder = run_dir / "attempts"
    found: list[Blame] = []
    for file in sorted(folder.glob("[0-9]*.outcome.json")):
        ended = _object(_read(file))
        nodes = _list(_object(_read(folder / f"{file.name.partition('.')[0]}.json")).get("nodes"))
        ranks = [rank for rank in _list(ended.get("blamed")) if isinstance(rank, int) and 0 <= rank < len(nodes)]
        attempt, reason, time = (
            int(file.name.partition(".")[0]),
            str(ended.get("reason", "")),
            _number(ended.get("time")),
        )
        at_fault = dict.fromkeys(str(nodes[rank]) for rank in ranks)
        found += [Blame(node, attempt, "watchdog", reason, time) for node in at_fault]
    for line in _read(folder / "blamed.jsonl").splitlines():
        row = _object(line)
        if row.get("node"):
            by, reason = str(row.get("by", "doctor")), str(row.get("reason", ""))
            attempt, time = int(_number(row.get("attempt"))), _number(row.get("time"))
            found.append(Blame(str(row["node"]), attempt, by, reason, time))
    return found


def excluded_nodes(run_dir: Path) -> dict[str, list[Blame]]:
    """Nodes blamed often enough to be left out, and why."""
    forgiven = run_dir / FORGIVEN
    since = forgiven.stat().st_mtime if forgiven.exists() else 0.0
    by_node: dict[str, list[Blame]] = defaultdict(list)
    for blame in read_blames(run_dir):
        if blame.time >= since:
            by_node[blame.node].append(blame)
    return {node: blames for node, blames in sorted(by_node.items()) if len(blames) >= BLAMES_TO_EXCLUDE}


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _object(text: str) -> dict[str, Any]:
    """A JSON object; empty where the text is none: a line may be torn by a kill."""
    try:
        row = json.loads(text)
    except ValueError:
        return {}
    return cast(dict[str, Any], row) if isinstance(row, dict) else {}


def _list(value: Any) -> list[Any]:
    return cast(list[Any], value) if isinstance(value, list) else []


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
