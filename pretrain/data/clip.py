"""Which frames of a video a clip takes and which rectangle of them: pure functions of index record and random numbers.

    record (num_frames, width, height, grid)  +  uniform(seed, epoch, sample, draw, purpose)  ->  ClipPlan

Nothing here opens a video: the plan is complete before a byte is read, so that it is the same on every rank,
with any number of workers, and after a resume (contract C3).

Legend: T frames of a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import SampleError
from shards.order import uniform


@dataclass(frozen=True)
class ClipPlan:
    """What one clip takes from its video."""

    frame_numbers_T: NDArray[np.int32]
    """Ascending, in order of presentation. Repeats only where a short video is looped."""
    stride: int
    """The stride that fitted."""
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
) -> ClipPlan:
    """Draw one clip of a sample. `num_frames`, `height`, `width`, `grid` are the facts of its index record.

    Raises SampleError("short") for a video with fewer frames than the clip unless `short` is "loop".
    """
    (frames_u,) = uniform(seed, epoch=epoch, sample=sample, draw=draw, purpose="frames", size=1)
    crop_u = uniform(seed, epoch=epoch, sample=sample, draw=draw, purpose="crop", size=3)
    (flip_u,) = uniform(seed, epoch=epoch, sample=sample, draw=draw, purpose="flip", size=1)
    frame_numbers_T, stride = pick_frames(num_frames, frames, stride, float(frames_u), grid=grid, short=short)
    crop = pick_crop(height - height % 2, width - width % 2, crop_scales, crop_u)
    return ClipPlan(frame_numbers_T, stride, crop, flip and bool(flip_u < 0.5))


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


def pick_crop(
    height: int, width: int, scales: Sequence[float], u: Sequence[float] | NDArray[np.float64]
) -> tuple[int, int, int, int]:
    """Pick a crop rectangle (top, left, height, width) with three numbers in [0, 1).

    The multi-scale crop of VideoMAE (after TSN, Wang et al. 2016): height and width are shares of the short side, at
    most one step apart in the list of scales. The place is uniform over all whole pixels, where TSN has 13
    places. All clips of T frames share one rectangle.
    """
    short_side = min(height, width)
    sides = [max(1, round(short_side * scale)) for scale in scales]
    pairs = [(rows, columns) for i, rows in enumerate(sides) for j, columns in enumerate(sides) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[int(u[0] * len(pairs))]
    top = int(u[1] * (height - crop_height + 1))
    left = int(u[2] * (width - crop_width + 1))
    return top, left, crop_height, crop_width
