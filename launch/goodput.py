"""Where the time of a run went: from attempts/ and metrics.jsonl, without torch. Pure functions.

    starts and ends of attempts, rows ─ seconds by part, per attempt ─ totals ─ ETTR, and how often to save

Every second from the first start to the last sign of life is in exactly one part; what no row explains is `unknown`.
ETTR, the effective training time ratio, is productive / wall (Meta, arXiv 2410.21680). The interval between saves that
loses least is sqrt(2 x seconds of a save x mean time between failures) (Young, Daly; arXiv 2410.18124).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

Row = Mapping[str, Any]

PARTS: dict[str, str] = {
    "productive": "training that counts",
    "data_wait": "waiting for data",
    "redone": "training done again",
    "saving": "held up by saves",
    "evaluating": "evaluating",
    "start_up": "starting",
    "down": "between two starts",
    "unknown": "not explained by a row",
}
"""Part of the time -> what it is called. In the order in which they are drawn."""
RECENT_ROWS = 50
NO_FAILURE = ("finished", "stopped", "person")
"""Outcomes that lose no work."""


@dataclass(frozen=True)
class Started:
    """What attempts/ says of one start. Times are clock seconds; None where the file is missing or damaged."""

    number: int
    begun: float | None = None
    ended: float | None = None
    outcome: str = ""
    end_step: int | None = None


@dataclass(frozen=True)
class AttemptTime:
    """Where the time of one attempt went. `down`: before it, since the end of the one before."""

    number: int
    seconds: dict[str, float]

    @property
    def wall_s(self) -> float:
        """All of it, the time down before it included."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Goodput:
    """Where the time of a run went, and what follows for its saves."""

    attempts: tuple[AttemptTime, ...]
    num_failures: int
    """Starts that ended without saving what they had: failed, rolled back, or killed without a word."""
    time_between_failures_s: float | None
    """Mean time at work per failure; None while there was none."""
    save_s: float | None
    """Mean time that a save holds training up."""
    interval_s: float | None
    """Recommended time between saves."""
    interval_steps: int | None

    @property
    def seconds(self) -> dict[str, float]:
        """Part -> seconds, over all attempts."""
        return {part: sum(attempt.seconds[part] for attempt in self.attempts) for part in PARTS}

    @property
    def wall_s(self) -> float:
        """From the first start to the last sign of life."""
        return sum(attempt.wall_s for attempt in self.attempts)

    @property
    def ettr(self) -> float | None:
        """Productive share of the time; None where nothing was measured."""
        return self.seconds["productive"] / self.wall_s if self.wall_s > 0 else None

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "seconds": self.seconds, "wall_s": self.wall_s, "ettr": self.ettr}


def goodput(started: Sequence[Started], rows: Sequence[Row]) -> Goodput:
    """`rows`: every row of metrics.jsonl, of abandoned work too (`read_rows`). Either may be missing in part."""
    starts = {row["attempt"]: row["step"] for row in rows if row["kind"] == "start"}
    attempts: list[AttemptTime] = []
    down_since: float | None = None
    ended_before: float | None = None
    for attempt in sorted(started, key=lambda attempt: attempt.number):
        own = [row for row in rows if row["attempt"] == attempt.number and row.get("time")]
        begun, ended = _begun(attempt, own), _ended(attempt, own)
        if begun is None or ended is None:
            continue
        if ended_before is not None:  # clocks of two nodes may disagree
            begun = max(begun, ended_before)
        ended = max(ended, begun)
        taken_over = min((step for later, step in starts.items() if later > attempt.number), default=math.inf)
        seconds = _attempt_seconds(attempt, own, begun, ended, taken_over)
        gap_s = 0.0 if ended_before is None else begun - ended_before
        # Killed without a word: it may have worked on until its next row was due.
        unseen_s = 0.0 if down_since is None else min(gap_s, down_since)
        seconds["down"] = gap_s - unseen_s
        seconds["unknown"] += unseen_s
        attempts.append(AttemptTime(attempt.number, seconds))
        ended_before, down_since = ended, None if attempt.outcome else _longest_silence_s(own)
    return Goodput(tuple(attempts), *_advice(started, rows, attempts))


def _begun(attempt: Started, own: Sequence[Row]) -> float | None:
    """When its process started, as far as it is told."""
    process = [row["time"] - row["setup_s"] for row in own if row["kind"] == "start" and _is_number(row.get("setup_s"))]
    times = [time for time in (attempt.begun, *process, *(row["time"] for row in own[:1])) if time is not None]
    return min(times, default=None)


def _ended(attempt: Started, own: Sequence[Row]) -> float | None:
    """When it ended; without an outcome, its last sign of life."""
    times = [time for time in (attempt.ended, *(row["time"] for row in own)) if time is not None]
    return max(times, default=attempt.begun)


def _attempt_seconds(
    attempt: Started, own: Sequence[Row], begun: float, ended: float, taken_over: float
) -> dict[str, float]:
    """Split the time from `begun` to `ended`. What is surely known comes first; no part gets more than is left."""
    training = _training(attempt, own, taken_over)
    wanted = {
        "start_up": _start_up_s(own, begun, ended),
        "saving": sum(row["seconds"] for row in own if row["kind"] == "save" and _is_number(row.get("seconds"))),
        "evaluating": _evaluating_s(own),
        **training,
    }
    seconds = dict.fromkeys(PARTS, 0.0)
    left_s = ended - begun
    for part, part_s in wanted.items():
        seconds[part] = min(max(part_s, 0.0), left_s)
        left_s -= seconds[part]
    seconds["unknown"] = left_s
    return seconds


def _training(attempt: Started, own: Sequence[Row], taken_over: float) -> dict[str, float]:
    """Training time from the rows' seconds per step: what counts, what waited for data, what was lost."""
    begin = next((row["step"] for row in own if row["kind"] == "start"), None)
    seconds = {"productive": 0.0, "data_wait": 0.0, "redone": 0.0}
    step_s, wait = 0.0, 0.0
    since: float | None = None

    def add(first: int, last: int, spent_s: float) -> None:
        kept = min(max((taken_over - first) / (last - first), 0.0), 1.0)
        seconds["redone"] += spent_s * (1 - kept)
        seconds["data_wait"] += spent_s * kept * wait
        seconds["productive"] += spent_s * kept * (1 - wait)

    for row in own:
        if row["kind"] != "train":
            continue
        if not _is_number(row.get("step_s")):  # not measured: its time stays unknown
            begin, since = row["step"], row["time"]
            continue
        first = row["step"] - 1 if begin is None else begin
        step_s, wait = row["step_s"], _share(row.get("data_wait_fraction"))
        if row["step"] > first:
            spent_s = (row["step"] - first) * step_s
            # a range that is stepped over takes no time
            add(first, row["step"], spent_s if since is None else min(spent_s, max(row["time"] - since, 0.0)))
        begin, since = row["step"], row["time"]
    saved = [row["step"] for row in own if row["kind"] == "save"]
    last = max([*saved, attempt.end_step or 0], default=0)
    if begin is not None and last > begin and step_s:  # steps after the last row that its save or outcome tells of
        add(begin, last, (last - begin) * step_s)
    return seconds


def _start_up_s(own: Sequence[Row], begun: float, ended: float) -> float:
    """From the start of the process to its first step; all of it where there was no step."""
    start = next((row for row in own if row["kind"] == "start"), None)
    first = next((row for row in own if row["kind"] == "train"), None)
    if first is not None and _is_number(first.get("step_s")):
        num_steps = first["step"] - start["step"] if start is not None else 1
        return first["time"] - num_steps * first["step_s"] - begun
    known = start or first
    return ended - begun if known is None else known["time"] - begun


def _evaluating_s(own: Sequence[Row]) -> float:
    """As measured; else from the row of the same step before it, which is written right before."""
    total_s = 0.0
    for place, row in enumerate(own):
        if row["kind"] != "eval":
            continue
        if _is_number(row.get("seconds")):
            total_s += row["seconds"]
        elif place and own[place - 1]["step"] == row["step"] and own[place - 1]["kind"] == "train":
            total_s += row["time"] - own[place - 1]["time"]
    return total_s


def _longest_silence_s(own: Sequence[Row]) -> float:
    times = [row["time"] for row in own]
    return max((later - earlier for earlier, later in itertools.pairwise(times) if later > earlier), default=0.0)


def _advice(
    started: Sequence[Started], rows: Sequence[Row], attempts: Sequence[AttemptTime]
) -> tuple[int, float | None, float | None, float | None, int | None]:
    """Failures, mean time between them, cost of a save, and the interval that follows in seconds and steps."""
    newest = max((attempt.number for attempt in started), default=0)
    num_failures = sum(
        attempt.outcome not in NO_FAILURE and not (attempt.number == newest and not attempt.outcome)
        for attempt in started
    )
    at_work_s = sum(attempt.wall_s - attempt.seconds["down"] for attempt in attempts)
    between_s = at_work_s / num_failures if num_failures and at_work_s > 0 else None
    saves = [row for row in rows if row["kind"] == "save"]
    save_s = mean(values) if (values := _numbers(saves, "seconds")) else None
    if between_s is None or not save_s:
        return num_failures, between_s, save_s, None, None
    # one write at a time: it must end before the next save begins
    interval_s = max(math.sqrt(2 * save_s * between_s), max(_numbers(saves, "write_s"), default=0.0))
    steps_s = _numbers([row for row in rows if row["kind"] == "train"], "step_s")[-RECENT_ROWS:]
    interval_steps = max(1, round(interval_s / median(steps_s))) if steps_s and median(steps_s) > 0 else None
    return num_failures, between_s, save_s, interval_s, interval_steps


def _numbers(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if _is_number(row.get(name))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _share(value: Any) -> float:
    return min(max(float(value), 0.0), 1.0) if _is_number(value) else 0.0
