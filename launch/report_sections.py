"""The parts of the report about what was learned and how fast: each a piece of HTML, made from what a run folder says.

A part without data says so in a sentence, or is left out.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, cast

from launch.plot import NUM_COLORS, Curve, Format, card_of, num_bytes, number, percent, ratio, seconds
from launch.run_folder import Run
from pretrain.track import GROUPS, Group, Panel, Unit

MAX_PICTURES = 8
MAX_PICTURE_BYTES = 12 << 20
FORMATS: dict[Unit, Format] = {
    "": number,
    "s": seconds,
    "ms": number,
    "bytes": num_bytes,
    "share": percent,
    "ratio": ratio,
}


def learning(run: Run) -> str:
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
    return group("Is it learning?", cards, "No loss was logged yet.")


def pictures(run: Run) -> str:
    """The newest pictures, as far as they fit into a page."""
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


def objectives(run: Run) -> str:
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
    return group("The objectives in detail", cards, "No part of a loss was logged yet.")


def panels(run: Run, title: str, names: Sequence[str], otherwise: str, beside: Sequence[str] = ()) -> str:
    """The panels of some groups of `pretrain.track`, under one heading; `beside`: more cards."""
    cards = [card for name in names for card in _cards(run, GROUPS[name])]
    return group(title, [*cards, *beside], otherwise)


def data(run: Run) -> str:
    """What the loader did between two logged rows, summed over all ranks; and what it had to replace."""
    reasons = dict.fromkeys(key for row in run.rows for key in row if key.startswith("substituted/"))
    names = {name: name.partition("/")[2] for name in reasons}
    replaced = _card(run, Panel("Samples replaced, per row", "", names, is_trouble=True))
    return panels(run, GROUPS["data"].title, ["data"], "Nothing was read yet.", [replaced])


def _cards(run: Run, of: Group) -> Iterator[str]:
    for panel in of.panels:
        yield _card(run, panel)


def _card(run: Run, panel: Panel) -> str:
    curves = [
        Curve(words, run.points(panel.kind, name), color % NUM_COLORS)
        for color, (name, words) in enumerate(panel.names.items())
    ]
    if panel.is_trouble:  # all is well: nothing to draw
        curves = [curve for curve in curves if any(value for _, value in curve.points)]
    return card_of(panel.title, curves, FORMATS[panel.unit], from_zero=True)


def setup(run: Run) -> str:
    """Config and environment, folded."""
    config = table(_flat(run.config)) or "<p>There is no readable config.yaml.</p>"
    environment = table(_flat(run.environment)) or "<p>There is no readable environment.json.</p>"
    return (
        f"<section><h2>What ran</h2><details><summary>Config</summary>{config}</details>"
        f"<details><summary>Versions and machine</summary>{environment}</details></section>"
    )


# ---------------------------------------------------------------------------------------------- pieces


def group(title: str, cards: Sequence[str], otherwise: str) -> str:
    """Cards under a heading; a sentence where there is none."""
    cards = [card for card in cards if card]
    body = f'<div class="cards">{"".join(cards)}</div>' if cards else f"<p>{otherwise}</p>"
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """What a config says in one section; empty where it says nothing."""
    found = config.get(name)
    items = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    return {key: value for key, value in items.items() if value is not None}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in cast(dict[str, Any], value).items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, "" if value is None else json.dumps(value) if isinstance(value, list) else str(value)


def table(pairs: Iterator[tuple[str, str]]) -> str:
    """Names and values; empty where there is none."""
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in pairs if key)
    return f"<table>{rows}</table>" if rows else ""
