"""`tubelet bench decode CONFIG`: what a clip of the user's own data costs a decoder, and what would make it cheaper.

    first videos of the run ─ clips (bench_clips.py, as in training) ─ bytes, read beforehand
        ─ every decoder, and a few videos packed anew, in turns ─ CPU ms per clip ─ what to change

Decoding happens in the killable worker that training uses; measured is the CPU time of that process.

Legend: R repeats, V videos.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.bench import (
    NUM_REPEATS,
    Advice,
    Progress,
    Spread,
    advice_lines,
    cpu_s,
    cpu_used_s,
    gain,
    load_lines,
    num_bytes,
    num_cores,
    others_load,
    short,
)
from launch.bench_clips import Census, Place, Video, packed_anew, read_video, take_census
from pretrain.config import Config
from pretrain.data.decode import check_decoder
from pretrain.data.pool import DecoderPool, Request
from pretrain.data.source import open_dataset
from pretrain.sections import DataConfig
from shards.dataset import DataSet
from shards.errors import SampleError, UserError

DECODERS = ("pyav", "decord")
REPACKED = "repacked"
MOST_VIDEOS, FEWEST_VIDEOS = 48, 4
WARM_UP_SHARE, REPACK_SHARE = 0.2, 0.25
LONG = 4
"""A sample with this many times the frames that a clip spans is mostly read for nothing."""


@dataclass(frozen=True)
class Cost:
    """What decoding costs."""

    clips_per_s: Spread
    """Of one core: one value per repeat."""
    ms_median: float
    """CPU milliseconds per clip, of the median video."""
    ms_p90: float
    """Nine of ten videos are cheaper."""
    num_videos: int

    @staticmethod
    def of(times_RV: NDArray[np.float64], clips_per_video: int) -> Cost:
        """From CPU milliseconds per video; nan where it failed."""
        per_clip_RV = times_RV / clips_per_video
        per_video_V = np.nanmedian(per_clip_RV, axis=0)
        rates = tuple((1000 / np.nanmean(per_clip_RV, axis=1)).tolist())
        return Cost(
            Spread(rates), float(np.nanmedian(per_video_V)), float(np.nanquantile(per_video_V, 0.9)), len(per_video_V)
        )

    def to_json(self) -> dict[str, Any]:
        """For a machine."""
        return {**asdict(self), "clips_per_s": self.clips_per_s.to_json()}


@dataclass(frozen=True)
class Trial:
    """A few videos packed anew for this config, beside the same videos as they are, both decoded by PyAV."""

    before: Cost
    after: Cost
    bytes_ratio: float
    """Bytes per second of video: after / before."""

    def to_json(self) -> dict[str, Any]:
        """For a machine."""
        return {"before": self.before.to_json(), "after": self.after.to_json(), "bytes_ratio": self.bytes_ratio}


@dataclass(frozen=True)
class DecodeResult:
    """Everything that `bench decode` found."""

    data: DataConfig
    num_samples: int
    census: Census
    costs: dict[str, Cost]
    """By decoder, the config's first."""
    trial: Trial | None
    failures: dict[str, int]
    """Videos that could not be used, by reason."""
    load: float
    """Of the machine, per core, before the measurement."""

    def advice(self) -> list[Advice]:
        """What to change, as far as the figures support it."""
        found = (self._repack(), self._other_decoder(), self._shorter_samples())
        return [advice for advice in found if advice is not None]

    def _repack(self) -> Advice | None:
        if self.trial is None:
            return None
        times = gain(self.trial.after.clips_per_s, self.trial.before.clips_per_s)
        if times is None:
            return None
        census, misfit = self.census, 1 - self.census.skipping
        if not misfit:
            why = f"the short side is {census.short_side} pixels, clips are {self.data.size}"
        elif census.misfit_grid:
            why = f"grid {census.misfit_grid} does not fit stride {census.stride} in {misfit:.0%} of the samples"
        else:
            why = f"{census.irregular:.0%} of the samples have no grid to skip on (made by others?)"
        rate_hz = self.data.rate_hz
        grid = f"--stride {census.stride}" if rate_hz is None else f"--for-rate {rate_hz:g}"
        return Advice(
            f"tubelet pack SRC DST --preset train {grid}",
            f"{why}; {self.trial.after.num_videos} packed anew decode {times:.1f}x faster, "
            f"with {self.trial.bytes_ratio:.1f}x the bytes",
        )

    def _other_decoder(self) -> Advice | None:
        ours = self.costs[self.data.decoder].clips_per_s
        for name, cost in self.costs.items():
            times = gain(cost.clips_per_s, ours) if name != self.data.decoder else None
            if times is not None:
                caution = "; it can hang, and is killed then" if name == "decord" else ""
                return Advice(f"data.decoder={name}", f"{name} measures {times:.1f}x faster here{caution}")
        return None

    def _shorter_samples(self) -> Advice | None:
        census = self.census
        if census.num_frames < LONG * census.span * self.data.clips_per_video:
            return None
        share = census.span * self.data.clips_per_video / census.num_frames
        return Advice(
            f"tubelet pack SRC DST --max-frames {2 * census.span}   (or more data.clips_per_video)",
            f"{share:.0%} of the frames that are read are used: a clip spans {census.span} of {census.num_frames}",
        )

    def to_json(self) -> dict[str, Any]:
        """For a machine."""
        return {
            "num_samples": self.num_samples,
            "num_cores": num_cores(),
            "index": asdict(self.census),
            "decoders": {name: cost.to_json() for name, cost in self.costs.items()},
            "repacked": None if self.trial is None else self.trial.to_json(),
            "failures": self.failures,
            "load_per_core_before": self.load,
            "advice": [advice.to_json() for advice in self.advice()],
        }

    def lines(self) -> list[str]:
        """For a person."""
        data, census, ours = self.data, self.census, self.costs[self.data.decoder]
        pace = f"stride {data.stride}" if data.rate_hz is None else f"{data.rate_hz:g} a second"
        lines = [
            f"data      {', '.join(source.url for source in data.sources)}, split {data.split}: "
            f"{self.num_samples:,} samples",
            f"clips     {data.frames} frames, {pace}; {ours.num_videos} videos x {data.clips_per_video} clips, "
            f"{NUM_REPEATS} repeats",
            f"skipping  {census.skipping:.0%} of the samples let the decoder skip the frames between",
            f"bytes     {num_bytes(census.bytes_per_clip)} are read per clip; it spans {census.span} of "
            f"{census.num_frames} frames",
        ]
        if census.lowered:
            cut = f"cut with stride {census.stride}" if data.rate_hz is None else "cut closer"
            lines.append(f"short     {census.lowered:.0%} of the samples are too short for that pace: {cut}")
        unusable = {**self.failures, **({"short": census.num_too_short} if census.num_too_short else {})}
        if unusable:
            named = ", ".join(f"{num} {reason}" for reason, num in sorted(unusable.items()))
            lines.append(f"unusable  {named} (index: {census.num_videos} looked at)")
        lines += ["", f"{'one core':<24}{'clips/s (spread)':>22}{'ms per clip':>14}{'p90':>8}"]
        rows = [(name + " (config)" * (name == data.decoder), cost) for name, cost in self.costs.items()]
        if self.trial is not None:
            rows.append((f"{self.trial.before.num_videos} of them as they are", self.trial.before))
            rows.append((f"{self.trial.after.num_videos} packed anew", self.trial.after))
        for name, cost in rows:
            lines.append(f"{name:<24}{cost.clips_per_s!s:>22}{short(cost.ms_median):>14}{short(cost.ms_p90):>8}")
        rate = short(ours.clips_per_s.middle * num_cores())
        lines += ["", f"so        at most {rate} clips/s on the {num_cores()} cores of this machine"]
        lines += load_lines(self.load)
        return lines + advice_lines(self.advice(), "no other decoder or packing that was measured is faster")


def bench_decode(config: Config, *, seconds: float = 20.0, progress: Progress | None = None) -> DecodeResult:
    """Measure for about `seconds`. Raises UserError if the data cannot be opened or gives no clip."""
    data, load = config.data, others_load()
    check_decoder(data.decoder)
    dataset = open_dataset(data, seed=config.run.seed, limits=config.limits)
    census, places = take_census(config, dataset)
    failures: Counter[str] = Counter()
    names = [data.decoder, *(name for name in DECODERS if name != data.decoder and _is_installed(name))]
    with ExitStack() as stack:
        slot_bytes = max(dataset.max_bytes, dataset.max_pixels * 3 * data.frames * data.clips_per_video)
        workers = {name: _Worker(name, slot_bytes, data.decode_deadline_s) for name in names}
        for worker in workers.values():
            stack.callback(worker.close)
        videos, video_s = _warm_up(config, dataset, places, workers, WARM_UP_SHARE * seconds, failures)
        if not videos:
            named = ", ".join(f"{num} {reason}" for reason, num in failures.items())
            raise UserError(
                f"data.shards holds nothing that decodes among its first samples ({named}): run tubelet verify on it"
            )
        anew = dict(packed_anew(config, videos, REPACK_SHARE * seconds)) if "pyav" in workers else {}
        affordable = (1 - WARM_UP_SHARE - REPACK_SHARE) * seconds / (NUM_REPEATS * video_s)
        num_kept = max(FEWEST_VIDEOS, int(affordable), *(number + 1 for number in anew))
        videos = videos[:num_kept]
        passes = {name: (worker, videos) for name, worker in workers.items()}
        if anew:
            passes[REPACKED] = (workers["pyav"], list(anew.values()))
        times = _measure(passes, progress)
    clips = data.clips_per_video
    trial = None
    if anew:
        before, after = Cost.of(times["pyav"][:, list(anew)], clips), Cost.of(times[REPACKED], clips)
        ratio = mean(_bytes_per_s(video) / _bytes_per_s(videos[number]) for number, video in anew.items())
        trial = Trial(before, after, ratio)
    costs = {name: Cost.of(times[name], clips) for name in workers}
    return DecodeResult(data, dataset.num_samples, census, costs, trial, dict(failures), load)


class _Worker:
    """One decoder process, as training has them, and its CPU clock."""

    def __init__(self, decoder: str, slot_bytes: int, deadline_s: float) -> None:
        self._pool = DecoderPool(1, decoder=decoder, slot_bytes=slot_bytes, deadline_s=deadline_s)
        self.close = self._pool.close

    def cpu_ms(self, request: Request) -> float:
        """Decode once; the first call also starts the process."""
        before = cpu_s(self._pool.pids)
        with self._pool.decoded(request):
            return 1000 * cpu_used_s(before, cpu_s(self._pool.pids))


def _is_installed(decoder: str) -> bool:
    try:
        check_decoder(decoder)
    except UserError:
        return False
    return True


def _warm_up(
    config: Config,
    dataset: DataSet,
    places: Sequence[Place],
    workers: Mapping[str, _Worker],
    limit_s: float,
    failures: Counter[str],
) -> tuple[list[Video], float]:
    """Read and decode each video once until the time is over; one that fails is counted and left out.

    Returns the videos that every decoder can decode, and the seconds that all decoders take for one of them.
    """
    videos: list[Video] = []
    used_s: list[float] = []
    end_s = time.monotonic() + limit_s
    for place in places:
        if len(videos) == MOST_VIDEOS or (len(videos) >= FEWEST_VIDEOS and time.monotonic() > end_s):
            break
        try:
            video = read_video(config, dataset, place)
            start_s = time.monotonic()
            for worker in workers.values():
                worker.cpu_ms(video.request)
        except SampleError as error:
            failures[error.reason] += 1
            continue
        used_s.append(time.monotonic() - start_s)
        videos.append(video)
    return videos, median(used_s) if used_s else 0.0


def _measure(
    passes: Mapping[str, tuple[_Worker, Sequence[Video]]], progress: Progress | None
) -> dict[str, NDArray[np.float64]]:
    """CPU milliseconds [R, V] of every video in every pass; the passes take turns, video by video."""
    times = {name: np.full((NUM_REPEATS, len(videos)), np.nan) for name, (_, videos) in passes.items()}
    longest = max(len(videos) for _, videos in passes.values())
    for repeat in range(NUM_REPEATS):
        for number in range(longest):
            for name, (worker, videos) in passes.items():
                if number < len(videos):
                    with suppress(SampleError):  # it decoded before: a decoder that hangs now and then
                        times[name][repeat, number] = worker.cpu_ms(videos[number].request)
            if progress is not None:
                progress(repeat * longest + number + 1, NUM_REPEATS * longest)
    return times


def _bytes_per_s(video: Video) -> float:
    return len(video.request.video) * video.rate / video.request.facts.num_frames
