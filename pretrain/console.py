"""What a person sees while a run works: a few plain lines, from rank 0 only, readable at 80 columns."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from typing import Any

from pretrain.attempt import Outcome
from pretrain.config import Config
from pretrain.world import World

WAIT_SHOWN = 0.03
"""Share of the time from which on a wait for data, or a difference between ranks, is told."""


class Console:
    """Prints on rank 0, is silent on the others."""

    def __init__(self, is_first: bool) -> None:
        self._is_first = is_first
        self._last: tuple[int, float] | None = None

    def say(self, text: str) -> None:
        """One line, at once: a log that is read while the run goes on is no use in blocks."""
        if self._is_first:
            print(text, flush=True)

    def start(
        self, config: Config, world: World, num_micro_steps: int, num_samples: int, start: int, attempt: int
    ) -> None:
        """The derived numbers with what they come from."""
        train, batch = config.train, config.train.global_batch
        fillers = train.micro_batch * num_micro_steps * world.size - batch
        positions = train.steps * batch // config.data.clips_per_video
        self.say(f"run      {config.run.dir}, attempt {attempt}, from step {start} to {train.steps}")
        self.say(
            f"model    {config.model.size}, {config.data.frames} frames of {config.data.size} x {config.data.size}"
        )
        split = f"{train.micro_batch} micro batch x {world.size} ranks x {num_micro_steps} accumulated"
        blank = f" (with {fillers} blank fillers of weight 0)" if fillers else ""
        self.say(f"batch    {batch} clips = {split}{blank}")
        self.say(f"data     {num_samples:,} samples; this run takes {positions / num_samples:.2f} epochs")
        self.say(
            f"states   ZeRO stage {config.zero.stage}{', offloaded' if config.zero.offload else ''}, {train.precision}"
        )

    def step(self, done: int, last: int, row: Mapping[str, Any]) -> None:
        """One log step: loss, learning rate, speed, time left."""
        now = time.monotonic()
        left = ""
        if self._last is not None and done > self._last[0]:
            left = f"  {_duration((now - self._last[1]) / (done - self._last[0]) * (last - done))} left"
        self._last = (done, now)
        speed = row.get("clips_per_s")
        self.say(
            f"step {done:>{len(str(last))}}/{last}  loss {row['loss']:.4f}  lr {row['lr']:.2e}"
            + (f"  {speed:.1f} clips/s" if isinstance(speed, float) else "")
            + _wait(row)
            + left
        )

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """The held-out loss beside what trivial predictors lose on the same tokens."""
        loss, zero, copy = (
            row.get(f"{name}") for name in ("loss/masked_frame", "masked_frame/zero", "masked_frame/copy")
        )
        if loss is not None and zero and copy:
            self.say(
                f"  held-out masked loss {loss:.4f}: {loss / zero:.3f} of predicting zero, {loss / copy:.3f} of copying"
            )
        accuracy, chance = row.get("frame_order/accuracy"), row.get("frame_order/chance")
        if accuracy is not None and chance is not None:
            self.say(f"  held-out frame order {accuracy:.1%} right (chance {chance:.1%})")

    def end(self, config: Config, outcome: Outcome) -> None:
        """How it ended, and the command to type next."""
        self.say(f"{outcome.outcome}: {outcome.reason}")
        if outcome.outcome == "finished":
            self.say(f"next: tubelet report {shlex.quote(config.run.dir)}")


def _wait(row: Mapping[str, Any]) -> str:
    """The wait for data where it is worth a look; the slowest rank where the ranks differ: "  wait 12% (rank 3)"."""
    longest, mean = row.get("data_wait_fraction"), row.get("data_wait_mean_fraction")
    if not isinstance(longest, float) or longest < WAIT_SHOWN:
        return ""
    differ = isinstance(mean, float) and longest - mean >= WAIT_SHOWN
    return f"  wait {longest:.0%}" + (f" (rank {row['slowest_rank']})" if differ else "")


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"
