"""C10 in full: every world, stage, offload and micro batch, against one rank without sharding. `make test-full`.

Result of the last run: RESULTS.md beside this file.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.dist.conftest import ranks  # noqa: F401  # a fixture
from tests.dist.test_parity import check_split, reference  # noqa: F401  # a fixture

PRODUCT = [
    (world, stage, micro_batch, offload)
    for world, stage, micro_batch, offload in itertools.product((1, 2, 3, 4), (0, 1, 2, 3), range(1, 7), (False, True))
    if stage or not offload
]


@pytest.mark.parametrize(("world", "stage", "micro_batch", "offload"), PRODUCT)
def test_every_split(
    ranks: Any,  # noqa: F811
    tmp_path: Path,
    reference: Any,  # noqa: F811
    world: int,
    stage: int,
    micro_batch: int,
    offload: bool,
) -> None:
    check_split(ranks(world), tmp_path, reference, stage=stage, micro_batch=micro_batch, offload=offload)
