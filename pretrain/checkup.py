"""The checks of a check-up in their order, and its report. Started by pretrain/doctor.py.

phase by phase: rank 0 asks (rollcall.py) ─ all measure (symptoms.py) ─ rank 0 judges (diagnosis.py) ─ report

RUN/doctor.json             {time, checks, blamed_nodes, …}, the newest report
RUN/attempts/blamed.jsonl   a row {node, attempt, by, reason, time} per node at fault
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from pretrain import diagnosis, symptoms
from pretrain.attempt import node_name, start_token
from pretrain.config import Config, load_config
from pretrain.finding import PROBLEM, Check, Places, is_fit, lines, next_command
from pretrain.memory import arithmetic, checkpoint_bytes, memory_of_run
from pretrain.metrics import read_rows
from pretrain.network import BF16_BYTES, FP32_BYTES, network_of
from pretrain.patience import Hurry, Limits
from pretrain.recovery import refuse_other_config, refuse_other_data
from pretrain.redact import without_secrets
from pretrain.rollcall import Answer, CutShort, RollCall, Round, Work, within
from pretrain.stop import watch_parents
from pretrain.world import World, world_from_environment
from shards.errors import UserError
from shards.storage import write_atomic

NOT_FIT = 2
JSON, CHANGE = "--json", "--change"
NUM_CLOCK_ROUNDS = 3
SHARDS_LIMIT_S = 120.0
"""Opening a large index comes before the reading."""
NUM_ROWS = 20
"""Newest rows of the metrics that say how long a step and a save take."""

Told = Mapping[str, Any]


def work_of(call: RollCall, config: Config, name: str) -> Work:
    """What every rank does in the phase of that name."""
    rank, device, url = call.world.rank, symptoms.compute_device(call.world), config.checkpoint.mirror
    run_dir = Path(config.run.dir)

    def folder(told: Told) -> Path:
        return run_dir / f".doctor-{told['token']}"

    def others(told: Told) -> list[int]:
        return [other for other in range(call.world.size) if other not in told["silent"]]

    def only(rank_of: int, work: Callable[[Told], Answer]) -> Work:
        """Once per node, or once: what a check would only repeat elsewhere is left out there."""
        return lambda told: work(told) if rank_of == 0 else {}

    works: dict[str, Work] = {
        "ranks": lambda told: symptoms.machine(config),
        "config": only(rank, lambda told: _refuse(config, allow_change=told["allow_change"])),
        "run folder": only(rank, lambda told: symptoms.begin_folder(folder(told), told["token"])),
        "run folder, written": lambda told: symptoms.write_folder(folder(told), told["token"], rank),
        "run folder, seen": lambda told: symptoms.see_folder(folder(told), told["token"], rank, others(told)),
        "space": only(rank, lambda told: symptoms.end_folder(folder(told))),
        "clocks": lambda told: {"time": time.time()},
        "all-reduce": lambda told: symptoms.reduce_sums(call, device),
        "shards": lambda told: symptoms.read_samples(config, told["token"], call.world),
        "mirror": only(
            call.world.local_rank if url else 1, lambda told: symptoms.write_mirror(url or "", told["token"], rank)
        ),
        "memory": lambda told: symptoms.device_memory(call.world, device),
    }
    return works[name]


def _refuse(config: Config, *, allow_change: bool) -> Answer:
    refuse_other_config(Path(config.run.dir), config, allow_change=allow_change)
    manifests = refuse_other_data(Path(config.run.dir), config)
    splits = [split for manifest in manifests for name, split in manifest.splits.items() if name == config.data.split]
    return {"max_pixels": max((split.max_pixels for split in splits), default=config.data.size**2)}


@dataclass
class CheckUp:
    """All checks in order, as rank 0 leads them."""

    call: RollCall
    config: Config
    allow_change: bool = False
    places: Places = field(default_factory=lambda: Places(()))
    token: str = field(default_factory=lambda: secrets.token_hex(6))
    """Tells what this check-up leaves lying about from everything else."""
    phase: str = ""
    """The one under way."""
    device: str = "cpu"
    """What ranks compute on."""

    def checks(self) -> list[Check]:
        """Every check that could be made. The ranks are judged last: they may fall silent at any time."""
        found: list[Check] = []
        try:
            for check in self._checks():
                found += [check]
        except CutShort as cut:
            seen = f"the launcher ended the ranks: {cut} and what follows was not looked at"
            found += [Check("rest", "fail", seen, "mend what is named here, then run this again")]
        ranks = diagnosis.ranks(self.places, self.call.silent)
        if self.call.hurry:  # the launcher gave the others no time to answer: nobody can be blamed for that
            ranks = replace(ranks, nodes=())
        return [ranks, *found]

    def _ask(self, name: str, limit_s: float | None = None) -> Round:
        if name != self.phase:
            print(f"doctor: {name} …", file=sys.stderr, flush=True)
        self.phase = name
        tell = {"token": self.token, "silent": list(self.call.silent), "allow_change": self.allow_change}
        return self.call.ask(name, work_of(self.call, self.config, name), tell=tell, limit_s=limit_s)

    def _checks(self) -> Iterator[Check]:
        config, run_dir = self.config, Path(self.config.run.dir)
        self.places = Places(expected_nodes(self.call.world))
        here = self._ask("ranks", self.call.limits.come_up_s).answers
        known = [answer["node"] if answer and "node" in answer else None for answer in here]
        self.places = Places([found or guess for found, guess in zip(known, self.places.nodes, strict=True)])
        versions = diagnosis.versions(here, self.places)
        yield versions
        if diagnosis.problems(here):
            return  # a rank without the config cannot go on

        accepted = self._ask("config").answers[0] or {}
        yield diagnosis.config(str(accepted.get(PROBLEM, "")))
        yield from self._folder(run_dir)
        rounds = [self._ask("clocks") for _ in range(NUM_CLOCK_ROUNDS)]
        yield diagnosis.clocks([(r.begun_s, r.answers, r.arrived_s) for r in rounds], self.places)

        pace = Pace.of(within(partial(measured, run_dir), self.call.limits.phase_s))
        room, network = self._ask("memory").answers, network_of(config)
        # of a data set that cannot be read even the widest video is not known; the frames that are trained on are
        need = memory_of_run(network, config, self.call.world.size, accepted.get("max_pixels", config.data.size**2))
        yield diagnosis.memory(room, self.places, need)
        devices = {answer["versions"]["device"] for answer in here if answer}
        self.device = max(devices)  # cuda, where any has it
        if self.call.silent or diagnosis.problems(room) or len(devices) > 1:
            seen = "not run: it would hang without every rank and its device"
            yield Check("all-reduce", "warn", seen, "mend what failed above first")
        else:
            sums = self._ask("all-reduce").answers
            is_bf16 = arithmetic(config.train.precision, config.zero.stage) == "bf16"
            gradient_bytes = network.num_parameters * (BF16_BYTES if is_bf16 else FP32_BYTES)
            yield diagnosis.all_reduce(sums, self.places, gradient_bytes=gradient_bytes, step_s=pace.step_s)
        samples = self._ask("shards", max(SHARDS_LIMIT_S, self.call.limits.phase_s)).answers
        yield diagnosis.shards(
            samples,
            self.places,
            per_step=config.train.global_batch // config.data.clips_per_video,
            step_s=pace.step_s,
            bad_limit=config.data.bad_sample_limit,
        )
        yield diagnosis.mirror(self._ask("mirror").answers, self.places, config.checkpoint.mirror)
        if "SLURM_JOB_ID" in os.environ:
            yield from slurm_checks(config, pace, os.environ)

    def _folder(self, run_dir: Path) -> Iterator[Check]:
        begun = self._ask("run folder").answers
        if diagnosis.problems(begun):
            yield diagnosis.run_folder(begun, begun, self.places, str(run_dir))
            return
        written, seen = self._ask("run folder, written").answers, self._ask("run folder, seen").answers
        yield diagnosis.run_folder(written, seen, self.places, str(run_dir))
        room = self._ask("space").answers[0] or {PROBLEM: "no answer"}
        bytes_ = checkpoint_bytes(network_of(self.config), self.config.optim)
        yield diagnosis.space(room, bytes_, num_at_most=num_kept_at_most(self.config), run_dir=str(run_dir))


@dataclass(frozen=True)
class Pace:
    """How long the run that is in the folder takes for things; None where it has not done them yet."""

    step_s: float | None = None
    save_s: float | None = None

    @classmethod
    def of(cls, answer: Answer) -> Pace:
        """From what `measured` found; nothing where that failed."""
        return cls(answer.get("step_s"), answer.get("save_s"))


def num_kept_at_most(config: Config) -> int:
    """Checkpoints in the run folder at its fullest: those kept, those kept for ever, and one that is being written."""
    every = config.checkpoint.keep_every_steps
    return config.checkpoint.keep + (config.train.steps // every if every else 0) + 1


def measured(run_dir: Path) -> Answer:
    """Step: the median of the newest rows. Save: the longest of them, until all is written."""
    rows = read_rows(run_dir)
    steps_s = [row["step_s"] for row in rows if row["kind"] == "train" and row.get("step_s")][-NUM_ROWS:]
    saves_s = [row["seconds"] + (row.get("write_s") or 0.0) for row in rows if row["kind"] == "save"][-NUM_ROWS:]
    return {"step_s": median(steps_s) if steps_s else None, "save_s": max(saves_s, default=None)}


def expected_nodes(world: World) -> list[str]:
    """Where each rank should be, for those that never say: `node0*8/node1*8` in TUBELET_PLACES, or all are here."""
    listed: list[str] = []
    for part in filter(None, os.environ.get("TUBELET_PLACES", "").split("/")):
        name, _, number = part.partition("*")
        listed += [name] * int(number or 1)
    if len(listed) == world.size:
        return listed
    return [node_name() if world.local_size == world.size else "node unknown"] * world.size


def slurm_checks(config: Config, pace: Pace, env: Mapping[str, str]) -> Iterator[Check]:
    """What only a job has. The signal's lead is sure in TUBELET_SIGNAL_LEAD_S; else it was read in a script."""
    if config.launch.prologue.strip():
        yield diagnosis.prologue()
    own_s, read_s = env.get("TUBELET_SIGNAL_LEAD_S"), env.get("TUBELET_SCRIPT_LEAD_S")
    lead_s, script = own_s or read_s, "" if own_s else env.get("TUBELET_SCRIPT", "the batch script")
    yield diagnosis.signal_lead(float(lead_s) if lead_s else None, pace.save_s, pace.step_s, script)


# ------------------------------------------------------------------------------------------------ the report


def make_report(checks: Sequence[Check], places: Places, run_dir: Path, device: str = "cpu") -> dict[str, Any]:
    """What is printed and written."""
    blamed = dict.fromkeys(node for check in checks if check.level == "fail" for node in check.nodes)
    return {
        "time": time.time(),
        "start": start_token(),
        "run_dir": str(run_dir),
        "world_size": len(places.nodes),
        "nodes": list(dict.fromkeys(places.nodes)),
        "device": device,
        "checks": [check.to_json() for check in checks],
        "blamed_nodes": sorted(blamed),
    }


def write_report(report: Mapping[str, Any], run_dir: Path) -> Answer:
    """doctor.json, and a row per node at fault for who requeues the job."""
    symptoms.make_private(run_dir)
    write_atomic(run_dir / "doctor.json", json.dumps(report, indent=1).encode() + b"\n")
    rows = b""
    for node in report["blamed_nodes"]:
        reasons = [f"{check['name']}: {check['seen']}" for check in report["checks"] if node in check["nodes"]]
        row = {"node": node, "attempt": None, "by": "doctor", "reason": "; ".join(reasons), "time": report["time"]}
        rows += json.dumps(row).encode() + b"\n"
    if rows:
        (run_dir / "attempts").mkdir(exist_ok=True)
        file = os.open(run_dir / "attempts" / "blamed.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, rows)
            os.fsync(file)
        finally:
            os.close(file)
    return {}


def examine(call: RollCall, config: Config, *, allow_change: bool) -> dict[str, Any]:
    """Rank 0: all checks, and the report, written where it can be."""
    check_up = CheckUp(call, config, allow_change)
    checks = check_up.checks()
    run_dir = Path(config.run.dir)
    report = make_report(checks, check_up.places, run_dir, check_up.device)
    unwritten = within(partial(write_report, report, run_dir), call.limits.slack_s).get(PROBLEM)
    if unwritten:
        print(f"doctor: {run_dir}/doctor.json could not be written: {without_secrets(unwritten)}", file=sys.stderr)
    return report


# ------------------------------------------------------------------------------------------------ one rank


def take_part(words: Sequence[str], limits: Limits, hurry: Hurry) -> int:
    """One rank's part: rank 0 leads and prints the report, the others follow. Returns the exit code."""
    world = world_from_environment()
    watch_parents()
    try:
        call = RollCall(world, limits, hurry)
    except RuntimeError as error:  # torch's
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        print(f"error: rank {world.rank} ({node_name()}) does not reach rank 0 at {place}: {error}", file=sys.stderr)
        return NOT_FIT
    return _lead(call, words) if world.is_first else _follow(call, words)


def _lead(call: RollCall, words: Sequence[str]) -> int:
    """Rank 0: ask, judge, print."""
    try:
        config = _config(words)
    except UserError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        call.finish(NOT_FIT)
        return NOT_FIT
    report = examine(call, config, allow_change=CHANGE in words)
    if JSON in words:
        print(json.dumps(report), flush=True)
    else:
        named = [word for word in words if word not in (JSON, CHANGE)]
        print("\n".join([*lines(report), next_command(report, named)]), flush=True)
    code = 0 if is_fit(report) else NOT_FIT
    call.finish(code)
    return code


def _follow(call: RollCall, words: Sequence[str]) -> int:
    """Every other rank: do what rank 0 asks for; without the config, say so."""
    try:
        config = _config(words)
    except UserError as error:
        problem = {PROBLEM: str(error)}
        return call.serve(lambda name: lambda told: problem)
    return call.serve(partial(work_of, call, config))


def _config(words: Sequence[str]) -> Config:
    named = [word for word in words if word not in (JSON, CHANGE)]
    if not named:
        raise UserError("no config was given: python -m pretrain.doctor CONFIG.yaml [section.key=value …]")
    return load_config(named[0], named[1:])
