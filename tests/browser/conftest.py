"""What a person sees: pages in a real browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import INSTALL, Chromium, find

LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where there is no Chromium these tests are left out, and named at the end; in CI they fail instead."""
    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    if mine and find() is None and os.environ.get("CI") != "true":
        items[:] = [item for item in items if item not in mine]
        config.hook.pytest_deselected(items=mine)
        config.stash[LEFT_OUT] = [item.nodeid for item in mine]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    names = config.stash.get(LEFT_OUT, [])
    if names:
        terminalreporter.section("left out: there is no Chromium")
        terminalreporter.write_line(f"To run them as well, as root: {INSTALL}")
        for name in names:
            terminalreporter.write_line(f"  {name}")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """One headless browser for the whole session."""
    running = Chromium(tmp_path_factory.mktemp("browser") / "profile")
    yield running
    running.close()
