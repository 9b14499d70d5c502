"""Tests that need a program which is not installed: left out and named at the end; in CI they fail instead."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

LEFT_OUT = pytest.StashKey[list[str]]()


def leave_out(
    config: pytest.Config, items: list[pytest.Item], mine: Sequence[pytest.Item], *, missing: str, install: str
) -> None:
    """Deselect `mine`, and remember what to say; nothing where CI must have everything."""
    if not mine or os.environ.get("CI") == "true":
        return
    items[:] = [item for item in items if item not in mine]
    config.hook.pytest_deselected(items=list(mine))
    told = [f"{missing} is not installed. To run these as well, as root: {install}"]
    config.stash.setdefault(LEFT_OUT, []).extend(told + [f"  {item.nodeid}" for item in mine])


def forget_doubles(lines: Sequence[str]) -> list[str]:
    """Each line once: several workers leave out the same tests."""
    return list(dict.fromkeys(lines))
