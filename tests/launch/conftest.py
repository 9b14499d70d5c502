from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launch.hosts import INSTALL, Hosts, missing_programs
from tests.left_out import leave_out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without its programs these tests are left out, and named at the end; in CI they fail instead."""
    if missing_programs():
        mine = [item for item in items if "hosts" in getattr(item, "fixturenames", ())]
        leave_out(config, items, mine, missing="sshd or pdsh", install=INSTALL)


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
