"""Ten kills at random moments, in every test run; `make soak` does a hundred."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.soak import soak

pytestmark = pytest.mark.slow


def test_ten_kills_cost_nothing_but_time(tmp_path: Path, packed: Path) -> None:
    seed = int.from_bytes(os.urandom(4))
    result = soak(tmp_path, packed, kills=10, ranks=1, moments=random.Random(seed))
    assert result.is_good, f"seed {seed}: {result.to_json()} {result.audit}"
    assert result.num_kills == 10
