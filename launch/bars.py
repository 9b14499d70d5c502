"""Stacked horizontal bars as inline SVG: where time went. No script, no network. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from launch.plot import WIDTH

LEFT, RIGHT = 62, 64
HEIGHT, GAP = 17, 6


@dataclass(frozen=True)
class Bar:
    """One bar: its name on the left, its parts, and what is written on the right."""

    name: str
    parts: tuple[float, ...]
    beside: str = ""


def bars_card(
    title: str, bars: Sequence[Bar], names: Sequence[str], colors: Sequence[str], *, are_shares: bool = False
) -> str:
    """A card of bars with a legend; parts without a name are left out of the legend.

    `colors`: names of colours of the page's style sheet; `are_shares`: every bar is as long as the others, and the
    card as wide as the page.
    """
    legend = "".join(
        f'<span style="--c:var(--{color})"><i></i>{escape(name)}</span>'
        for name, color in zip(names, colors, strict=True)
        if name
    )
    chart = stacked(bars, colors, names, title=title, are_shares=are_shares)
    style = "card wide" if are_shares else "card"
    return f'<div class="{style}"><h3>{escape(title)}</h3><div class="legend">{legend}</div>{chart}</div>'


def stacked(
    bars: Sequence[Bar], colors: Sequence[str], names: Sequence[str], *, title: str, are_shares: bool = False
) -> str:
    """The bars, from the top down."""
    longest = max((sum(bar.parts) for bar in bars), default=0.0)
    height = len(bars) * (HEIGHT + GAP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for place, bar in enumerate(bars):
        top = place * (HEIGHT + GAP)
        scale = sum(bar.parts) if are_shares else longest
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{top + 13}" text-anchor="end">{escape(bar.name)}</text>')
        parts.append(f'<text class="tick" x="{WIDTH - RIGHT + 7}" y="{top + 13}">{escape(bar.beside)}</text>')
        begin = float(LEFT)
        for value, color, name in zip(bar.parts, colors, names, strict=True):
            width = value / scale * (WIDTH - LEFT - RIGHT) if scale else 0.0
            if width:
                tip = f"<title>{escape(name)}</title>" if name else ""
                box = f'x="{begin:.2f}" y="{top}" width="{width:.2f}" height="{HEIGHT}"'
                parts.append(f'<rect {box} fill="var(--{color})">{tip}</rect>')
            begin += width
    return "".join(parts) + "</svg>"
