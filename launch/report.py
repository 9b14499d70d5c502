"""Run folder -> report.html: one page without network or script, for a phone as for a desk.

    config, environment, attempts, metrics, pictures, audit ─ sections ─ page

Every piece may be missing (a run that just began, a folder that was copied in part): its place says so in a sentence.
Whatever comes from outside is escaped, and URLs are bare (C14).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from statistics import median, mode
from typing import TYPE_CHECKING

from launch.page import PAGE
from launch.plot import duration, number, percent
from launch.report_sections import data, learning, objectives, panels, pictures, section, setup
from launch.report_trust import VERDICTS, ending, ranks, reliability, saves, slowest, where_time_went
from launch.run_folder import Run, read_run
from pretrain.track import GROUPS
from shards.errors import UserError
from shards.storage import write_atomic

if TYPE_CHECKING:
    from pretrain.verdict import AuditResult

RECENT_ROWS = 50
WAIT_SHOWN = 0.03
"""Share of the time from which on a wait for data is worth a name."""


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
    sections = [
        learning(run),
        pictures(run),
        objectives(run),
        reliability(run, audit, why_no_audit),
        where_time_went(run),
        saves(run),
        speed(run),
        data(run),
        panels(run, GROUPS["optimizer"].title, ["optimizer"], "No learning rate was logged yet."),
        setup(run),
    ]
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
        " and ".join(name.replace("_", " ") for name in section(run.config, "objective")) or "no known objective"
    )
    model, data = section(run.config, "model"), section(run.config, "data")
    what = (
        f"A {model.get('size', 'video')} Transformer learning {objectives} from {data.get('shards', 'unknown data')}."
    )
    if not run.attempts:
        return f"{escape(what)} It has not been started."
    style, words = ending(run.attempts[-1], is_newest=True)
    return f'{escape(what)} Last start: <b class="{style}">{escape(words)}</b>.'


def _tiles(run: Run, audit: AuditResult | None) -> Iterator[str]:
    steps = section(run.config, "train").get("steps")
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
    if run.goodput.ettr is not None:
        yield _tile("Goodput", percent(run.goodput.ettr), f"of {duration(run.goodput.wall_s)} is training that counts")
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


# ---------------------------------------------------------------------------------------------- speed


def speed(run: Run) -> str:
    """Rates, waits, memory; and which rank the others wait for."""
    title = GROUPS["speed"].title
    told = slowest(run)
    body = panels(run, title, ["speed", "memory"], "No rate was logged yet.", [ranks(run)])
    return body + (f"<p>{escape(told)}</p>" if told else "")
