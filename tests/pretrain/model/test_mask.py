from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.geometry import allowed_counts, visible_cells, visible_counts
from pretrain.model.mask import Mask, num_tube_and_frame_uniforms, tube_and_frame_mask, tube_mask
from shards.errors import UserError


def draw(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(size)


def check_whole(mask: Mask, num_tokens: int) -> None:
    both = np.concatenate([mask.visible_V, mask.masked_M])
    assert mask.visible_V.dtype == mask.masked_M.dtype == mask.whole_M.dtype == np.int64
    assert (np.diff(mask.visible_V) > 0).all()
    assert (np.diff(mask.masked_M) > 0).all()
    assert np.array_equal(np.sort(both), np.arange(num_tokens))  # disjoint and complete
    assert mask.whole_M.shape == mask.masked_M.shape


def test_exact_counts_of_the_published_geometry():
    assert visible_cells(196, 0.9) == 20
    assert visible_cells(196, 0.75) == 49
    assert visible_counts(8, 196, 0.9) == {0: 20, 3: 32, 4: 40, 6: 80, 7: 160}
    assert allowed_counts(8, 196, 0.9, None) == (0, 3, 4)


@pytest.mark.parametrize(
    ("slots", "cells", "ratio", "expected"),
    [
        (4, 16, 0.9, {0: 2, 2: 4, 3: 8}),  # 8 frames of 64
        (8, 49, 0.9, {0: 5, 3: 8, 4: 10, 6: 20, 7: 40}),  # 16 frames of 112
        (8, 36, 0.9, {0: 4, 4: 8, 6: 16, 7: 32}),  # 16 frames of 96
        (8, 16, 0.75, {0: 4, 4: 8, 6: 16}),  # m = 7 would need 32 cells of 16
        (1, 4, 0.5, {0: 2}),
    ],
)
def test_exact_counts_of_small_geometries(slots: int, cells: int, ratio: float, expected: dict[int, int]):
    assert visible_counts(slots, cells, ratio) == expected


@settings(max_examples=150, deadline=None)
@given(
    slots=st.integers(1, 16),
    cells=st.integers(1, 64),
    ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_masks_are_sorted_disjoint_complete_and_of_one_size(slots: int, cells: int, ratio: float, seed: int):
    num_shown = visible_cells(cells, ratio)
    tube = tube_mask(draw(cells, seed), slots=slots, cells=cells, num_shown=num_shown)
    check_whole(tube, slots * cells)
    assert len(tube.visible_V) == slots * num_shown
    assert not tube.whole_M.any()
    assert np.array_equal(tube.visible_V.reshape(slots, -1) % cells, np.tile(tube.visible_V[:num_shown], (slots, 1)))

    for m, shown in visible_counts(slots, cells, ratio).items():
        uniform = draw(num_tube_and_frame_uniforms(cells), seed)
        mask = tube_and_frame_mask(uniform, slots=slots, cells=cells, mask_ratio=ratio, allowed=(m,))
        check_whole(mask, slots * cells)
        assert len(mask.visible_V) == slots * num_shown
        seen = np.unique(mask.visible_V // cells)
        hidden = np.setdiff1d(np.arange(slots), seen)
        assert len(hidden) == m
        if m:
            assert np.array_equal(hidden, np.arange(hidden[0], hidden[0] + m))  # one run
        per_slot = (mask.visible_V % cells).reshape(len(seen), shown)
        assert (per_slot == per_slot[0]).all()  # the same cells in each
        assert np.array_equal(mask.whole_M == 1, np.isin(mask.masked_M // cells, hidden))


def test_every_allowed_value_and_every_run_is_drawn_evenly():
    counts: dict[tuple[int, int], int] = {}
    num_draws = 6000
    uniforms = np.random.default_rng(0).random((num_draws, num_tube_and_frame_uniforms(196)))
    for uniform in uniforms:
        mask = tube_and_frame_mask(uniform, slots=8, cells=196, mask_ratio=0.9, allowed=(0, 3, 4))
        hidden = np.setdiff1d(np.arange(8), mask.visible_V // 196)
        key = (len(hidden), int(hidden[0]) if len(hidden) else 0)
        counts[key] = counts.get(key, 0) + 1
    expected = {(0, 0): 1 / 3} | {(3, s): 1 / 18 for s in range(6)} | {(4, s): 1 / 15 for s in range(5)}
    assert counts.keys() == expected.keys()
    chi_square = sum((counts[k] - num_draws * p) ** 2 / (num_draws * p) for k, p in expected.items())
    assert chi_square < 2 * (len(expected) - 1)


def test_cells_are_drawn_evenly():
    num_draws = 4000
    uniforms = np.random.default_rng(1).random((num_draws, 36))
    seen = np.zeros(36)
    for uniform in uniforms:
        seen[tube_mask(uniform, slots=1, cells=36, num_shown=4).visible_V] += 1
    expected = num_draws * 4 / 36
    assert ((seen - expected) ** 2 / expected).sum() < 2 * 35


def test_the_largest_uniform_number_stays_inside():
    uniform = np.full(num_tube_and_frame_uniforms(49), 1 - 2.0**-53)
    mask = tube_and_frame_mask(uniform, slots=8, cells=49, mask_ratio=0.9, allowed=(0, 3, 4))
    check_whole(mask, 8 * 49)
    assert np.array_equal(np.unique(mask.visible_V // 49), np.arange(4))  # m = 4, the last run


@pytest.mark.parametrize(("asked", "nearest"), [((1,), 0), ((2,), 3), ((0, 5), 4), ((8,), 7), ((-1,), 0)])
def test_counts_that_are_not_exact_are_refused_naming_the_nearest(asked: tuple[int, ...], nearest: int):
    with pytest.raises(UserError) as caught:
        allowed_counts(8, 196, 0.9, asked)
    wrong = next(m for m in asked if m not in (0, 3, 4, 6, 7))
    assert str(caught.value).startswith(f"objective.masked_frame.num_frames_masked is {wrong}; it must ")
    assert str(caught.value).endswith(f": use {nearest}")


def test_asked_for_counts_are_taken_once_each():
    assert allowed_counts(8, 196, 0.9, (4, 0, 4)) == (0, 4)


def test_masks_that_hide_nothing_are_refused():
    with pytest.raises(UserError, match=r"objective\.masked_frame\.mask_ratio is 0\.2; it must hide at least one"):
        allowed_counts(4, 4, 0.2, None)
    with pytest.raises(UserError, match=r"num_frames_masked is empty; .*: use \[0\]"):
        allowed_counts(4, 4, 0.5, ())


def test_the_remedy_for_the_ratio_works():
    for cells in range(2, 200):
        with pytest.raises(UserError) as caught:
            allowed_counts(4, cells, 1e-6, None)
        remedy = float(str(caught.value).rsplit(" ", 1)[1])
        assert allowed_counts(4, cells, remedy, None)
