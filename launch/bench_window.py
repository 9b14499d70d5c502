"""Windows of the real loader: open it as one rank, let it run for a moment, count, close; several settings in turns.

Legend: a step is what one rank takes of a global batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from launch.bench import NUM_REPEATS, Progress, Spread, cpu_s, cpu_used_s, num_cores
from pretrain.config import Config
from pretrain.data.loader import ClipLoader
from pretrain.metrics import read_metrics
from pretrain.sections import DataConfig

SHORTEST_WINDOW_S = 0.6
FEWEST_REPEATS = 2
MOST_STEP_CLIPS = 16
"""Clips of a step at most: a window is a whole number of steps, and need not be long."""
LONGER_RUNS = 16
GIVEN = "as given"
BUSY = 0.75
"""Share of the time that decoders work from which on decoding, not reading, sets the pace."""


@dataclass(frozen=True)
class Setting:
    """What is changed of the config."""

    name: str
    data: DataConfig


@dataclass(frozen=True)
class Window:
    """One loader, opened, run for a moment, closed."""

    first_batch_s: float
    """From nothing to the first step."""
    seconds: float
    num_clips: int
    cpu_s: float
    """Of this process and its decoders."""
    decode_s: float
    """In decoders, summed over them."""
    bytes_read: int
    num_requests: int
    num_retries: int
    num_throttled: int
    num_cache_hits: int
    substituted: dict[str, int]


@dataclass(frozen=True)
class Speed:
    """What one setting gave, over its windows."""

    setting: Setting
    windows: tuple[Window, ...]

    @property
    def clips_per_s(self) -> Spread:
        """One value per window."""
        return Spread(tuple(window.num_clips / window.seconds for window in self.windows))

    @property
    def first_batch_s(self) -> Spread:
        """One value per window."""
        return Spread(tuple(window.first_batch_s for window in self.windows))

    def total(self, name: str) -> float:
        """Sum of a field over the windows."""
        return sum(getattr(window, name) for window in self.windows)

    @property
    def cores_busy(self) -> float:
        """CPU seconds per second."""
        return self.total("cpu_s") / self.total("seconds")

    @property
    def is_decoding(self) -> bool:
        """Whether decoding sets the pace: the decoders are at work nearly all the time."""
        return self.total("decode_s") >= BUSY * max(1, self.setting.data.workers) * self.total("seconds")

    def to_json(self) -> dict[str, Any]:
        """For a machine."""
        seconds, num_clips = self.total("seconds"), self.total("num_clips")
        return {
            "clips_per_s": self.clips_per_s.to_json(),
            "cpu_s_per_clip": self.total("cpu_s") / num_clips,
            "cores_busy": self.cores_busy,
            "bytes_per_s": self.total("bytes_read") / seconds,
            "requests_per_s": self.total("num_requests") / seconds,
            "first_batch_s": self.first_batch_s.to_json(),
            "windows": [asdict(window) for window in self.windows],
        }


@dataclass(frozen=True)
class Need:
    """How fast training takes clips, as far as that is known."""

    share: int
    """Clips of one rank per step."""
    ranks: int
    step_s: float | None
    """Length of a step; None: not known."""
    source: str
    """Where these come from."""

    @property
    def clips_per_s(self) -> float | None:
        """That one rank takes."""
        return None if self.step_s is None else self.share / self.step_s

    def wait(self, clips_per_s: float) -> float | None:
        """Share of the time that training would wait for a loader of this speed."""
        return None if self.step_s is None else max(0.0, 1 - self.step_s * clips_per_s / self.share)


def settings_for(data: DataConfig, *, is_remote: bool) -> list[Setting]:
    """The config's workers, none, one, two, one per core; over the network also longer runs of neighbours."""
    numbers = sorted({0, 1, 2, num_cores(), data.workers})
    settings = [Setting(f"workers={number}", data.model_copy(update={"workers": number})) for number in numbers]
    if is_remote and data.run_length < LONGER_RUNS:
        settings.append(Setting(f"run_length={LONGER_RUNS}", data.model_copy(update={"run_length": LONGER_RUNS})))
    return settings


def needed(config: Config, *, step_s: float | None, ranks: int | None) -> Need:
    """What one rank needs: as told, else from the rows of an earlier run in run.dir, else one micro batch per step."""
    train = config.train
    source = GIVEN
    rows = read_metrics(Path(config.run.dir))
    started = [row["world_size"] for row in rows if row["kind"] == "start" and isinstance(row.get("world_size"), int)]
    steps_s = [row["step_s"] for row in rows if row["kind"] == "train" and isinstance(row.get("step_s"), float)]
    if step_s is None and steps_s and started and ranks in (None, started[-1]):
        step_s, ranks, source = median(steps_s), started[-1], f"{config.run.dir}, ranks: {started[-1]}"
    if ranks is None:
        ranks = -(-train.global_batch // train.micro_batch)
    return Need(-(-train.global_batch // ranks), ranks, step_s, source)


def measure(
    config: Config, settings: Sequence[Setting], need: Need, seconds: float, progress: Progress | None
) -> tuple[tuple[Speed, ...], int]:
    """Rounds over all settings until the time is over. Also returns the number of samples.

    In a round all settings take the same samples, the next round takes others; each round begins with another setting,
    so that none always finds what the one before it has brought into the memory of the machine.
    """
    windows: list[list[Window]] = [[] for _ in settings]
    num_samples, num_done = 0, 0
    start_s = time.monotonic()
    for repeat in range(NUM_REPEATS):
        if repeat >= FEWEST_REPEATS and time.monotonic() - start_s > 1.3 * seconds:
            break
        for number in range(len(settings)):
            setting = settings[turn := (number + repeat) % len(settings)]
            found = windows[turn]
            opening_s = median(window.first_batch_s for window in found) if found else 0.5
            window_s = max(SHORTEST_WINDOW_S, seconds / (NUM_REPEATS * len(settings)) - opening_s)
            window, num_samples = _window(config, setting, need, window_s, seed=config.run.seed + repeat)
            found.append(window)
            num_done += 1
            if progress is not None:
                progress(num_done, NUM_REPEATS * len(settings))
    return tuple(Speed(setting, tuple(w)) for setting, w in zip(settings, windows, strict=True)), num_samples


def _window(config: Config, setting: Setting, need: Need, window_s: float, *, seed: int) -> tuple[Window, int]:
    """Open a loader, take its first step, then measure whole steps."""
    data = setting.data
    unit = data.clips_per_video * data.run_length
    share = -(-min(need.share, MOST_STEP_CLIPS) // unit) * unit
    opened_s = time.perf_counter()
    with ClipLoader(data, seed=seed, global_batch=share, limits=config.limits) as loader:
        next(loader)
        first_batch_s = time.perf_counter() - opened_s
        loader.stats()
        before, start_s = cpu_s((os.getpid(), *loader.worker_pids)), time.perf_counter()
        end_s = start_s
        while end_s - start_s < window_s:
            next(loader)
            end_s = time.perf_counter()
        used_s = cpu_used_s(before, cpu_s((os.getpid(), *loader.worker_pids)))
        stats = loader.stats()
        return Window(
            first_batch_s=first_batch_s,
            seconds=end_s - start_s,
            num_clips=stats.num_clips,
            cpu_s=used_s,
            decode_s=stats.decode_s,
            bytes_read=stats.bytes_read,
            num_requests=stats.num_requests,
            num_retries=stats.num_retries,
            num_throttled=stats.num_throttled,
            num_cache_hits=stats.num_cache_hits,
            substituted=dict(stats.substituted),
        ), loader.num_samples
