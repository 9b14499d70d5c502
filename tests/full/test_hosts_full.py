"""Every launcher for several machines killed once, and every one finishing a run that another began."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.conftest import hosts
from tests.launch.handed_on import assert_same_end, config, hand_on, undisturbed
from tests.launch.hosts import Hosts

__all__ = ["config", "hosts", "undisturbed"]  # fixtures


@pytest.mark.parametrize("forms", [("ssh", "no ssh"), ("no ssh", "torchrun"), ("torchrun", "ssh"), ("ssh",)], ids=str)
def test_handed_on(hosts: Hosts, config: Path, undisturbed: Path, tmp_path: Path, forms: tuple[str, ...]) -> None:
    assert_same_end(hand_on(hosts, config, tmp_path / "run", forms), undisturbed)
