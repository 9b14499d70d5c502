from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.slow
def test_every_rank_gets_every_ranks_numbers_in_their_order(ranks: Any) -> None:
    expected = [{"wait_s": 0.1}, {"wait_s": 1.1, "substituted/reason 0": 0}]
    assert ranks(2).run("gather_numbers") == [expected, expected]
