"""The training loop, and one rank's way into it: `python -m pretrain.train CONFIG [section.key=value …] [--change]`.

The same module runs under `tubelet pretrain`, `deepspeed`, `torchrun` and `srun`: ranks come from the environment.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from pretrain.attempt import Outcome, record_outcome, record_refusal, refuse_superseded
from pretrain.config import Config, load_config
from pretrain.console import Console
from pretrain.data.loader import ClipLoader
from pretrain.decisions import RolledBack, Skipped, describe
from pretrain.engine import Engine, StepReport
from pretrain.evaluation import Evaluation
from pretrain.failures import FailureLadder, RollBack
from pretrain.ledger import Ledger
from pretrain.meter import Meter
from pretrain.mirroring import Mirroring
from pretrain.recovery import Recovery, delete_void
from pretrain.redact import without_secrets
from pretrain.rounds import Rounds
from pretrain.schedule import lr_at
from pretrain.stop import Stop, StopFlag, die
from pretrain.track import Tracker
from pretrain.watchdog import Part, Watchdog
from shards.errors import UserError

log = logging.getLogger(__name__)

MIRROR_GRACE_S = 20.0
"""How long a run that is asked to stop goes on copying to the mirror; the next attempt does the rest."""


@dataclass
class Trainer:
    """The parts of a run on one rank, put together in `pretrain/setup.py`."""

    config: Config
    loader: ClipLoader
    engine: Engine
    ledger: Ledger
    recovery: Recovery
    evaluation: Evaluation | None
    rounds: Rounds
    flag: StopFlag
    watchdog: Watchdog
    ladder: FailureLadder
    tracker: Tracker
    meter: Meter
    console: Console
    mirroring: Mirroring | None
    losses: list[tuple[int, Tensor]] = field(default_factory=list[tuple[int, Tensor]])
    """(step, sum and count of the loss on this rank, on the device) of the steps that were not judged yet."""
    has_stepped: bool = False

    def train(self, start: int) -> Outcome:
        """From step `start` to the last: take a batch, step, record, maybe evaluate, maybe save."""
        last = self.config.train.steps
        is_due = False
        for step in range(start, last):
            roll_back = self.take(step)
            done = step + 1
            if roll_back is not None:
                return self.roll_back(done, roll_back)
            if self.evaluation is not None and every(done, self.config.eval.every_steps, last):
                self.evaluate(done, self.evaluation)

            is_due |= every(done, self.config.checkpoint.every_steps, last)
            with self.watchdog.part("save"):
                stop = self.rounds.next()
                may_save = is_due and self.recovery.saver.step_in_flight is None
                if (stop or done == last or may_save) and (roll_back := self.judge()) is not None:
                    return self.roll_back(done, roll_back)  # no checkpoint holds a step that was not judged
                if stop or done == last:
                    return self.end(stop, done)
                if may_save:
                    is_due = False
                    self.save(done)
            self.tell_saves()
        return Outcome("finished", last, f"all {last} steps are done")

    def save(self, done: int) -> None:
        """Begin a checkpoint; where it is not to be written behind training, wait for it."""
        with self.meter.section("save"):
            self.recovery.begin_save(done)
            if not self.config.checkpoint.background:
                self.rounds.finish_save()

    def take(self, step: int) -> RollBack | None:
        """One step: batch, forward, backward, update, ledger; or over it, where that was decided."""
        done, lr = step + 1, self.lr(step)
        if self.recovery.decisions.is_withheld(step):
            self.loader.go_to_step(done)
            return None
        part: Part = "step" if self.has_stepped else "first_step"
        with self.watchdog.part(part):
            with self.meter.step():
                batches = itertools.islice(self.loader, self.engine.num_micro_steps)
                report = self.engine.step(batches, lr)
            self.has_stepped = True
            if not report.is_applied:
                return self.skip(step, report)
            self.record(step, report)
            self.losses.append((step, report.sums["loss"]))
            if every(done, self.config.track.log_every_steps, self.config.train.steps):
                return self.log(done, lr, report)
        return None

    def record(self, step: int, report: StepReport) -> None:
        """The ledger's rows of an applied step. Where they cannot be written, all stop at the last commit."""
        try:
            self.ledger.record(step, report.batches)
        except OSError as error:
            log.error("the ledger cannot be written: %s", error)
            self.recovery.saver.ledger_error = error
            self.flag.wish(Stop.UNWRITABLE)

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

    def log(self, done: int, lr: float, report: StepReport) -> RollBack | None:
        """One row of metrics: the means of this step over all ranks, and what the meter saw since the last row."""
        row = {
            "kind": "train",
            "step": done,
            "position": done * self.config.train.global_batch // self.config.data.clips_per_video,
            **self.engine.totals(report),
            "lr": lr,
            "grad_norm": self.engine.grad_norm(),
            "durable_age_s": self.recovery.saver.age_s,
            **self.meter.row(self.loader.stats(), self.engine.comm_wait_s()),
        }
        self.tracker.write(row)
        self.console.step(done, self.config.train.steps, row)
        return self.judge()

    def judge(self) -> RollBack | None:
        """Whether a loss since the last look is a spike. A collective, where spikes matter at all."""
        losses, self.losses = self.losses, []
        if not self.config.failure.spike_sigma:
            return None
        means = self.engine.means([pair for _, pair in losses])
        verdicts = [self.ladder.applied(step, loss) for (step, _), loss in zip(losses, means, strict=True)]
        return next((verdict for verdict in verdicts if verdict is not None), None)

    def skip(self, step: int, report: StepReport) -> RollBack | None:
        """A loss or gradient was not finite, and no rank applied the step: write down which samples it had."""
        own = json.dumps(sorted(report.bad_samples()))
        samples = {int(s) for text in self.recovery.agreement.gather_texts(own) for s in json.loads(text)}
        what = f"loss of samples {_few(sorted(samples))}" if samples else "gradient (every loss is finite)"
        reason = f"not finite: {what}"
        refuse_superseded(self.recovery.run_dir, self.recovery.attempt)
        self.recovery.decisions.add(Skipped(step, reason, tuple(sorted(samples))))
        self.tracker.write({"kind": "event", "step": step + 1, "event": "skipped", "reason": reason})
        self.console.say(f"step {step + 1} was not applied: {reason}")
        return self.ladder.skipped(step)

    def roll_back(self, done: int, verdict: RollBack) -> Outcome:
        """Decide to go back, or to give up; the next attempt, in this very process, does it."""
        with self.watchdog.part("save"):
            self.rounds.finish_save()
            decisions, first = self.recovery.decisions, verdict.first
            to = self.recovery.step_before(first)
            if to is None:
                none = "and no checkpoint is whole to go back to"
                remedy = "see logs/, restore a checkpoint from a backup or from checkpoint.mirror"
                return Outcome("person", done, f"{verdict.reason}, {none}: {remedy}")
            if len(decisions.rollbacks) >= self.config.failure.max_rollbacks:
                report = f"{verdict.reason}, and the run was rolled back {len(decisions.rollbacks)} times before"
                told = f" ({describe(decisions.rollbacks)})" if decisions.rollbacks else ""
                remedy = "go on with a lower optim.lr (--change) or a higher failure.max_rollbacks, or start a new run"
                return Outcome(
                    "person", done, f"{report}{told}: look at its samples in journal/decisions.jsonl; {remedy}"
                )
            row = RolledBack(done, to, max(first, to), verdict.stop, verdict.reason, self.recovery.attempt)
            refuse_superseded(self.recovery.run_dir, self.recovery.attempt)
            decisions.add(row)
            if self.recovery.world.is_first:
                delete_void(self.recovery.run_dir, decisions)
        event = {"kind": "event", "event": "rolled_back", "to": to, "first": row.first, "stop": row.stop}
        self.tracker.write({**event, "step": done, "reason": row.reason})
        return Outcome("rolled_back", done, describe([row]))

    def close(self, outcome: Outcome) -> None:
        """End what works beside training. A finished run waits until the mirror has its last checkpoint."""
        self.rounds.close()
        self.loader.close()
        self.finish_mirror(self.config.checkpoint.max_age_s if outcome.outcome == "finished" else MIRROR_GRACE_S)
        self.tracker.close()
        self.engine.close()

    def finish_mirror(self, limit_s: float) -> None:
        """All ranks wait together until rank 0 has sent what is committed, within a limit."""
        if self.config.checkpoint.mirror is None:
            return
        mirroring = self.mirroring
        if mirroring is not None:
            mirroring.finish()
        self.recovery.agreement.wait_for(lambda: mirroring is None or mirroring.is_done, limit_s)
        if mirroring is not None:
            mirroring.close()
            self.tell_saves()

    def evaluate(self, done: int, evaluation: Evaluation) -> None:
        """The held-out loss; moves no cursor."""
        with self.meter.section("eval"), self.watchdog.part("eval"):
            losses = evaluation.run(self.engine)
        row = {"kind": "eval", "step": done, "seconds": self.meter.seconds("eval"), **losses}
        self.tracker.write(row)
        self.console.evaluated(row)

    def tell_saves(self) -> None:
        """What became of saves, to people and to metrics; where none works for too long, the wish to stop."""
        saver = self.recovery.saver
        for settled in self.rounds.settled():
            facts = {"step": settled.step, "seconds": settled.blocking_s}
            if settled.is_committed:
                self.tracker.write({"kind": "save", **facts, "write_s": settled.write_s, "bytes": settled.num_bytes})
                self.tracker.publish(settled.step)
                if self.mirroring is not None:
                    self.mirroring.offer(settled.step)
                continue
            self.tracker.write({"kind": "event", "event": "save_failed", "reason": settled.reason, **facts})
            self.console.say(
                f"the save of step {settled.step} failed ({settled.reason}); training goes on, "
                f"{self.config.checkpoint.max_age_s - saver.failing_s:.0f} s until it stops for that"
            )
        for event in self.mirroring.events() if self.mirroring is not None else ():
            self.tracker.write(event)
            if event["event"] == "mirror_failed":
                self.console.say(f"step {event['step']} did not reach the mirror: {event['reason']}; training goes on")
        if saver.failing_s > self.config.checkpoint.max_age_s:
            self.flag.wish(Stop.UNSAVED)
        if saver.ledger_error is not None:
            self.flag.wish(Stop.UNWRITABLE)

    def end(self, stop: Stop, done: int) -> Outcome:
        """The last save of an attempt, and its outcome: a signal means go on later, the STOP file means a person."""
        self.rounds.finish_save()
        self.tell_saves()
        saver = self.recovery.saver
        if stop is Stop.UNWRITABLE:
            return Outcome(
                "failed",
                done,
                f"the ledger cannot be written, and what came after the last commit does not count: make room in "
                f"{self.config.run.dir} (df -h, quota), then start again",
            )
        if saver.newest_step != done:
            self.recovery.begin_save(done)
            self.rounds.finish_save()
            self.tell_saves()
        if saver.newest_step != done:
            age = f"the newest checkpoint, or this start, is {saver.age_s / 60:.0f} minutes old"
            remedy = f"make room in {self.config.run.dir} (df -h, quota), then start again"
            return Outcome("failed", done, f"no save works any more; {age}: {remedy}")
        if done == self.config.train.steps:
            return Outcome("finished", done, f"all {done} steps are done")
        if stop is Stop.UNSAVED:
            return Outcome("failed", done, f"saves failed for checkpoint.max_age_s; that of step {done} worked")
        if stop is Stop.FILE:
            self.flag.honoured()
            return Outcome("person", done, f"the STOP file: saved at step {done}; the same command goes on")
        return Outcome("stopped", done, f"a signal: saved at step {done}; the same command goes on")


def _few(samples: Sequence[int]) -> str:
    more = f" and {len(samples) - 8} more" if len(samples) > 8 else ""
    return ", ".join(map(str, samples[:8])) + more


def every(done: int, every_steps: int, last: int) -> bool:
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
            while True:
                attempt = rank.attempt
                trainer, start = start_run(rank, allow_change="--change" in words)
                outcome = trainer.train(start)
                rank.close(trainer, outcome)
                if outcome.outcome != "rolled_back":
                    break
                rank.console.say(f"rolled back: {outcome.reason}")
                del trainer  # its engine, before the next one is built
                rank = rank.next_attempt()
            rank.leave(outcome)
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
