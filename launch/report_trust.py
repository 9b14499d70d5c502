"""The parts of the report about how the run was kept alive: starts, events, where its time went, saves, the audit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from launch.bars import Bar, bars_card
from launch.goodput import PARTS
from launch.plot import duration, percent, ratio, seconds
from launch.report_sections import group, panels, section
from launch.run_folder import Attempt, Run
from pretrain.redact import without_secrets
from pretrain.track import GROUPS, Row

if TYPE_CHECKING:
    from pretrain.verdict import AuditResult

MAX_ATTEMPTS = 16
MAX_EVENTS = 30
RECENT_ROWS = 50
VERDICTS = {0: ("good", "exact"), 3: ("fair", "exact but for a list"), 1: ("bad", "violated")}
OUTCOMES = {
    "finished": ("good", "finished"),
    "stopped": ("fair", "stopped on request"),
    "failed": ("bad", "failed"),
    "rolled_back": ("fair", "rolled back"),
    "person": ("bad", "needs a person"),
    "": ("fair", "killed without a word, or still at work"),
}
EVENTS = {
    "skipped": "step not applied",
    "rolled_back": "rolled back",
    "save_failed": "save failed",
    "mirrored": "copied to the mirror",
    "mirror_failed": "mirror failed",
}
PART_COLORS = {
    "productive": "c0",
    "data_wait": "c1",
    "redone": "c4",
    "saving": "c3",
    "evaluating": "c2",
    "start_up": "c5",
    "down": "line",
    "unknown": "soft",
}
RANK_PARTS = {
    "compute_s": ("computing", "c0"),
    "data_wait_s": ("waiting for data", "c4"),
    "comm_wait_s": ("waiting for ranks", "c1"),
}


def reliability(run: Run, audit: AuditResult | None, why_no_audit: str) -> str:
    """Every start with what counts of it, what happened on the way, and the audit."""
    body = _timeline(run) + _events(run)
    if audit is None:
        reason = f": {without_secrets(why_no_audit)}" if why_no_audit else "."
        body += f"<p>No audit was made for this page{escape(reason)}</p>"
    else:
        style, _ = VERDICTS[audit.exit_code]
        body += f'<pre class="audit {style}">{escape(chr(10).join(audit.lines))}</pre>'
    return f"<section><h2>Can it be trusted?</h2>{body}</section>"


def _timeline(run: Run) -> str:
    """A bar per attempt over steps: solid what counts, hatched what a later attempt did again, ticks for saves."""
    if not run.attempts:
        return "<p>No attempt is on record.</p>"
    steps = section(run.config, "train").get("steps")
    last = max([attempt.end for attempt in run.attempts] + ([steps] if isinstance(steps, int) else []) + [1])
    rows: list[str] = []
    for attempt in run.attempts[-MAX_ATTEMPTS:]:
        kept = max(attempt.start, min(attempt.kept, attempt.end))
        bars = _bar("kept", attempt.start, kept, last) + _bar("redone", kept, attempt.end, last)
        bars += "".join(f'<i class="save" style="left:{100 * step / last:.2f}%"></i>' for step in attempt.saves)
        style, words = ending(attempt, is_newest=attempt is run.attempts[-1])
        when = "" if attempt.time is None else f"{datetime.fromtimestamp(attempt.time, UTC):%b %d %H:%M} · "
        ranks = "" if attempt.world_size is None else f"{attempt.world_size} ranks · "
        redone = f" · {attempt.end - kept} steps done again" if attempt.end > kept else ""
        facts = f"{when}{ranks}steps {attempt.start} to {attempt.end}{redone}"
        reason = f"<small>{escape(attempt.reason)}</small>" if attempt.reason else ""
        rows.append(
            f'<li><div class="label"><b>{attempt.number}</b> {escape(facts)} · '
            f'<span class="{style}">{escape(words)}</span></div><div class="track">{bars}</div>{reason}</li>'
        )
    more = len(run.attempts) - len(rows)
    earlier = f"<p>{more} earlier starts are not shown.</p>" if more else ""
    meanings = (("kept", "counts"), ("redone", "done again later"), ("save", "checkpoint"))
    key = "".join(f'<i class="{style}"></i>{words}' for style, words in meanings)
    return f'{earlier}<ol class="timeline">{"".join(rows)}</ol><p class="key">{key}</p>'


def _events(run: Run) -> str:
    """What happened to the run: counts, and the newest by step and attempt. Copies to the mirror are counted only."""
    rows = [row for row in run.rows if row["kind"] == "event"]
    if not rows:
        return ""
    counts = Counter(str(row.get("event")) for row in rows)
    told = ", ".join(f"{EVENTS.get(name, name)}: {count}" for name, count in counts.items())
    shown = sorted((row for row in rows if row.get("event") != "mirrored"), key=_when)[-MAX_EVENTS:]
    lines = "".join(
        f"<tr><th>step {row['step']}</th><td>{escape(_event_words(row))}</td></tr>" for row in reversed(shown)
    )
    table = f"<table>{lines}</table>" if lines else ""
    return f'<div class="events"><h3>What happened on the way</h3><p>{escape(told)}</p>{table}</div>'


def _when(row: Row) -> tuple[float, int]:
    return row.get("time") or 0.0, row["step"]


def _event_words(row: Row) -> str:
    name = str(row.get("event"))
    words = EVENTS.get(name, name)
    if name == "rolled_back":
        words += f" to step {row.get('to')}"
        if row.get("first") is not None and row.get("stop") is not None:
            words += f", over steps {row['first'] + 1} to {row['stop']}"
    reason = str(without_secrets(str(row.get("reason") or "")))
    return f"start {row['attempt']}: {words}" + (f" ({reason})" if reason else "")


def ending(attempt: Attempt, *, is_newest: bool) -> tuple[str, str]:
    """Style and words for how an attempt ended; only the newest can still be at work."""
    if not attempt.outcome and not is_newest:
        return "fair", "killed without a word"
    return OUTCOMES.get(attempt.outcome, ("fair", attempt.outcome))


def _bar(style: str, begin: int, end: int, last: int) -> str:
    if end <= begin:
        return ""
    return f'<i class="{style}" style="left:{100 * begin / last:.2f}%;width:{100 * (end - begin) / last:.2f}%"></i>'


# ---------------------------------------------------------------------------------------------- time


def where_time_went(run: Run) -> str:
    """A bar of the whole time and one per start; what it says about the interval between saves."""
    result = run.goodput
    if not result.wall_s:
        return ""
    colors = [PART_COLORS[part] for part in PARTS]
    bars = [Bar("all", tuple(result.seconds[part] for part in PARTS), duration(result.wall_s))]
    if len(result.attempts) > 1:
        bars += [
            Bar(f"start {attempt.number}", tuple(attempt.seconds[part] for part in PARTS), duration(attempt.wall_s))
            for attempt in result.attempts[-MAX_ATTEMPTS:]
        ]
    legend = [
        f"{words} {percent(result.seconds[part] / result.wall_s)} ({duration(result.seconds[part])})"
        if result.seconds[part]
        else ""
        for part, words in PARTS.items()
    ]
    card = bars_card("Where the time went", bars, legend, colors, are_shares=True)
    sentences = [f"{percent(result.ettr or 0.0)} of the time was training that counts (ETTR)."]
    if result.time_between_failures_s is not None:
        sentences.append(
            f"{result.num_failures} of {len(run.attempts)} starts lost work, one in "
            f"{duration(result.time_between_failures_s)} at work."
        )
    if result.interval_s is not None and result.save_s is not None:
        steps = f" ({result.interval_steps:,} steps)" if result.interval_steps else ""
        every = section(run.config, "checkpoint").get("every_steps")
        now = f"; checkpoint.every_steps is {every}" if every is not None else ""
        sentences.append(
            f"A save holds training up for {duration(result.save_s)}: saving every {duration(result.interval_s)}"
            f"{steps} would lose least (Young and Daly){now}."
        )
    return group("Where did the time go?", [card], "") + f"<p>{escape(' '.join(sentences))}</p>"


def ranks(run: Run) -> str:
    """One bar per rank: seconds per step in the newest rows. Empty where no rank was told apart."""
    rows = [row for row in run.rows if row["kind"] == "train"][-RECENT_ROWS:]
    attempt = max((row["attempt"] for row in rows), default=0)
    rows = [row for row in rows if row["attempt"] == attempt]
    by_rank = {name: _means(rows, f"ranks/{name}") for name in RANK_PARTS}
    if not all(by_rank.values()) or len({len(values) for values in by_rank.values()}) != 1:
        return ""
    bars = [
        Bar(f"rank {rank}", values, seconds(sum(values)))
        for rank, values in enumerate(zip(*by_rank.values(), strict=True))
    ]
    legend = [words for words, _ in RANK_PARTS.values()]
    return bars_card("Seconds per step, rank by rank", bars, legend, [color for _, color in RANK_PARTS.values()])


def slowest(run: Run) -> str:
    """Who the others wait for, in a sentence; empty where no rank was told apart."""
    rows = [row for row in run.rows if row["kind"] == "train"][-RECENT_ROWS:]
    told = [
        row for row in rows if row.get("slowest_compute_rank") is not None and row["attempt"] == rows[-1]["attempt"]
    ]
    if not told:
        return ""
    rank, count = Counter(int(row["slowest_compute_rank"]) for row in told).most_common(1)[0]
    ratios = [row["slowest_compute_ratio"] for row in told if isinstance(row.get("slowest_compute_ratio"), int | float)]
    nodes = next((each.nodes for each in run.attempts if each.number == told[-1]["attempt"]), ())
    place = f" on {nodes[rank]}" if rank < len(nodes) else ""
    share = percent(count / len(told))
    times = f"; the slowest needs {ratio(median(ratios))} the median rank's time" if ratios else ""
    return f"Rank {rank}{place} computes longest in {share} of the newest rows{times}."


def _means(rows: Sequence[Row], name: str) -> list[float]:
    """Mean over the rows of each rank's number; empty unless every row tells of the same ranks."""
    lists: list[list[Any]] = [row[name] for row in rows if isinstance(row.get(name), list)]
    if not lists or len({len(values) for values in lists}) != 1:
        return []
    columns = [[value for value in column if value is not None] for column in zip(*lists, strict=True)]
    return [mean(column) if column else 0.0 for column in columns]


def saves(run: Run) -> str:
    """How long saves take, how large they are, and how old the newest one gets."""
    return panels(run, GROUPS["saves"].title, ["saves"], "Nothing was saved yet.")
