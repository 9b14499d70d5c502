"""What a person sees: pages in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import INSTALL, Chromium, find
from tests.left_out import leave_out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without its programs these tests are left out, and named at the end; in CI they fail instead."""
    if find() is None:
        mine = [item for item in items if Path(__file__).parent in item.path.parents]
        leave_out(config, items, mine, missing="Chromium", install=INSTALL)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """One headless browser for the pages of a file: it gives itself a higher priority than any test has."""
    running = Chromium(tmp_path_factory.mktemp("browser") / "profile")
    yield running
    running.close()
