"""The learning rate as a pure function of where the run stands: a resumed run needs nothing but its position."""

from __future__ import annotations

import math


def lr_at(position: int, *, batch: int, warmup: int, total: int, peak_lr: float, final_lr: float) -> float:
    """Learning rate of the step that takes positions [position, position + batch) of `total`.

    Linear from peak_lr * batch / warmup (never 0: a first step that changes nothing is wasted) to peak_lr over the
    first `warmup` positions, then a cosine to final_lr at the end. All counts in one unit; clips will do as well.
    """
    if position + batch <= warmup:
        return peak_lr * (position + batch) / warmup
    if total <= warmup:
        return peak_lr
    progress = min(max(position - warmup, 0) / (total - warmup), 1.0)
    return final_lr + (peak_lr - final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
