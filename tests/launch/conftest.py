from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.launch.hosts import INSTALL, Hosts, missing_programs

LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where sshd or pdsh is not installed its tests are left out, and named at the end; in CI they fail instead."""
    mine = [item for item in items if "hosts" in getattr(item, "fixturenames", ())]
    if mine and missing_programs() and os.environ.get("CI") != "true":
        items[:] = [item for item in items if item not in mine]
        config.hook.pytest_deselected(items=mine)
        config.stash[LEFT_OUT] = [item.nodeid for item in mine]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    names = config.stash.get(LEFT_OUT, [])
    if names:
        terminalreporter.section("left out: sshd or pdsh is not installed")
        terminalreporter.write_line(f"To run them as well, as root: {INSTALL}")
        for name in names:
            terminalreporter.write_line(f"  {name}")


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts behind a real sshd, for the whole session."""
    assert not missing_programs(), f"{missing_programs()} not found: {INSTALL}"
    two = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        two.start()
        yield two
    finally:
        two.stop()
