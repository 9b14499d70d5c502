"""What the first videos of a run look like to a decoder: from the index alone, read, and packed anew for a trial.

Legend: P videos looked at in the index, V videos read, T frames of a clip.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.config import Config
from pretrain.data.clip import ClipPlan, plan_clip
from pretrain.data.decode import VideoFacts
from pretrain.data.pool import Request
from shards.dataset import DataSet
from shards.encode import Encoding, Sample, encode_file
from shards.errors import SampleError, UserError
from shards.probe import Limits, Rejected, probe

NUM_LOOKED_AT = 1000
MOST_REPACKED, FEWEST_REPACKED = 4, 2
LONGEST_REPACKED = 900
"""Frames of a video that is worth packing anew for a trial."""
PACKED_SIDE = 256
LARGE = 1.5
"""A short side this many times that of packing costs noticeably more."""
USUAL_MAX_FRAMES = 128
_FACT_NAMES = ("num_frames", "height", "width", "grid", "matrix", "full_range")

Place = tuple[int, int]
"""Epoch and sample of a position."""


@dataclass(frozen=True)
class Census:
    """What the index says of the first P videos of the run and of the clips that are cut from them."""

    num_videos: int
    num_too_short: int
    """With fewer frames than a clip."""
    skipping: float
    """Share whose clips let the decoder skip the frames between."""
    irregular: float
    """Share without any grid of reference frames."""
    misfit_grid: int
    """Grid of most of those that are not skipped (0: irregular, or there are none)."""
    stride: int
    """That clips are cut with: the median."""
    lowered: float
    """Share whose frames are closer together than asked for: too short, or too slow."""
    span: int
    """Median of the frames that a clip spans."""
    num_frames: int
    """Median of a video, as the next two."""
    short_side: int
    bytes_per_clip: float


@dataclass(frozen=True)
class Video:
    """A video that was read, and what one position of the run wants of it."""

    place: Place
    request: Request
    span: int
    stride: int
    """That its first clip is cut with."""
    rate: float

    @property
    def skips(self) -> bool:
        """Whether the decoder may skip the frames between those that are wanted."""
        grid = self.request.facts.grid
        return grid > 0 and not (self.request.frame_numbers % grid).any()


def take_census(config: Config, dataset: DataSet) -> tuple[Census, list[Place]]:
    """Look at the records of the first videos of the run. Also returns the places that have clips.

    Raises UserError if none has.
    """
    num_looked_at = min(NUM_LOOKED_AT, dataset.num_samples)
    epoch_P, sample_P = dataset.places(np.arange(num_looked_at))
    places: list[Place] = []
    rows: list[dict[str, float]] = []
    misfits: Counter[int] = Counter()
    for place in zip(epoch_P.tolist(), sample_P.tolist(), strict=True):
        record = dataset.record(place[1])
        try:
            plan = plan_of(config, record, place, draw=0)
        except SampleError:
            continue
        grid = int(record["grid"])
        skips = grid > 0 and not (plan.frame_numbers_T % grid).any()
        if not skips:
            misfits[grid] += 1
        places.append(place)
        rows.append(
            {
                "skips": skips,
                "stride": plan.stride,
                "lowered": plan.is_dense,
                "span": _span(plan.frame_numbers_T),
                "num_frames": int(record["num_frames"]),
                "short_side": min(int(record["height"]), int(record["width"])),
                "size": int(record["size"]),
            }
        )
    if not rows:
        raise UserError(
            f"data.frames is {config.data.frames}; none of the first {num_looked_at} samples has so many: "
            "take fewer frames"
        )

    def middle(name: str) -> int:
        return round(median(row[name] for row in rows))

    census = Census(
        num_videos=num_looked_at,
        num_too_short=num_looked_at - len(rows),
        skipping=mean(row["skips"] for row in rows),
        irregular=misfits[0] / len(rows),
        misfit_grid=misfits.most_common(1)[0][0] if misfits else 0,
        stride=middle("stride"),
        lowered=mean(row["lowered"] for row in rows),
        span=middle("span"),
        num_frames=middle("num_frames"),
        short_side=middle("short_side"),
        bytes_per_clip=mean(row["size"] for row in rows) / config.data.clips_per_video,
    )
    return census, places


def plan_of(config: Config, record: Any, place: Place, *, draw: int) -> ClipPlan:
    """The clip that training cuts. Raises SampleError where there is none."""
    data, (epoch, sample) = config.data, place
    return plan_clip(
        seed=config.run.seed,
        epoch=epoch,
        sample=sample,
        draw=draw,
        num_frames=int(record["num_frames"]),
        height=int(record["height"]),
        width=int(record["width"]),
        grid=int(record["grid"]),
        frames=data.frames,
        stride=data.stride,
        short=data.short,
        crop_scales=data.crop_scales,
        flip=data.flip,
        rate_hz=data.rate_hz,
        rate=float(record["rate"]),
    )


def read_video(config: Config, dataset: DataSet, place: Place) -> Video:
    """Read a video. Raises SampleError if it cannot be had."""
    (content,) = dataset.read_group([place[1]])
    if isinstance(content, SampleError):
        raise content
    return _video(config, place, content, dataset.record(place[1]))


def _video(config: Config, place: Place, content: bytes, record: Any) -> Video:
    clips = [plan_of(config, record, place, draw=draw) for draw in range(config.data.clips_per_video)]
    facts = VideoFacts(**{name: int(record[name]) for name in _FACT_NAMES})
    numbers_U = np.unique(np.concatenate([clip.frame_numbers_T for clip in clips]))
    span = round(median(_span(clip.frame_numbers_T) for clip in clips))
    return Video(place, Request(content, numbers_U, facts), span, clips[0].stride, float(record["rate"]))


def _span(numbers_T: NDArray[np.int32]) -> int:
    return int(numbers_T[-1] - numbers_T[0]) + 1


def packed_anew(config: Config, videos: Sequence[Video], limit_s: float) -> Iterator[tuple[int, Video]]:
    """Encode a few of the videos for this config, in memory: (its number, the first piece of it).

    Only those that could gain: that make the decoder decode every frame, or are much larger than packing leaves them.
    """
    end_s = time.monotonic() + limit_s
    num_done = 0
    for number, video in enumerate(videos):
        facts = video.request.facts
        is_large = min(facts.height, facts.width) > LARGE * max(PACKED_SIDE, config.data.size)
        if (video.skips and not is_large) or facts.num_frames > LONGEST_REPACKED:
            continue
        if num_done == MOST_REPACKED or (num_done >= FEWEST_REPACKED and time.monotonic() > end_s):
            return
        encoding = Encoding(
            short_side=max(PACKED_SIDE, config.data.size),
            max_frames=max(USUAL_MAX_FRAMES, 2 * video.span),
            max_rate=max(30.0, video.rate),  # the same span of time, or the clips would not be the same
            stride=video.stride,
            min_frames=config.data.frames,
            for_rate=config.data.rate_hz,
        )
        try:
            sample = _first_piece(video.request.video, encoding)
            record = {name: getattr(sample, name) for name in (*_FACT_NAMES, "rate")}
            yield number, _video(config, video.place, sample.video, record)
        except (Rejected, SampleError):
            continue
        num_done += 1


def _first_piece(video: bytes, encoding: Encoding) -> Sample:
    with tempfile.TemporaryDirectory(prefix="tubelet-bench-") as folder:
        path = Path(folder) / "video"
        path.write_bytes(video)
        limits = Limits()
        facts = probe(path, limits, lambda _frame, _number: None)
        return next(encode_file(path, facts, encoding, limits, lambda: None))
