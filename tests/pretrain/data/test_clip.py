from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.clip import RATE_TOLERANCE, ClipPlan, pick_crop, pick_frames, pick_times, plan_clip
from shards.errors import SampleError

SCALES = (1.0, 0.875, 0.75, 0.66)
unit = st.floats(0, 1, exclude_max=True)


@given(
    num_frames=st.integers(1, 300),
    frames=st.integers(2, 32),
    stride=st.integers(1, 9),
    u=unit,
    grid=st.sampled_from([0, 1, 2, 4]),
)
def test_frames_fit_the_video_a_constant_stride_apart(
    num_frames: int, frames: int, stride: int, u: float, grid: int
) -> None:
    if num_frames < frames:
        with pytest.raises(SampleError) as caught:
            pick_frames(num_frames, frames, stride, u, grid=grid)
        assert caught.value.reason == "short"
        return
    numbers_T, used = pick_frames(num_frames, frames, stride, u, grid=grid)
    assert numbers_T.dtype == np.int32
    assert (np.diff(numbers_T) == used).all()
    assert numbers_T[0] >= 0
    assert numbers_T[-1] < num_frames
    assert used == max(s for s in range(1, stride + 1) if (frames - 1) * s < num_frames)
    if grid and used % grid == 0:
        assert (numbers_T % grid == 0).all()


def test_every_start_is_reached_and_none_beyond() -> None:
    starts = {int(pick_frames(20, 4, 4, u)[0][0]) for u in np.linspace(0, 1, 1000, endpoint=False)}
    assert starts == set(range(8))
    on_grid = {int(pick_frames(20, 4, 4, u, grid=4)[0][0]) for u in np.linspace(0, 1, 1000, endpoint=False)}
    assert on_grid == {0, 4}


def test_a_short_video_loops_only_when_asked() -> None:
    numbers_T, used = pick_frames(3, 8, 4, 0.9, short="loop")
    assert numbers_T.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert used == 1
    with pytest.raises(SampleError):
        pick_frames(0, 8, 4, 0.9, short="loop")


def even(half: int) -> int:
    return 2 * half


@given(height=st.integers(1, 200).map(even), width=st.integers(1, 200).map(even), u=st.tuples(unit, unit, unit))
def test_crops_lie_inside_and_have_sides_from_the_list(height: int, width: int, u: tuple[float, float, float]) -> None:
    top, left, crop_height, crop_width = pick_crop(height, width, SCALES, u)
    sides = [max(2, 2 * round(min(height, width) / 2 * scale)) for scale in SCALES]
    assert not any(edge % 2 for edge in (top, left, crop_height, crop_width))
    assert crop_height in sides
    assert crop_width in sides
    assert 0 <= top <= top + crop_height <= height
    assert 0 <= left <= left + crop_width <= width


def test_crop_sides_are_at_most_one_step_apart() -> None:
    seen = {pick_crop(100, 100, SCALES, (u, 0.0, 0.0))[2:] for u in np.linspace(0, 1, 500, endpoint=False)}
    sides = [100, 88, 76, 66]
    assert seen == {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}


def test_a_plan_depends_on_each_of_its_keys() -> None:
    def plan(**changes: Any) -> ClipPlan:
        keys: dict[str, Any] = {"seed": 1, "epoch": 2, "sample": 3, "draw": 0}
        shape: dict[str, Any] = {"num_frames": 5000, "height": 721, "width": 1281, "grid": 0}
        wanted: dict[str, Any] = {"frames": 8, "stride": 2, "short": "reject", "crop_scales": SCALES, "flip": True}
        return plan_clip(**{**keys, **shape, **wanted, **changes})

    first, again = plan(), plan()
    assert first.crop == again.crop
    assert first.frame_numbers_T.tolist() == again.frame_numbers_T.tolist()
    for change in ({"seed": 2}, {"epoch": 3}, {"sample": 4}, {"draw": 1}):
        other = plan(**change)
        assert other.frame_numbers_T[0] != first.frame_numbers_T[0]
        assert other.crop != first.crop
    flips = [plan(sample=sample).flip for sample in range(400)]
    assert 150 < sum(flips) < 250
    assert not any(plan(sample=sample, flip=False).flip for sample in range(50))


@given(
    num_frames=st.integers(16, 400),
    frames=st.integers(2, 16),
    step=st.floats(0.2, 12.0),
    u=unit,
    grid=st.integers(0, 8),
)
def test_frames_by_time_are_the_nearest_ones_and_none_comes_twice(
    num_frames: int, frames: int, step: float, u: float, grid: int
) -> None:
    numbers_T, used, is_dense = pick_times(num_frames, frames, step, u, grid=grid)
    assert numbers_T.dtype == np.int32
    assert len(numbers_T) == frames
    assert (np.diff(numbers_T) > 0).all()
    assert numbers_T[0] >= 0
    assert numbers_T[-1] < num_frames
    fits = (frames - 1) * max(step, 1.0) <= num_frames - 1
    if fits and step >= 1:
        slack = 0.5 + (frames - 1) * RATE_TOLERANCE * step + 1e-6
        assert np.abs(numbers_T - numbers_T[0] - step * np.arange(frames)).max() <= slack
        assert not is_dense
    if step < 1 - RATE_TOLERANCE:
        assert is_dense
        assert (np.diff(numbers_T) == 1).all()
    if is_dense:
        assert not fits or step < 1
    assert used >= 1


@pytest.mark.parametrize(
    ("rate", "rate_hz", "grid", "stride"),
    [(24, 4, 6, 6), (28, 4, 7, 7), (30, 5, 6, 6), (30000 / 1001, 5, 6, 6), (24000 / 1001, 4, 6, 6), (28, 2, 7, 14)],
)
def test_a_rate_that_the_packing_knew_stays_on_the_grid(rate: float, rate_hz: float, grid: int, stride: int) -> None:
    for u in np.linspace(0, 1, 50, endpoint=False):
        numbers_T, used, is_dense = pick_times(400, 16, float(np.float32(rate)) / rate_hz, u, grid=grid)
        assert (numbers_T % grid == 0).all()
        assert (np.diff(numbers_T) == stride).all()
        assert (used, is_dense) == (stride, False)


@pytest.mark.parametrize("rate", [10.0, 15.0, 23.976, 25.0, 29.97, 50.0, 59.94])
def test_a_rate_is_kept_whatever_the_source(rate: float) -> None:
    numbers_T, _, is_dense = pick_times(3000, 16, rate / 4, 0.37)
    times_s = (numbers_T - numbers_T[0]) / rate
    assert np.abs(times_s - np.arange(16) / 4).max() <= 0.5 / rate + 16 / 4 * RATE_TOLERANCE
    assert not is_dense


def test_too_slow_or_too_short_for_a_rate_is_said() -> None:
    slow_T, used, is_dense = pick_times(100, 8, 3.0 / 4.0, 0.5)
    assert (np.diff(slow_T) == 1).all()
    assert (used, is_dense) == (1, True)
    short_T, _, is_dense = pick_times(50, 16, 6.25, 0.9)
    assert short_T[-1] == 49
    assert is_dense
    assert pick_times(5, 8, 6.25, 0.9, short="loop")[2]
    with pytest.raises(SampleError):
        pick_times(5, 8, 6.25, 0.9)


def test_a_plan_by_rate_does_not_look_at_the_stride() -> None:
    shape: dict[str, Any] = {"num_frames": 500, "height": 64, "width": 64, "grid": 0, "short": "reject", "flip": False}
    keys: dict[str, Any] = {"seed": 1, "epoch": 0, "sample": 0, "draw": 0, "crop_scales": SCALES, "frames": 8}
    plans = [plan_clip(**keys, **shape, stride=stride, rate_hz=4.0, rate=25.0) for stride in (1, 4)]
    assert plans[0].frame_numbers_T.tolist() == plans[1].frame_numbers_T.tolist()
    assert np.diff(plans[0].frame_numbers_T).tolist() in (
        [6, 6, 6, 7, 6, 6, 6],
        [6, 7, 6, 6, 6, 7, 6],
        [6, 7, 6, 6, 6, 7, 6],
    )
    assert not plans[0].is_dense
    assert plan_clip(**keys, **shape, stride=100).is_dense
