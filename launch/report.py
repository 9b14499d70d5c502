"""Run folder -> report.html: one page without network or script, for a phone as for a desk.

    config, environment, attempts, metrics, pictures, audit ─ sections ─ page

Every piece may be missing (a run that just began, a folder that was copied in part): its place says so in a sentence.
Whatever comes from outside is escaped, and URLs are bare (C14).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from statistics import median, mode
from typing import TYPE_CHECKING, Any, cast

from launch.page import PAGE
from launch.plot import NUM_COLORS, Curve, Format, card_of, num_bytes, number, percent
from launch.run_folder import Attempt, Run, read_run
from pretrain.redact import without_secrets
from shards.errors import UserError
from shards.storage import write_atomic

if TYPE_CHECKING:
    from pretrain.audit import AuditResult

MAX_PICTURES = 8
MAX_PICTURE_BYTES = 12 << 20
MAX_ATTEMPTS = 16
RECENT_ROWS = 50
WAIT_SHOWN = 0.03
"""Share of the time from which on a wait for data is worth a name."""
VERDICTS = {0: ("good", "exact"), 3: ("fair", "exact but for a list"), 1: ("bad", "violated")}
OUTCOMES = {
    "finished": ("good", "finished"),
    "stopped": ("fair", "stopped on request"),
    "failed": ("bad", "failed"),
    "person": ("bad", "needs a person"),
    "": ("fair", "killed without a word, or still at work"),
}


def check_run_folder(run_dir: Path) -> None:
    """Raise UserError unless a run has been here."""
    if not any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl", "attempts")):
        raise UserError(
            f"{run_dir} is not a run folder (no config.yaml, metrics.jsonl or attempts in it); "
            "give the folder that run.dir named: for example runs/demo"
        )


def report(run_dir: Path, audit: AuditResult | None = None, *, why_no_audit: str = "") -> Path:
    """Write RUN/report.html from what the run folder holds, and the audit's result if it was made. Returns its path.

    `why_no_audit` is said in its place. Raises UserError where no run has been.
    """
    check_run_folder(run_dir)
    run = read_run(run_dir)
    trust = _reliability(run, audit, why_no_audit)
    sections = [_learning(run), _pictures(run), _objectives(run), trust, _speed(run), _data(run), _setup(run)]
    name = escape(run.folder.name)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    html = PAGE.format(
        title=name, lead=_lead(run), tiles="".join(_tiles(run, audit)), body="".join(sections), made=made
    )
    path = run_dir / "report.html"
    write_atomic(path, html.encode())
    return path


# ---------------------------------------------------------------------------------------------- head


def _lead(run: Run) -> str:
    """Two sentences: what ran, and how it stands."""
    objectives = (
        " and ".join(name.replace("_", " ") for name in _section(run.config, "objective")) or "no known objective"
    )
    model, data = _section(run.config, "model"), _section(run.config, "data")
    what = (
        f"A {model.get('size', 'video')} Transformer learning {objectives} from {data.get('shards', 'unknown data')}."
    )
    if not run.attempts:
        return f"{escape(what)} It has not been started."
    style, words = _ending(run.attempts[-1], is_newest=True)
    return f'{escape(what)} Last start: <b class="{style}">{escape(words)}</b>.'


def _tiles(run: Run, audit: AuditResult | None) -> Iterator[str]:
    steps = _section(run.config, "train").get("steps")
    done = max((row["step"] for row in run.rows), default=0)
    yield _tile("Steps", f"{done:,}", f"of {steps:,}" if isinstance(steps, int) else "")
    for name in run.objectives:
        loss, zero = run.last("eval", f"loss/{name}"), run.last("eval", f"{name}/zero")
        if loss is not None and zero:
            copy = run.last("eval", f"{name}/copy")
            beside = f"predicting zero {number(zero)}" + (f" · copying {number(copy)}" if copy is not None else "")
            yield _tile(f"Held-out {name.replace('_', ' ')}", number(loss), beside)
        for kind, words in (("eval", "Held-out"), ("train", "Training")):
            accuracy, chance = run.last(kind, f"{name}/accuracy"), run.last(kind, f"{name}/chance")
            if accuracy is not None:
                yield _tile(
                    f"{words} {name.replace('_', ' ')}",
                    percent(accuracy),
                    "" if chance is None else f"right, chance {percent(chance)}",
                )
                break
    if rates := [value for _, value in run.points("train", "clips_per_s")[-RECENT_ROWS:]]:
        yield _tile("Clips per second", number(median(rates)), _wait(run))
    saves = sum(row["kind"] == "save" for row in run.rows)
    yield _tile("Starts", str(len(run.attempts)), f"{saves} checkpoints")
    if audit is not None:
        style, words = VERDICTS[audit.exit_code]
        yield _tile("Audit", words, f"{audit.counts.get('clips', 0):,} clips checked", style)


def _wait(run: Run) -> str:
    """How long it waits for data, and for which rank where it is mostly the same one."""
    waits = [value for _, value in run.points("train", "data_wait_fraction")[-RECENT_ROWS:]]
    if not waits:
        return ""
    words = f"waiting for data {percent(median(waits))}"
    slowest = [value for _, value in run.points("train", "slowest_rank")[-RECENT_ROWS:]]
    rank = int(mode(slowest)) if slowest else 0
    is_one = slowest.count(rank) > 0.8 * len(slowest) and len(set(slowest)) > 1
    return words + (f", mostly for rank {rank}" if is_one and median(waits) >= WAIT_SHOWN else "")


def _tile(name: str, value: str, beside: str = "", style: str = "") -> str:
    texts = f"<span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(beside)}</small>"
    return f'<div class="tile {style}">{texts}</div>'


# ---------------------------------------------------------------------------------------------- sections


def _learning(run: Run) -> str:
    """The sum of the losses, and for each reconstruction the held-out loss beside what trivial predictors get."""
    cards: list[str] = []
    for name in run.objectives:
        if not run.points("eval", f"loss/{name}") and not run.points("train", f"loss/{name}"):
            continue
        curves = [
            Curve("held out", run.points("eval", f"loss/{name}"), 0),
            Curve("training", run.points("train", f"loss/{name}"), 1),
            Curve("predicting zero", run.points("eval", f"{name}/zero"), 4, is_reference=True),
            Curve("copying the nearest visible token", run.points("eval", f"{name}/copy"), 5, is_reference=True),
        ]
        cards.append(card_of(f"{name.replace('_', ' ').capitalize()}: loss", curves))
    if len(cards) > 1:
        curves = [Curve("held out", run.points("eval", "loss"), 0), Curve("training", run.points("train", "loss"), 1)]
        cards.append(card_of("Weighted sum of the losses", curves))
    return _group("Is it learning?", cards, "No loss was logged yet.")


def _pictures(run: Run) -> str:
    files = sorted((run.folder / "pictures").glob("*.png"), key=lambda file: (file.stat().st_mtime, file.name))
    shown: list[str] = []
    size = 0
    for file in reversed(files[-MAX_PICTURES:]):
        data = file.read_bytes()
        if size + len(data) > MAX_PICTURE_BYTES:
            continue
        size += len(data)
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        caption = escape(file.stem)
        shown.append(f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
    left_out = len(files) - len(shown)
    more = f"<p>{left_out} more in {escape(str(run.folder / 'pictures'))}.</p>" if left_out else ""
    body = f'<div class="pictures">{"".join(shown)}</div>{more}' if shown else "<p>No picture was drawn yet.</p>"
    return f"<section><h2>What it sees</h2>{body}</section>"


def _objectives(run: Run) -> str:
    """What each objective measures besides its loss: accuracies beside chance, parts of the loss, shares."""
    cards: list[str] = []
    for name in run.objectives:
        label = name.replace("_", " ").capitalize()
        parts = dict.fromkeys(key for row in run.rows for key in row if key.startswith(f"{name}/"))
        if f"{name}/accuracy" in parts:
            curves = [
                Curve("held out", run.points("eval", f"{name}/accuracy"), 0),
                Curve("training", run.points("train", f"{name}/accuracy"), 1),
                Curve("chance", run.points("train", f"{name}/chance"), 4, is_reference=True),
            ]
            cards.append(card_of(f"{label}: right answers", curves, percent, from_zero=True))
        known = {f"{name}/{part}" for part in ("accuracy", "chance", "zero", "copy", "gated")}
        curves = [
            Curve(part.removeprefix(f"{name}/"), run.points("train", part), color)
            for color, part in zip((2, 3, 5, 4, 0, 1), [part for part in parts if part not in known], strict=False)
        ]
        cards.append(card_of(f"{label}: parts of the training loss", curves))
        gated = [Curve("left out", run.points("train", f"{name}/gated"), 2)]
        cards.append(card_of(f"{label}: not asked, nothing moves", gated, percent, from_zero=True))
    return _group("The objectives in detail", cards, "No part of a loss was logged yet.")


def _speed(run: Run) -> str:
    def card(title: str, names: Sequence[tuple[str, str]], form: Format = number) -> str:
        curves = [
            Curve(words, run.points("train", name), color % NUM_COLORS) for color, (name, words) in enumerate(names)
        ]
        return card_of(title, curves, form, from_zero=True)

    cards = [
        card("Clips per second", [("clips_per_s", "all ranks")]),
        card("Seconds per step", [("step_s", "step")]),
        card(
            "Waiting for data",
            [("data_wait_fraction", "slowest rank"), ("data_wait_mean_fraction", "mean of the ranks")],
            percent,
        ),
        card("Model FLOPs utilisation", [("mfu", "of the peak")], percent),
        card("Memory", [("gpu_memory_bytes", "GPU, fullest rank"), ("memory_bytes", "host, fullest rank")], num_bytes),
        card("Learning rate", [("lr", "learning rate")]),
        card("Gradient norm", [("grad_norm", "before clipping")]),
    ]
    return _group("How fast, and with what", cards, "No rate was logged yet.")


def _data(run: Run) -> str:
    """What the loader did between two logged rows, summed over all ranks."""

    def card(title: str, names: Sequence[tuple[str, str]], form: Format = number, *, is_trouble: bool = False) -> str:
        curves = [
            Curve(words, run.points("train", name), color % NUM_COLORS) for color, (name, words) in enumerate(names)
        ]
        if is_trouble:  # all is well: nothing to draw
            curves = [curve for curve in curves if any(value for _, value in curve.points)]
        return card_of(title, curves, form, from_zero=True)

    reasons = dict.fromkeys(key for row in run.rows for key in row if key.startswith("substituted/"))
    cards = [
        card("Decoding: milliseconds per clip", [("decode_ms", "mean of all ranks")]),
        card("Bytes read, per row", [("bytes_read", "all ranks")], num_bytes),
        card("Requests, per row", [("requests", "to storage"), ("cache_hits", "answered by the node's cache")]),
        card(
            "Storage trouble, per row",
            [("retries", "tried again"), ("hedges", "asked twice"), ("throttled", "told to slow down")],
            is_trouble=True,
        ),
        card("Samples replaced, per row", [(name, name.partition("/")[2]) for name in reasons], is_trouble=True),
        card(
            "Other incidents, per row",
            [("decoder_respawns", "decoders replaced"), ("stride_dropped", "clips with a lowered stride")],
            is_trouble=True,
        ),
    ]
    return _group("Where the data comes from", cards, "Nothing was read yet.")


def _reliability(run: Run, audit: AuditResult | None, why_no_audit: str) -> str:
    body = _timeline(run)
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
    steps = _section(run.config, "train").get("steps")
    last = max([attempt.end for attempt in run.attempts] + ([steps] if isinstance(steps, int) else []) + [1])
    rows: list[str] = []
    for attempt in run.attempts[-MAX_ATTEMPTS:]:
        kept = max(attempt.start, min(attempt.kept, attempt.end))
        bars = _bar("kept", attempt.start, kept, last) + _bar("redone", kept, attempt.end, last)
        bars += "".join(f'<i class="save" style="left:{100 * step / last:.2f}%"></i>' for step in attempt.saves)
        style, words = _ending(attempt, is_newest=attempt is run.attempts[-1])
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


def _ending(attempt: Attempt, *, is_newest: bool) -> tuple[str, str]:
    """Style and words for how an attempt ended; only the newest can still be at work."""
    if not attempt.outcome and not is_newest:
        return "fair", "killed without a word"
    return OUTCOMES.get(attempt.outcome, ("fair", attempt.outcome))


def _bar(style: str, begin: int, end: int, last: int) -> str:
    if end <= begin:
        return ""
    return f'<i class="{style}" style="left:{100 * begin / last:.2f}%;width:{100 * (end - begin) / last:.2f}%"></i>'


def _setup(run: Run) -> str:
    config = _table(_flat(run.config)) or "<p>There is no readable config.yaml.</p>"
    environment = _table(_flat(run.environment)) or "<p>There is no readable environment.json.</p>"
    return (
        f"<section><h2>What ran</h2><details><summary>Config</summary>{config}</details>"
        f"<details><summary>Versions and machine</summary>{environment}</details></section>"
    )


# ---------------------------------------------------------------------------------------------- pieces


def _group(title: str, cards: Sequence[str], otherwise: str) -> str:
    cards = [card for card in cards if card]
    body = f'<div class="cards">{"".join(cards)}</div>' if cards else f"<p>{otherwise}</p>"
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    items = cast(dict[str, Any], section) if isinstance(section, dict) else {}
    return {key: value for key, value in items.items() if value is not None}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in cast(dict[str, Any], value).items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, "" if value is None else json.dumps(value) if isinstance(value, list) else str(value)


def _table(pairs: Iterator[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in pairs if key)
    return f"<table>{rows}</table>" if rows else ""
