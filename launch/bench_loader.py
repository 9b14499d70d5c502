"""`tubelet bench loader CONFIG`: how many clips the real loader hands to one rank here, and what would raise that.

    settings (workers 0, 1, 2, all cores, the config's; over object storage also longer runs) ─ in turns, each time a
        new loader ─ a window of taking batches as fast as they come ─ what to change

Measured is one rank alone on this machine that does nothing with its batches: an upper bound of what training gets.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from launch.bench import Advice, Progress, advice_lines, gain, load_lines, num_bytes, num_cores, others_load, short
from launch.bench_window import GIVEN, LONGER_RUNS, Need, Speed, measure, needed, settings_for
from pretrain.config import Config
from pretrain.data.source import specs
from shards.source import load_manifests
from shards.storage import local_path

OFTEN = 0.01
"""Share of the requests that may fail before that is worth a word."""


@dataclass(frozen=True)
class LoaderResult:
    """Everything that `bench loader` found."""

    config: Config
    num_samples: int
    data_bytes: int
    is_remote: bool
    need: Need
    speeds: tuple[Speed, ...]
    load: float
    """Of the machine, per core, before the measurement."""

    @property
    def ours(self) -> Speed:
        """The config as it is."""
        return next(speed for speed in self.speeds if speed.setting.data == self.config.data)

    def advice(self) -> list[Advice]:
        """What to change, as far as the figures support it."""
        found = (
            self._workers(),
            self._runs(),
            self._cache(),
            self._decoding(),
            self._throttling(),
            self._bad_samples(),
        )
        return [advice for advice in found if advice is not None]

    def _workers(self) -> Advice | None:
        """More of them if that gives more clips; fewer if that gives as many; never none: a hang would stop it all."""
        mine, ours = self.config.data.workers, self.ours.clips_per_s
        others = [s for s in self.speeds if s.setting.data == self.config.data.model_copy(update=_workers_of(s))]
        others = [speed for speed in others if speed.setting.data.workers > 0]
        best = max(others, key=lambda speed: speed.clips_per_s.middle)
        if gain(best.clips_per_s, ours) is not None:
            times = best.clips_per_s.middle / ours.middle
            return Advice(
                f"data.workers={best.setting.data.workers}",
                f"{times:.1f}x the clips of data.workers={mine}: {short(best.clips_per_s.middle)} against "
                f"{short(ours.middle)} a second",
            )
        enough = [s for s in others if s.setting.data.workers < mine and s.clips_per_s.middle >= ours.middle]
        if not enough:
            return None
        fewest = min(enough, key=lambda speed: speed.setting.data.workers)
        return Advice(
            f"data.workers={fewest.setting.data.workers}",
            f"as many clips ({short(fewest.clips_per_s.middle)} a second) as with {mine}, and less memory",
        )

    def _runs(self) -> Advice | None:
        """Longer runs of neighbours, if a loader with them was measured to be faster."""
        longer = [s for s in self.speeds if s.setting.data.run_length > self.config.data.run_length]
        if not longer or (times := gain(longer[0].clips_per_s, self.ours.clips_per_s)) is None:
            return None
        return Advice(
            f"data.run_length={LONGER_RUNS}   (another order: only for a new run)",
            f"{times:.1f}x the clips: requests, {self._per_clip('num_requests'):.2g} per clip, set the pace",
        )

    def _cache(self) -> Advice | None:
        """Keep what is read again, if it is remote, read more than once and fits on this disk."""
        train = self.config.train
        epochs = train.steps * train.global_batch / self.config.data.clips_per_video / self.num_samples
        free_bytes = shutil.disk_usage(Path.cwd()).free
        if not self.is_remote or self.config.data.cache is not None or epochs < 2 or self.data_bytes > free_bytes / 2:
            return None
        return Advice(
            f"data.cache='{{dir: FOLDER, max_bytes: {self.data_bytes}}}'",
            f"{epochs:.0f} epochs read {num_bytes(self.data_bytes)} each; a disk of the node would keep them",
        )

    def _decoding(self) -> Advice | None:
        """Where decoders set the pace and it is too slow, other data is what helps."""
        needed = self.need.clips_per_s
        best = max(self.speeds, key=lambda speed: speed.clips_per_s.middle)
        if needed is None or best.clips_per_s.middle >= needed or not best.is_decoding:
            return None
        cores = needed * best.total("cpu_s") / best.total("num_clips")
        return Advice(
            "cheaper clips (tubelet bench decode says how), or more cores for each rank",
            f"training takes {short(needed)} clips/s per rank: that is {cores:.1f} cores of decoding",
        )

    def _throttling(self) -> Advice | None:
        requests = self.ours.total("num_requests")
        trouble = self.ours.total("num_retries") + self.ours.total("num_throttled")
        if not requests or trouble < OFTEN * requests:
            return None
        return Advice(
            "data.run_length=16, or shards spread over more prefixes",
            f"{trouble / requests:.1%} of the requests were refused or failed, and were sent again",
        )

    def _bad_samples(self) -> Advice | None:
        reasons = Counter[str]()
        for window in self.ours.windows:
            reasons.update({name: num for name, num in window.substituted.items() if name != "withdrawn"})
        if not reasons:
            return None
        named = ", ".join(f"{num} {reason}" for reason, num in sorted(reasons.items()))
        return Advice("tubelet verify on the data", f"samples had to be replaced: {named}")

    def _per_clip(self, name: str) -> float:
        return self.ours.total(name) / self.ours.total("num_clips")

    def to_json(self) -> dict[str, Any]:
        """For a machine."""
        return {
            "num_samples": self.num_samples,
            "num_cores": num_cores(),
            "config": self.ours.setting.name,
            "settings": {speed.setting.name: speed.to_json() for speed in self.speeds},
            "load_per_core_before": self.load,
            "need": asdict(self.need),
            "data_wait_fraction": self.need.wait(self.ours.clips_per_s.middle),
            "advice": [advice.to_json() for advice in self.advice()],
        }

    def lines(self) -> list[str]:
        """For a person."""
        data, ours = self.config.data, self.ours
        num_windows, seconds = len(ours.windows), median(window.seconds for window in ours.windows)
        lines = [
            f"data      {', '.join(source.url for source in data.sources)}, split {data.split}: "
            f"{self.num_samples:,} samples, {num_bytes(self.data_bytes)}",
            f"loader    one rank alone, {self.need.share} clips a step; {num_windows} windows of {seconds:.1f} s each",
            "",
            f"{'data.':<16}{'clips/s (spread)':>21}{'CPU ms':>8}{'cores':>7}{'read/s':>9}{'requests/s':>11}"
            f"{'first':>7}".rstrip(),
        ]
        for speed in self.speeds:
            name = speed.setting.name + " *" * (speed is ours)
            total_s = speed.total("seconds")
            lines.append(
                f"{name:<16}{speed.clips_per_s!s:>21}{short(1000 * speed.total('cpu_s') / speed.total('num_clips')):>8}"
                f"{speed.cores_busy:>7.2f}{num_bytes(speed.total('bytes_read') / total_s):>9}"
                f"{short(speed.total('num_requests') / total_s):>11}{short(speed.first_batch_s.middle):>5} s"
            )
        lines += ["* the config. CPU ms: per clip, all processes. first: time to the first batch.", ""]
        lines.append(f"pace      set by {'decoding' if ours.is_decoding else 'reads: the decoders wait for them'}")
        wait = self.need.wait(ours.clips_per_s.middle)
        if wait is None:
            fastest_s = self.need.share / ours.clips_per_s.middle
            lines.append(
                f"wait      none as long as a step of {self.need.share} clips takes {short(fastest_s)} s or more"
            )
            lines.append("          (give --step-s, or train first: run.dir has no step times yet)")
        else:
            lines.append(f"wait      {wait:.0%} of the time at {short(self.need.step_s or 0)} s per step")
            if self.need.source != GIVEN:
                lines.append(f"          (as in {self.need.source})")
        if not self.is_remote and self.data_bytes < _memory_bytes() / 2:
            lines.append("note      these local files fit into memory: reads may have come from there")
        lines += load_lines(self.load)
        return lines + advice_lines(self.advice(), "no other setting that was measured gives more")


def bench_loader(
    config: Config,
    *,
    seconds: float = 20.0,
    step_s: float | None = None,
    ranks: int | None = None,
    progress: Progress | None = None,
) -> LoaderResult:
    """Measure for about `seconds` all in all. Raises UserError if the data cannot be opened."""
    load = others_load()
    manifests = load_manifests(specs(config.data))
    splits = [manifest.splits[config.data.split] for manifest in manifests if config.data.split in manifest.splits]
    data_bytes = sum(shard.num_bytes for split in splits for shard in split.shards)
    is_remote = any(local_path(source.url) is None for source in config.data.sources)
    need = needed(config, step_s=step_s, ranks=ranks)
    settings = settings_for(config.data, is_remote=is_remote)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        speeds, num_samples = measure(config, settings, need, seconds, progress)
    finally:
        torch.set_num_threads(num_threads)
    return LoaderResult(config, num_samples, data_bytes, is_remote, need, speeds, load)


def _workers_of(speed: Speed) -> dict[str, int]:
    return {"workers": speed.setting.data.workers}


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
