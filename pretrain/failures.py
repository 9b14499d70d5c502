"""Numbers that go wrong: skip a step, roll back and step over what caused it, at last ask a person.

    loss or gradient not finite ─ the step is not applied; `max_skips` within `skip_window_steps` ─ roll back
    loss beyond mean + k sigma  ─ roll back
    one roll-back more than `max_rollbacks` ─ a person

Judged from numbers that are equal on all ranks, so every rank comes to the same verdict by itself. The window of the
spike rule is the one of OLMo-core's skip-step optimizer (128 steps); what to step over follows PaLM (arXiv 2204.02311,
section 5.1), which restarted before a spike and skipped the batches around it.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.sections import FailureConfig


@dataclass(frozen=True)
class RollBack:
    """Go back before step `first`, and step over [first, stop)."""

    first: int
    stop: int
    reason: str


class FailureLadder:
    """What has gone wrong in this attempt so far."""

    def __init__(self, settings: FailureConfig, skips: Sequence[int] = ()) -> None:
        """`skips`: steps that earlier attempts did not apply, before the one this attempt begins with."""
        self._settings = settings
        self._skips = deque(sorted(skips))
        self._losses: deque[float] = deque(maxlen=settings.spike_window_steps)

    def skipped(self, step: int) -> RollBack | None:
        """Step `step` was not applied. Says if that is once too often."""
        self._skips.append(step)
        window = self._settings.skip_window_steps
        while self._skips[0] <= step - window:
            self._skips.popleft()
        if len(self._skips) < self._settings.max_skips:
            return None
        num = len(self._skips)
        return RollBack(
            self._skips[0], step + 1, f"{num} steps within {window} had a loss or gradient that is no number"
        )

    def applied(self, step: int, loss: float) -> RollBack | None:
        """Step `step` was applied with this loss (mean over the global batch). Says if it is a spike."""
        losses, settings = self._losses, self._settings
        if settings.spike_sigma and len(losses) == settings.spike_window_steps:
            mean = statistics.fmean(losses)
            sigma = max(statistics.pstdev(losses), 1e-6 * abs(mean))  # a loss that stands still is no spike
            if loss > mean + settings.spike_sigma * sigma or not math.isfinite(loss):
                reason = f"the loss {loss:.4g} lies {(loss - mean) / sigma:.1f} sigma above its mean {mean:.4g}"
                # The batch before it made the weights that this one's loss shows.
                return RollBack(max(0, step - 1), step + 1, reason)
        losses.append(loss)
        return None
