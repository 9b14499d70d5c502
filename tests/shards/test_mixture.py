from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.mixture import CYCLE, Mixture, Phase, quotas

weights = st.lists(st.floats(0.1, 100), min_size=1, max_size=6)


@given(weights=weights)
def test_quotas_fill_a_cycle_by_largest_remainder(weights: list[float]) -> None:
    shares = quotas(weights)
    assert sum(shares) == CYCLE
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - weight / sum(weights) * CYCLE) < 1


@pytest.mark.parametrize("weights", [[1.0, 1e-9], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], []])
def test_a_source_that_would_never_come_is_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match=r"data\.shards"):
        quotas(weights)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**60),
    first=weights.filter(lambda w: len(w) > 1),
    data=st.data(),
)
def test_draws_of_a_source_are_numbered_without_gap_over_changes_of_weight(
    seed: int, first: list[float], data: st.DataObject
) -> None:
    later = data.draw(st.lists(st.floats(0.1, 10), min_size=len(first), max_size=len(first)))
    mixture = Mixture(seed, [Phase(0, quotas(first)), Phase(2, quotas(later))])
    source_K, draw_K = mixture.places(np.arange(4 * CYCLE))
    for source in range(len(first)):
        draws = draw_K[source_K == source]
        assert draws.tolist() == list(range(len(draws)))
        for position in data.draw(st.lists(st.integers(0, 4 * CYCLE - 1), max_size=4)):
            assert mixture.num_draws(source, position) == (source_K[:position] == source).sum()
    for cycle in range(4):
        counts = np.bincount(source_K[cycle * CYCLE : (cycle + 1) * CYCLE], minlength=len(first))
        assert tuple(counts) == quotas(first if cycle < 2 else later)


def test_any_cut_of_the_positions_gives_the_same_places() -> None:
    mixture = Mixture(3, [Phase(0, quotas([1, 2, 3]))])
    whole = mixture.places(np.arange(10_000))
    parts = [mixture.places(np.arange(first, first + 100)) for first in range(0, 10_000, 100)]
    assert np.array_equal(whole[0], np.concatenate([part[0] for part in parts]))
    assert np.array_equal(whole[1], np.concatenate([part[1] for part in parts]))
    far = mixture.places(np.array([10**15 + 7]))
    assert mixture.num_draws(int(far[0][0]), 10**15 + 7) == far[1][0]


def test_slots_of_a_cycle_are_laid_out_anew_each_time() -> None:
    mixture = Mixture(3, [Phase(0, quotas([1, 1]))])
    source_K, _ = mixture.places(np.arange(2 * CYCLE))
    assert not np.array_equal(source_K[:CYCLE], source_K[CYCLE:])
    assert abs(source_K[:100].mean() - 0.5) < 0.2


def test_one_source_is_the_plain_order() -> None:
    source_K, draw_K = Mixture(0, [Phase(0, (CYCLE,))]).places(np.arange(5))
    assert source_K.tolist() == [0] * 5
    assert draw_K.tolist() == [0, 1, 2, 3, 4]
