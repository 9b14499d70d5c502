"""What a data set holds as a picture: an HTML page, or an SVG drawing of the same charts. No script, no network.

Stats ─ one chart per measure and split ─ page or drawing
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from launch.page import PAGE
from launch.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, nice_ticks, number, percent
from shards.errors import UserError
from shards.stats import Distribution, SplitStats, Stats, short
from shards.storage import write_atomic

MAX_LABELS = 12
MAX_NAME = 16
"""Letters of a label that fit beside its bar."""
NUM_TICKS = 5
COLUMNS = 2
TITLE_HEIGHT = 34
_DRAWING_STYLE = """
svg { --c0: #2563c9; background: #ffffff; font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.grid { stroke: #ececea; fill: none; } .tick { fill: #666a70; font-size: 12px; }
.name { fill: #1d1e20; font-size: 15px; }
"""


def picture(stats: Stats, path: Path) -> None:
    """Write the picture of a data set; its kind is told by the name. Raises UserError for other kinds."""
    if path.suffix == ".svg":
        text = drawing(stats)
    elif path.suffix == ".html":
        text = page(stats)
    else:
        raise UserError(f"--picture is {path}; it must end with .html or .svg: rename it")
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise UserError(f"--picture is {path}; it cannot be written ({error}): choose another place") from error


def page(stats: Stats) -> str:
    """One self-contained HTML page."""
    sections: list[str] = []
    for split in stats.splits:
        cards = "".join(f'<div class="card"><h3>{escape(title)}</h3>{svg}</div>' for title, svg in charts(split))
        words = ", ".join(f"{name} {count}" for name, count in split.levels.items())
        withdrawn = f" Withdrawn: {split.num_withdrawn}." if split.num_withdrawn else ""
        sections.append(
            f"<h2>{escape(split.name)}</h2><p>{split.num_samples} samples of {split.num_groups} groups in "
            f"{split.num_shards} tars. Frames are known from: {escape(words)}.{withdrawn}</p>"
            f'<div class="cards">{cards}</div>'
        )
    if stats.rejected:
        rows = "".join(
            f"<tr><th>{escape(reason)}</th><td>{count}</td></tr>" for reason, count in stats.rejected.items()
        )
        sections.append(f"<h2>Rejected</h2><table>{rows}</table>")
    samples = sum(split.num_samples for split in stats.splits)
    hours = sum(split.hours for split in stats.splits)
    num_bytes = sum(split.num_bytes for split in stats.splits)
    tiles = (
        _tile("samples", short(samples))
        + _tile("hours", short(hours))
        + _tile("of video", f"{short(num_bytes)}B")
        + _tile("rejected", short(sum(stats.rejected.values())))
    )
    return PAGE.replace("tubelet report", "tubelet stats").format(
        title=escape(stats.url.rstrip("/").rpartition("/")[2] or stats.url),
        lead=escape(stats.url),
        tiles=tiles,
        body="".join(sections),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def drawing(stats: Stats) -> str:
    """The charts of all splits in one SVG."""
    all_charts = [(f"{split.name}: {title}", svg) for split in stats.splits for title, svg in charts(split)]
    cell = HEIGHT + TITLE_HEIGHT
    height = -(-len(all_charts) // COLUMNS) * cell
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {COLUMNS * WIDTH} {height}">'
        f"<style>{_DRAWING_STYLE}</style>"
    ]
    for place, (title, svg) in enumerate(all_charts):
        x, y = place % COLUMNS * WIDTH, place // COLUMNS * cell
        inner = svg.replace("<svg ", f'<svg x="{x}" y="{y + TITLE_HEIGHT}" width="{WIDTH}" height="{HEIGHT}" ', 1)
        parts.append(f'<text class="name" x="{x + 12}" y="{y + 22}">{escape(title)}</text>{inner}')
    return "".join(parts) + "</svg>\n"


def charts(split: SplitStats) -> list[tuple[str, str]]:
    """(title, SVG) of everything there is to see of a split."""
    found = [
        (f"{spread.name}, {spread.unit} (median {short(spread.median)})", histogram(spread))
        for spread in split.distributions
        if spread.highest > 0
    ]
    found.append((f"sizes ({split.num_sizes})", bars(split.sizes, split.num_samples)))
    if split.labels:
        found.append((f"labels ({len(split.labels)})", bars(split.labels[:MAX_LABELS], split.num_samples)))
    return found


def histogram(spread: Distribution) -> str:
    """Bars over classes of equal ratio: the axis is logarithmic."""
    ticks = nice_ticks(0, max(spread.counts))
    top = ticks[-1]
    step = (WIDTH - LEFT - RIGHT) / len(spread.counts)
    parts = [_open(spread.name), *_levels(ticks)]
    for place, count in enumerate(spread.counts):
        height = count / top * (HEIGHT - TOP - BOTTOM)
        x, y = LEFT + place * step, HEIGHT - BOTTOM - height
        tip = f"{short(spread.edges[place])} to {short(spread.edges[place + 1])} {spread.unit}: {count}"
        parts.append(_bar(x + 0.5, y, max(step - 1, 0.5), height, tip))
    places = range(0, len(spread.edges), -(-len(spread.edges) // NUM_TICKS))
    parts += [_text(LEFT + place * step, HEIGHT - 9, short(spread.edges[place]), "middle") for place in places]
    return "".join(parts) + "</svg>"


def bars(counts: Sequence[tuple[str, int]], num_all: int) -> str:
    """One bar per name, the longest first, with its share of all."""
    step = (HEIGHT - TOP) / max(len(counts), 4)
    left, right = 130, 56
    top = max((count for _, count in counts), default=1)
    parts = [_open("counts")]
    for place, (name, count) in enumerate(counts):
        y = TOP + place * step
        shown = name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
        width = count / top * (WIDTH - left - right)
        parts.append(_text(left - 7, y + step / 2 + 4, shown, "end"))
        parts.append(_bar(left, y + 2, max(width, 0.5), step - 4, f"{name}: {count}"))
        parts.append(_text(left + width + 6, y + step / 2 + 4, percent(count / num_all), "start"))
    return "".join(parts) + "</svg>"


def _open(title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'


def _levels(ticks: Sequence[float]) -> list[str]:
    parts: list[str] = []
    for tick in ticks:
        y = HEIGHT - BOTTOM - tick / ticks[-1] * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 7, y + 4, number(tick), "end"))
    return parts


def _bar(x: float, y: float, width: float, height: float, tip: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" style="fill:var(--c0)">'
        f"<title>{escape(tip)}</title></rect>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _tile(name: str, value: str) -> str:
    return f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b></div>'
