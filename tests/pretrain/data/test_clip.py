from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.clip import ClipPlan, pick_crop, pick_frames, plan_clip
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


@given(height=st.integers(2, 400), width=st.integers(2, 400), u=st.tuples(unit, unit, unit))
def test_crops_lie_inside_and_have_sides_from_the_list(height: int, width: int, u: tuple[float, float, float]) -> None:
    top, left, crop_height, crop_width = pick_crop(height, width, SCALES, u)
    sides = [max(1, round(min(height, width) * scale)) for scale in SCALES]
    assert crop_height in sides
    assert crop_width in sides
    assert 0 <= top <= top + crop_height <= height
    assert 0 <= left <= left + crop_width <= width


def test_crop_sides_are_at_most_one_step_apart() -> None:
    seen = {pick_crop(100, 100, SCALES, (u, 0.0, 0.0))[2:] for u in np.linspace(0, 1, 500, endpoint=False)}
    sides = [100, 88, 75, 66]
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
