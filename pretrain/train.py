"""The training loop, and one rank's way into it: `python -m pretrain.train CONFIG [section.key=value …] [--change]`.

The same module runs under `tubelet pretrain`, `deepspeed`, `torchrun` and `srun`: ranks come from the environment.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pretrain.attempt import Outcome, record_outcome, record_refusal
from pretrain.config import Config, load_config
from pretrain.console import Console
from pretrain.data.loader import ClipLoader
from pretrain.engine import Engine, StepReport
from pretrain.evaluation import Evaluation
from pretrain.ledger import Ledger
from pretrain.meter import Meter
from pretrain.recovery import Recovery
from pretrain.redact import without_secrets
from pretrain.schedule import lr_at
from pretrain.stop import Stop, StopAgreement, die, time_limit
from pretrain.track import Tracker
from shards.errors import UserError


@dataclass(frozen=True)
class Trainer:
    """The parts of a run on one rank, put together in `pretrain/setup.py`."""

    config: Config
    loader: ClipLoader
    engine: Engine
    ledger: Ledger
    recovery: Recovery
    evaluation: Evaluation | None
    stop: StopAgreement
    tracker: Tracker
    meter: Meter
    console: Console

    def train(self, start: int) -> Outcome:
        """From step `start` to the last: take a batch, step, record, maybe evaluate, maybe save."""
        last = self.config.train.steps
        for step in range(start, last):
            lr = self.lr(step)
            with self.meter.step(), time_limit(self.config.limits.step_limit_s):
                batches = itertools.islice(self.loader, self.engine.num_micro_steps)
                report = self.engine.step(batches, lr)
            if not report.is_applied:
                raise self.not_finite(step, report)
            self.ledger.record(step, report.batches)
            done = step + 1

            if is_due(done, self.config.track.log_every_steps, last):
                self.log(done, lr, report)
            if self.evaluation is not None and is_due(done, self.config.eval.every_steps, last):
                with self.meter.section("eval"):
                    self.evaluate(done, self.evaluation)

            stop = self.stop.agree()
            if stop or is_due(done, self.config.checkpoint.every_steps, last):
                with self.meter.section("save"):
                    self.recovery.save(done)
                self.tracker.saved(done, self.meter.seconds("save"))
            if stop and done < last:
                return self.stopped(stop, done)
        return Outcome("finished", last, f"all {last} steps are done")

    def lr(self, step: int) -> float:
        """Learning rate of a step; counted in clips."""
        batch, schedule = self.config.train.global_batch, self.config.schedule
        return lr_at(
            step * batch,
            batch=batch,
            warmup=schedule.warmup_steps * batch,
            total=self.config.train.steps * batch,
            peak_lr=self.config.optim.lr,
            final_lr=schedule.final_lr,
        )

    def log(self, done: int, lr: float, report: StepReport) -> None:
        """One row of metrics: the means of this step over all ranks, and what the meter saw since the last row."""
        totals = self.engine.totals(report)
        if not math.isfinite(totals["loss"]):
            raise self.not_finite(done - 1, report)
        row = {
            "kind": "train",
            "step": done,
            "position": done * self.config.train.global_batch // self.config.data.clips_per_video,
            **totals,
            "lr": lr,
            "grad_norm": self.engine.grad_norm(),
            **self.meter.row(self.loader.stats()),
        }
        self.tracker.write(row)
        self.console.step(done, self.config.train.steps, row)

    def evaluate(self, done: int, evaluation: Evaluation) -> None:
        """The held-out loss; moves no cursor."""
        row = {"kind": "eval", "step": done, **evaluation.run(self.engine)}
        self.tracker.write(row)
        self.console.evaluated(row)

    def stopped(self, stop: Stop, done: int) -> Outcome:
        """The outcome of a run that was asked to stop: a signal means go on later, the STOP file means a person."""
        if stop is Stop.FILE:
            self.stop.honoured()
            return Outcome("person", done, f"the STOP file: saved at step {done}; the same command goes on")
        return Outcome("stopped", done, f"a signal: saved at step {done}; the same command goes on")

    def not_finite(self, step: int, report: StepReport) -> UserError:
        """A loss or gradient that is no number. Names the samples this rank took."""
        samples = sorted({int(sample) for batch in report.batches for sample in batch.sample_B.numpy() if sample >= 0})
        return UserError(
            f"step {step} gave a loss or gradient that is not finite (samples on this rank: {samples[:20]}): "
            "lower optim.lr, set train.clip_norm, or use train.precision=fp32; the last checkpoint is untouched"
        )


def is_due(done: int, every_steps: int, last: int) -> bool:
    """Every n steps, and at the end."""
    return every_steps > 0 and (done % every_steps == 0 or done == last)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """One rank from start to end. Exit codes: 0 finished, 75 start again, 93 a person is needed."""
    from pretrain.setup import prepare, start_run

    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if not word.startswith("--local_rank")]
    files = [word for word in words if word != "--change"]
    is_first = os.environ.get("RANK", "0") == "0"
    attempt, run_dir = 0, Path(os.devnull)
    try:
        if not files:
            raise UserError("no config was given: python -m pretrain.train CONFIG.yaml [section.key=value …]")
        config = load_config(files[0], files[1:])
        run_dir = Path(config.run.dir)
        rank = prepare(config, allow_change="--change" in words)
        if isinstance(rank, Outcome):
            outcome = rank
        else:
            attempt = rank.attempt
            trainer, start = start_run(rank, allow_change="--change" in words)
            outcome = trainer.train(start)
            rank.close(trainer, outcome)
        Console(is_first).end(config, outcome)
    except UserError as error:
        try:
            if not attempt:
                with suppress(OSError):  # the run folder may be what cannot be written: the message must still come
                    record_refusal(run_dir, str(error))
            if record_outcome(run_dir, attempt, Outcome("person", 0, str(error))) if attempt else is_first:
                print(f"error: {without_secrets(str(error))}", file=sys.stderr, flush=True)
        finally:
            os._exit(93)
    except BaseException as error:
        # C9: inside a collective nobody can be asked. Say what happened, and be gone.
        text = without_secrets(f"{type(error).__name__}: {error}")
        try:
            logging.getLogger(__name__).exception("this rank failed")
            print(without_secrets(traceback.format_exc()), file=sys.stderr, flush=True)
            if attempt:
                record_outcome(run_dir, attempt, Outcome("failed", 0, text))
        finally:  # a full disk or a closed pipe, perhaps the very cause, must not keep this rank alive
            die(text)
    sys.exit(outcome.exit_code)


if __name__ == "__main__":
    main()
