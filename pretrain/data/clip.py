"""Which frames of a video a clip takes and which rectangle of them: pure functions of index record and random numbers.

    record (num_frames, width, height, grid)  +  uniform(seed, epoch, sample, draw, purpose)  ->  ClipPlan

Nothing here opens a video: the plan is complete before a byte is read, so that it is the same on every rank,
with any number of workers, and after a resume (contract C3).

Legend: T frames of a clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import SampleError
from shards.order import uniform

RATE_TOLERANCE = 2e-3
"""29.97 frames/s count as 30."""


@dataclass(frozen=True)
class ClipPlan:
    """What one clip takes from its video."""

    frame_numbers_T: NDArray[np.int32]
    """Ascending, in order of presentation. Repeats only where a short video is looped."""
    stride: int
    """The stride that fitted; with a rate, the usual distance in whole frames."""
    is_dense: bool
    """The frames are closer together in time than was asked for, or repeat: the video is too short or too slow."""
    crop: tuple[int, int, int, int]
    """Top, left, height, width in source pixels."""
    flip: bool


def plan_clip(
    *,
    seed: int,
    epoch: int,
    sample: int,
    draw: int,
    num_frames: int,
    height: int,
    width: int,
    grid: int,
    frames: int,
    stride: int,
    short: str,
    crop_scales: Sequence[float],
    flip: bool,
    rate_hz: float | None = None,
    rate: float = 0.0,
) -> ClipPlan:
    """Draw one clip of a sample. `num_frames`, `height`, `width`, `grid`, `rate` are the facts of its index record.

    With `rate_hz`, frames are taken so many times a second whatever the source, and `stride` is not looked at.
    Raises SampleError("short") for a video with fewer frames than the clip unless `short` is "loop".
    """
    (frames_u,) = uniform(seed, epoch=epoch, sample=sample, draw=draw, purpose="frames", size=1)
    crop_u = uniform(seed, epoch=epoch, sample=sample, draw=draw, purpose="crop", size=3)
    (flip_u,) = uniform(seed, epoch=epoch, sample=sample, draw=draw, purpose="flip", size=1)
    if rate_hz is None:
        frame_numbers_T, used = pick_frames(num_frames, frames, stride, float(frames_u), grid=grid, short=short)
        is_dense = used < stride or num_frames < frames
    else:
        frame_numbers_T, used, is_dense = pick_times(
            num_frames, frames, rate / rate_hz, float(frames_u), grid=grid, short=short
        )
    crop = pick_crop(height - height % 2, width - width % 2, crop_scales, crop_u)
    return ClipPlan(frame_numbers_T, used, is_dense, crop, flip and bool(flip_u < 0.5))


def pick_frames(
    num_frames: int, frames: int, stride: int, u: float, *, grid: int = 0, short: str = "reject"
) -> tuple[NDArray[np.int32], int]:
    """Pick `frames` frame numbers a constant stride apart, at a place drawn by u in [0, 1).

    A span that does not fit lowers the stride to the largest that does. Where the record has a grid of reference frames
    and the stride is a multiple of it, clips start on the grid: the decoder may then skip the frames between.
    Returns (int32 [T], stride used).
    """
    if num_frames < frames:
        if short != "loop" or num_frames < 1:
            raise SampleError("short", f"{num_frames} frames, a clip takes {frames}")
        return np.arange(frames, dtype=np.int32) % np.int32(num_frames), 1
    stride = min(stride, (num_frames - 1) // (frames - 1)) if frames > 1 else stride
    last_start = num_frames - 1 - (frames - 1) * stride
    unit = grid if grid > 0 and stride % grid == 0 else 1
    start = int(u * (last_start // unit + 1)) * unit
    return start + stride * np.arange(frames, dtype=np.int32), stride


def pick_times(
    num_frames: int, frames: int, step: float, u: float, *, grid: int = 0, short: str = "reject"
) -> tuple[NDArray[np.int32], int, bool]:
    """Pick the frames nearest to times a constant `step` (source rate / wanted rate, in frames) apart.

    Frame k is round(start + k step). A step within 0.2 % of a whole number counts as whole and is then a stride
    as in `pick_frames`, on the grid where it is a multiple of it. A span that does not fit lowers the step to the
    largest that does. A step below 1 would show frames twice: it is taken as 1 and the clip runs faster than asked
    for. Returns (int32 [T], distance in whole frames, whether the step was lowered or the source is too slow).
    """
    whole = round(step)
    if abs(step - whole) <= RATE_TOLERANCE * step or step < 1 or num_frames < frames:
        stride = max(whole, 1)
        numbers_T, used = pick_frames(num_frames, frames, stride, u, grid=grid, short=short)
        return numbers_T, used, used < stride or step < 1 - RATE_TOLERANCE or num_frames < frames
    longest = (num_frames - 1) / (frames - 1) if frames > 1 else step
    fitting = min(step, longest)
    last_start = num_frames - 1 - (frames - 1) * fitting
    start = int(u * (math.floor(last_start) + 1))
    numbers_T = np.floor(start + fitting * np.arange(frames) + 0.5).astype(np.int32)
    return np.minimum(numbers_T, num_frames - 1), max(int(fitting), 1), fitting < step


def pick_crop(
    height: int, width: int, scales: Sequence[float], u: Sequence[float] | NDArray[np.float64]
) -> tuple[int, int, int, int]:
    """Pick a crop rectangle (top, left, height, width) of a frame of even size with three numbers in [0, 1).

    The multi-scale crop of VideoMAE (after TSN, Wang et al. 2016): height and width are shares of the short side, at
    most one step apart in the list of scales. The place is uniform, where TSN has 13 places. All four are even, so
    that chroma, of half the size, is cut at whole pixels too. All frames of a clip share one rectangle.
    """
    half_side = min(height, width) / 2
    sides = [max(2, 2 * round(half_side * scale)) for scale in scales]
    pairs = [(rows, columns) for i, rows in enumerate(sides) for j, columns in enumerate(sides) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[int(u[0] * len(pairs))]
    top = 2 * int(u[1] * ((height - crop_height) // 2 + 1))
    left = 2 * int(u[2] * ((width - crop_width) // 2 + 1))
    return top, left, crop_height, crop_width
