"""Curves as inline SVG: no script, no network, colours from the page's style sheet. Pure functions.

points ─ thinned to what a screen can show (means, with the range behind them) ─ scaled ─ SVG text
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 30
MAX_POINTS = 240
NUM_COLORS = 6
"""`--c0` to `--c5` of the page's style sheet."""

Format = Callable[[float], str]


@dataclass(frozen=True)
class Curve:
    """One line: its name, its (step, value) points by rising step, and how it is drawn."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    """Number of a `--c` colour of the style sheet."""
    is_reference: bool = False
    """Dashed: something to compare with, not something learned."""


def number(value: float) -> str:
    """A value for people: three digits, k/M/G for large ones."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def percent(value: float) -> str:
    """A share as percent, with one digit after the point, or two digits that count where it is tiny."""
    text = f"{100 * value:.1f}" if abs(value) >= 0.01 or not value else f"{100 * value:.2g}"
    return f"{text.removesuffix('.0')}\N{NO-BREAK SPACE}%"


def seconds(value: float) -> str:
    """A duration for a plot, in seconds."""
    return f"{number(value)}\N{NO-BREAK SPACE}s"


def duration(value: float) -> str:
    """A duration for a sentence, in the unit that fits it."""
    for unit, size in (("days", 172_800), ("h", 7200), ("min", 120)):
        if abs(value) >= size:
            return f"{value / {'days': 86_400, 'h': 3600, 'min': 60}[unit]:.3g}\N{NO-BREAK SPACE}{unit}"
    return seconds(value)


def ratio(value: float) -> str:
    """How many times as much."""
    return f"{number(value)}\N{MULTIPLICATION SIGN}"


def num_bytes(value: float) -> str:
    """A number of bytes for people."""
    text = number(value)
    digits = text.rstrip("kMGT")
    return f"{digits}\N{NO-BREAK SPACE}{text[len(digits) :]}B"


def card_of(title: str, curves: Sequence[Curve], form: Format = number, *, from_zero: bool = False) -> str:
    """A chart with its title, and a legend that tells the newest values; empty text where no curve has a point."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    legend = "".join(
        f'<span style="--c:var(--c{curve.color})"><i class="{"dash" if curve.is_reference else ""}"></i>'
        f"{escape(curve.name)} <b>{form(curve.points[-1][1])}</b></span>"
        for curve in curves
    )
    chart = plot(curves, form, from_zero=from_zero, title=title)
    return f'<div class="card"><h3>{escape(title)}</h3><div class="legend">{legend}</div>{chart}</div>'


def plot(curves: Sequence[Curve], form: Format = number, *, from_zero: bool = False, title: str = "") -> str:
    """An SVG chart over steps; empty text where no curve has a point. `from_zero` keeps 0 on the axis."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    steps = [step for curve in curves for step, _ in curve.points]
    values = [value for curve in curves for _, value in curve.points]
    top = max(values) or (1.0 if from_zero else 0.0)  # nothing but zeros: on the ground
    ticks = nice_ticks(min(0.0, *values) if from_zero else min(values), top)
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{form(tick)}</text>')
    parts += [
        f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - 9}" text-anchor="middle">{number(tick)}</text>'
        for tick in step_ticks(first, last)
    ]
    # references below, what was learned on top
    for curve in sorted(curves, key=lambda curve: not curve.is_reference):
        parts += _line(curve, x, y, form)
    return "".join(parts) + "</svg>"


def _line(curve: Curve, x: Callable[[float], float], y: Callable[[float], float], form: Format) -> list[str]:
    thin = thinned(curve.points)
    color = f'style="--c:var(--c{curve.color})"'
    parts: list[str] = []
    if len(thin) < len(curve.points):
        upper = [f"{x(step):.1f} {y(top):.1f}" for step, _, _, top in thin]
        lower = [f"{x(step):.1f} {y(bottom):.1f}" for step, _, bottom, _ in reversed(thin)]
        parts.append(f'<path class="range" {color} d="M{"L".join(upper + lower)}Z"/>')
    last_step, last_value = curve.points[-1]
    kind = "line reference" if curve.is_reference else "line"
    path = "L".join(f"{x(step):.1f} {y(mean):.1f}" for step, mean, _, _ in thin)
    tip = f"<title>{escape(curve.name)}: {form(last_value)} at step {last_step:.0f}</title>"
    parts.append(f'<path class="{kind}" {color} d="M{path}">{tip}</path>')
    if not curve.is_reference:
        parts.append(
            f'<circle class="end" {color} cx="{x(last_step):.1f}" cy="{y(thin[-1][1]):.1f}" r="3.5">{tip}</circle>'
        )
    return parts


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """(step, mean, lowest, highest) of at most MAX_POINTS runs of neighbouring points."""
    if not points:
        return []
    size = -(-len(points) // MAX_POINTS)
    thin: list[tuple[float, float, float, float]] = []
    for start in range(0, len(points), size):
        run = points[start : start + size]
        values = [value for _, value in run]
        thin.append((sum(step for step, _ in run) / len(run), sum(values) / len(run), min(values), max(values)))
    return thin


def nice_ticks(low: float, high: float, num: int = 5) -> list[float]:
    """About `num` round values that enclose [low, high]."""
    scale = max(abs(low), abs(high))
    scale = scale if scale > 1e-30 else 1.0
    if high - low < 1e-9 * scale:  # one value: give it room
        low, high = low - 0.1 * scale, high + 0.1 * scale
    rough = (high - low) / (num - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(power * step for step in (1, 2, 2.5, 5, 10) if power * step >= rough * 0.999)
    return [float(f"{n * width:.12g}") for n in range(math.floor(low / width), math.ceil(high / width) + 1)]


def step_ticks(first: float, last: float) -> list[float]:
    """Round steps inside [first, last]."""
    inside = [tick for tick in nice_ticks(first, last, 6) if first <= tick <= last and tick == int(tick)]
    return inside if len(inside) > 1 else [first, last]
