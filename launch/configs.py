"""`tubelet config`: every key with its value, where the value comes from, and what it means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from pretrain.config import help_text, keys, load_config, value_of

EXAMPLE = (
    "run.dir=runs/NAME",
    "data.shards=data/NAME",
    "objective.masked_frame.weight=1.0",
    "train.steps=1000",
    "train.global_batch=256",
    "optim.lr=1.5e-4",
)
"""What has no default; only for showing the keys where no config is given."""


@dataclass(frozen=True)
class Row:
    """One key."""

    key: str
    value: Any
    origin: str
    meaning: str

    def line(self) -> str:
        """For a terminal: the value first, the meaning below it."""
        return f"{self.key} = {self.value}  ({self.origin})" + (f"\n    {self.meaning}" if self.meaning else "")


def describe(path: Path | None, overrides: Sequence[str]) -> list[Row]:
    """All keys in the order of the file. Raises `UserError` for a config with problems."""
    given = _names(overrides)
    if path is None:
        config = load_config(None, [*EXAMPLE, *overrides])
        written, examples = set[str](), _names(EXAMPLE)
    else:
        config = load_config(path, overrides)
        written, examples = set(_leaves(yaml.safe_load(path.read_text()) or {})), set[str]()
    rows: list[Row] = []
    for key in keys():
        origin = "default"
        if key in given:
            origin = "command line"
        elif key in examples:
            origin = "an example: it has no default"
        elif key in written:
            origin = str(path)
        rows.append(Row(key, value_of(config, key), origin, help_text(key)))
    return rows


def _names(overrides: Iterable[str]) -> set[str]:
    return {override.partition("=")[0] for override in overrides}


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += _leaves(cast(dict[str, Any], value), f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found
