"""A rank on which something goes wrong: `sick.py KIND STEP RANK CONFIG …`. The product is wrapped from outside.

nan         the loss of this rank's clips is no number in step STEP, always when that step is taken
nan from    … in every step from STEP on
spike       the loss is 1,000 times what it is, in step STEP
hang        the rank sleeps in the forward pass of step STEP
full once   the disk is full for the first save, of this rank, from STEP on
full        … for every one
ledger      the ledger cannot be written in step STEP
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain import checkpoint, watchdog
from pretrain.engine import Engine
from pretrain.ledger import Ledger
from pretrain.objective import Loss
from pretrain.train import main

kind, step, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
is_mine = int(os.environ.get("RANK", "0")) == rank
watchdog.GRACE_S = 1.0


def change_losses(is_time: Callable[[int], bool], change: Callable[[Any], Any]) -> None:
    original: Callable[..., Any] = Engine._forward

    def forward(self: Engine, batch: Any, *, baselines: bool) -> Any:
        losses, weight_B = original(self, batch, baselines=baselines)
        if is_time(batch.step) and not baselines:
            losses = {name: Loss(change(loss.value_B), loss.parts) for name, loss in losses.items()}
        return losses, weight_B

    Engine._forward = forward


def refuse(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if not is_mine:
    pass
elif kind == "nan":
    change_losses(lambda at: at == step, lambda value_B: value_B * float("nan"))
elif kind == "nan from":
    change_losses(lambda at: at >= step, lambda value_B: value_B * float("nan"))
elif kind == "spike":
    change_losses(lambda at: at == step, lambda value_B: value_B * 1000)
elif kind == "hang":

    def sleep(value_B: Any) -> Any:
        time.sleep(600)
        return value_B

    change_losses(lambda at: at == step, sleep)
elif kind in ("full", "full once"):
    original_write, failed = checkpoint.write_tensors, []

    def write(path: Path, tensors: Any) -> Any:
        if checkpoint.step_of(Path(path.parent.name.split(".")[0])) >= step and not (failed and kind == "full once"):
            failed.append(path)
            refuse()
        return original_write(path, tensors)

    checkpoint.write_tensors = write
elif kind == "ledger":
    original_record = Ledger.record

    def record(self: Ledger, at: int, batches: Any) -> None:
        refuse() if at == step else original_record(self, at, batches)

    Ledger.record = record
else:
    raise SystemExit(f"no kind {kind!r}")
main(sys.argv[4:])
