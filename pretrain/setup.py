"""From a config to a running rank: run folder, attempt number, process group, and the parts of the trainer."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import logging
import math
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from pretrain.agree import Agreement, leave_ranks
from pretrain.attempt import Outcome, Superseded, node_name, record_outcome, refuse_superseded, take_attempt
from pretrain.checkpoint import candidates, newest
from pretrain.config import Config
from pretrain.console import Console
from pretrain.data.loader import ClipLoader
from pretrain.data.source import held_out
from pretrain.decisions import Decisions
from pretrain.engine import Engine, join_ranks
from pretrain.evaluation import Evaluation
from pretrain.failures import FailureLadder
from pretrain.gallery import draw_held_out
from pretrain.journal import Journal
from pretrain.ledger import Ledger
from pretrain.meter import Meter
from pretrain.mirroring import Mirroring, Restoring
from pretrain.objective import Pretraining
from pretrain.optim import build_optimizer
from pretrain.recovery import Recovery, delete_void, load_initial, refuse_other_config, refuse_other_data
from pretrain.redact import without_secrets
from pretrain.rounds import Rounds
from pretrain.saver import Saver
from pretrain.stop import StopFlag, watch_parents
from pretrain.track import Tracker
from pretrain.train import Trainer
from pretrain.watchdog import Watchdog
from pretrain.world import World, world_from_environment
from shards.errors import UserError
from shards.storage import write_atomic

log = logging.getLogger(__name__)

RECORDED_PACKAGES = ("tubelet", "torch", "deepspeed", "numpy", "av", "decord2", "webdataset", "safetensors")


FEW_RUNS = 100
"""Neighbours in a run stay together: fewer runs than this are hardly shuffled."""


@dataclass(frozen=True)
class Rank:
    """One rank that has joined the others."""

    config: Config
    run_dir: Path
    world: World
    device: torch.device
    agreement: Agreement
    attempt: int
    console: Console
    flag: StopFlag
    watchdog: Watchdog
    begun_s: float
    """When the attempt began, by `time.perf_counter`."""

    def close(self, trainer: Trainer, outcome: Outcome) -> None:
        """The end of an attempt: end the helpers, write the outcome."""
        trainer.close(outcome)
        if self.world.is_first:
            if outcome.outcome == "finished":
                self.flag.honoured()
                write_atomic(self.run_dir / "DONE", json.dumps({"step": outcome.step}).encode() + b"\n")
            record_outcome(self.run_dir, self.attempt, outcome)

    def next_attempt(self) -> Rank:
        """The same rank under the next number: after a roll-back, without leaving the group."""
        refuse_superseded(self.run_dir, self.attempt)
        gc.collect()  # engine, optimizer and hooks hold each other: two must not lie in one card's memory
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        attempt = _take_number(self.run_dir, self.world, self.agreement)
        if attempt != self.attempt + 1:
            raise Superseded(f"attempt {attempt - 1} of {self.run_dir} came between: this start, {self.attempt}, stops")
        _log_to(self.run_dir / "logs" / f"rank-{self.world.rank}.log", attempt)
        watchdog = Watchdog(self.run_dir, attempt, self.world, self.config.limits)
        watchdog.enter("setup")
        return replace(self, attempt=attempt, watchdog=watchdog, begun_s=time.perf_counter())

    def leave(self, outcome: Outcome) -> None:
        """The end of the process: close the group, draw what a finished run has learned."""
        self.watchdog.leave()
        leave_ranks()
        if self.world.is_first and outcome.outcome == "finished":
            self._draw()

    def _draw(self) -> None:
        """Pictures at the end. The run is finished already: trouble here is told, and changes nothing."""
        found = newest(self.run_dir)
        assert found is not None
        try:
            draw_held_out(found, self.config, self.run_dir / "pictures")
        except Exception as error:
            log.exception("no pictures")
            self.console.say(f"pictures could not be drawn: {error} (see logs/rank-0.log)")


def prepare(config: Config, *, allow_change: bool) -> Rank | Outcome:
    """Make the run folder, join the ranks, take the attempt number; or say that the run is finished.

    A config that is another run's is refused before anything in its folder is touched.
    """
    begun_s = time.perf_counter()
    watch_parents()
    world = world_from_environment()
    run_dir = Path(config.run.dir)
    refuse_other_config(run_dir, config, allow_change=allow_change)
    finished = _finished(run_dir, config.train.steps)
    if finished is not None:
        return finished
    refuse_other_data(run_dir, config)
    if world.size > config.train.global_batch:
        raise UserError(
            f"train.global_batch is {config.train.global_batch}; each of {world.size} ranks needs at least one clip: "
            f"start {config.train.global_batch} ranks or fewer, or raise it in a new run"
        )
    device = join_ranks(world, config.limits.collective_timeout_s)
    agreement = Agreement(config.limits.collective_timeout_s)
    if world.is_first:
        _make_run_folder(run_dir)
    _restore(run_dir, config, world, agreement)
    attempt = _take_number(run_dir, world, agreement)
    _log_to(run_dir / "logs" / f"rank-{world.rank}.log", attempt)
    flag, watchdog = StopFlag(run_dir, world), Watchdog(run_dir, attempt, world, config.limits)
    watchdog.enter("setup")
    return Rank(config, run_dir, world, device, agreement, attempt, Console(world.is_first), flag, watchdog, begun_s)


def _restore(run_dir: Path, config: Config, world: World, agreement: Agreement) -> None:
    """From the mirror, where this folder has no checkpoint. All ranks wait together, however long it takes."""
    if config.checkpoint.mirror is None:
        return
    restoring = Restoring(run_dir, config.checkpoint) if world.is_first else None
    agreement.wait_for(lambda: restoring is None or restoring.is_done, math.inf)
    if restoring is not None and (step := restoring.result()) is not None:
        Console(is_first=True).say(f"restored step {step} from {without_secrets(config.checkpoint.mirror)}")


def _take_number(run_dir: Path, world: World, agreement: Agreement) -> int:
    nodes = agreement.gather_texts(node_name())
    return agreement.from_first(take_attempt(run_dir, nodes) if world.is_first else 0)


def start_run(rank: Rank, *, allow_change: bool) -> tuple[Trainer, int]:
    """Put the parts together and restore them. Where the weights come from, in this order:

    1. the newest whole checkpoint of this run; 2. `train.init_from`; 3. the seed.
    """
    config, world, device = rank.config, rank.world, rank.device
    train, data = config.train, config.data
    _be_deterministic(train.deterministic if train.deterministic is not None else device.type == "cpu")
    journal = Journal(rank.run_dir / "journal", rank.attempt, world.rank)
    loader = ClipLoader(
        data,
        seed=config.run.seed,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        rank=world.rank,
        world_size=world.size,
        journal=journal,
        limits=config.limits,
    )
    seen = int(loader.manifest_hash[:15], 16)
    if not rank.agreement.all_true(seen == rank.agreement.from_first(seen)):
        raise RuntimeError("the data set grew while the ranks were starting, and they see different manifests of it")
    model = Pretraining(
        config.model.size,
        config.objective,
        frames=data.frames,
        size=data.size,
        seed=config.run.seed,
        activation_checkpointing=train.activation_checkpointing,
    )
    decisions = Decisions(rank.run_dir / "journal", is_writer=world.is_first)
    if world.is_first:
        delete_void(rank.run_dir, decisions)
    resumes = bool(rank.agreement.from_first(len(candidates(rank.run_dir))))
    if train.init_from is not None and not resumes:
        fresh = load_initial(model, Path(train.init_from))
        rank.console.say(f"weights from {train.init_from}" + (f"; new: {', '.join(fresh)}" if fresh else ""))
    meter = Meter(
        model.training_flops(),
        num_clips=train.global_batch,
        world_size=world.size,
        device=device,
        precision=train.precision,
        gather=rank.agreement.gather,
    )
    optimizer = build_optimizer(model, config.optim)
    engine = Engine(
        model,
        optimizer,
        train=train,
        zero=config.zero,
        world=world,
        device=device,
        size=data.size,
        seed=config.run.seed,
    )
    ledger = Ledger(rank.run_dir / "ledger", rank.attempt, world.rank)
    has_mirror = world.is_first and config.checkpoint.mirror is not None
    mirroring = Mirroring(rank.run_dir, rank.attempt, config.checkpoint) if has_mirror else None
    pinned = mirroring.pinned if mirroring is not None else tuple
    saver = Saver(rank.run_dir, rank.attempt, world, config.checkpoint, pinned=pinned)
    recovery = Recovery(
        run_dir=rank.run_dir,
        config=config,
        attempt=rank.attempt,
        world=world,
        agreement=rank.agreement,
        engine=engine,
        loader=loader,
        ledger=ledger,
        saver=saver,
        decisions=decisions,
        versions=_versions(),
    )
    start = recovery.resume(allow_change=allow_change)
    recovery.reserve()
    if mirroring is not None and start:  # what the attempt before did not get there
        mirroring.offer(start)
    if world.is_first:
        _describe(rank.run_dir, config)
    num_runs = loader.num_samples // data.run_length
    if data.run_length > 1 and num_runs < FEW_RUNS:
        rank.console.say(f"order    only {num_runs} runs of data.run_length={data.run_length} to shuffle: lower it")
    evaluation = None
    found_out = held_out(data) if config.eval.every_steps else None
    if config.eval.every_steps and found_out is None:
        rank.console.say(f"eval     none: data.shards holds nothing out (no split {data.eval_split})")
    if found_out is not None:
        evaluation = Evaluation(
            found_out,
            config.eval,
            micro_batch=train.micro_batch,
            seed=config.run.seed,
            world=world,
            limits=config.limits,
        )
    tracker = Tracker(rank.run_dir, rank.attempt, config.track, is_first=world.is_first, resumed_from=start)
    rank.console.start(config, world, engine.num_micro_steps, loader.num_samples, start, rank.attempt)
    setup_s = time.perf_counter() - rank.begun_s
    facts = {"world_size": world.size, "zero_stage": config.zero.stage, "setup_s": setup_s}
    tracker.write({"kind": "start", "step": start, **facts})
    trainer = Trainer(
        config=config,
        loader=loader,
        engine=engine,
        ledger=ledger,
        recovery=recovery,
        evaluation=evaluation,
        rounds=Rounds(rank.agreement, rank.flag, saver),
        flag=rank.flag,
        watchdog=rank.watchdog,
        ladder=FailureLadder(config.failure, decisions.skips_before(start)),
        tracker=tracker,
        meter=meter,
        console=rank.console,
        mirroring=mirroring,
    )
    return trainer, start


def _finished(run_dir: Path, steps: int) -> Outcome | None:
    """A run that reached its last step is done; asking for more steps goes on from there (with --change)."""
    try:
        step = int(json.loads((run_dir / "DONE").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return None
    return Outcome("finished", step, f"{run_dir} is finished (step {step})") if step >= steps else None


def _make_run_folder(run_dir: Path) -> None:
    """The folder, private to its owner (C14)."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        run_dir.chmod(0o700)
        for name in ("logs", "ledger", "journal", "attempts", "checkpoints", "pictures"):
            (run_dir / name).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir is {run_dir}; it must be a folder that can be written ({error.strerror}): make room (df -h, "
            "quota) or have it mended; only a new run may take run.dir=ELSEWHERE"
        ) from error


def _describe(run_dir: Path, config: Config) -> None:
    """What really runs: the config, and an allow-list of facts about the machine. A DONE of fewer steps is void."""
    settings = yaml.safe_dump(without_secrets(config.model_dump(mode="json")), sort_keys=False)
    write_atomic(run_dir / "config.yaml", settings.encode())
    write_atomic(run_dir / "environment.json", json.dumps(_environment(), indent=1).encode() + b"\n")
    (run_dir / "DONE").unlink(missing_ok=True)


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _log_to(path: Path, attempt: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(_BareUrls(f"%(asctime)s attempt {attempt} %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for before in [before for before in root.handlers if isinstance(before, logging.FileHandler)]:
        root.removeHandler(before)  # of the attempt that was rolled back
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for noisy in ("DeepSpeed", "fsspec", "botocore", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _BareUrls(logging.Formatter):
    """C14: no user info and no query of a URL reaches a log, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with every URL bare."""
        return str(without_secrets(super().format(record)))


def _be_deterministic(wanted: bool) -> None:
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False  # would write gigabytes of unused buckets
        torch.backends.cudnn.benchmark = False
