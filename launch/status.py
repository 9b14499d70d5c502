"""`tubelet status RUN`: the job, the step, the rate, what is safe on disk, and what to do now."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.blame import BLAMES_TO_EXCLUDE, excluded_nodes, read_blames
from launch.job import Queued, has_program, jobs_of
from launch.screen import hint
from launch.standing import Standing, read_standing
from shards.errors import UserError

QUIET_S = 600.0
"""A run that was killed without a word looks like one at work; after this long without a sign it is said."""

_SIGNS = ("config.yaml", "metrics.jsonl", "attempts", "checkpoints", "code")


@dataclass(frozen=True)
class Status:
    """Everything `tubelet status` knows."""

    run_dir: Path
    job: Queued | None
    no_job: str
    """Why there is no job, in words."""
    state: str
    """finished, running, queued, ended, silent, or never started."""
    standing: Standing
    blamed: dict[str, list[str]]
    """Node: what it was blamed for."""
    excluded: list[str]

    def lines(self) -> list[str]:
        """For a person."""
        s = self.standing
        lines = [f"{self.run_dir}: {self._state_line()}", f"job          {self._job_line()}"]
        of = "" if s.steps is None else f" of {s.steps:,} ({s.step / s.steps:.0%})"
        lines.append(f"step         {s.step:,}{of}")
        if self.state == "running" and s.steps_per_s:
            clips = "" if s.clips_per_s is None else f", {s.clips_per_s:.3g} clips/s"
            lines.append(f"rate         {_rate(s.steps_per_s)}{clips}")
        if self.state == "running" and s.eta_s is not None:
            lines.append(f"left         {duration(s.eta_s)}, until about {_clock(time.time() + s.eta_s)}")
        if s.durable is None:
            lines.append("checkpoint   none yet")
        else:
            lines.append(f"checkpoint   step {s.durable.step:,}, {duration(s.durable.age_s)} old: {s.durable.folder}")
        if s.mirrored_step is not None:
            lines.append(f"mirror       step {s.mirrored_step:,}")
        if s.attempt:
            ranks = "" if s.world_size is None else f", {s.world_size} rank{'s' * (s.world_size != 1)}"
            lines.append(f"starts       {s.attempt}{ranks}; restarts {s.attempt - 1}")
        if s.ended is not None:
            lines.append(f"last outcome {s.ended.outcome} at step {s.ended.step:,}: {s.ended.reason}")
        if s.refused:
            lines.append(f"refused      {s.refused}")
        if s.num_unborn:
            starts = "a start" if s.num_unborn == 1 else f"{s.num_unborn} starts"
            lines.append(f"since then   {starts} ended before taking a number: see {self._log()}")
        for node, reasons in self.blamed.items():
            left_out = " (excluded)" if node in self.excluded else f" (excluded from {BLAMES_TO_EXCLUDE} on)"
            lines.append(
                f"blamed       {node}, {len(reasons)} time{'s' * (len(reasons) != 1)}{left_out}: {reasons[-1]}"
            )
        return [*lines, self._next()]

    def to_json(self) -> dict[str, Any]:
        """For a machine. Times are in seconds."""
        s = self.standing
        return {
            "run": str(self.run_dir),
            "state": self.state,
            "job": None if self.job is None else asdict(self.job),
            "attempt": s.attempt,
            "restarts": max(0, s.attempt - 1),
            "world_size": s.world_size,
            "step": s.step,
            "steps": s.steps,
            "steps_per_s": s.steps_per_s,
            "clips_per_s": s.clips_per_s,
            "eta_s": s.eta_s if self.state == "running" else None,
            "checkpoint": None
            if s.durable is None
            else {"step": s.durable.step, "age_s": s.durable.age_s, "folder": str(s.durable.folder)},
            "mirrored_step": s.mirrored_step,
            "refused": s.refused or None,
            "unborn": s.num_unborn,
            "last_outcome": None if s.ended is None else asdict(s.ended),
            "quiet_s": s.quiet_s,
            "blamed": self.blamed,
            "excluded": self.excluded,
        }

    def _state_line(self) -> str:
        s = self.standing
        if self.state == "running" and s.quiet_s is not None and s.quiet_s > QUIET_S:
            return f"running, but silent for {duration(s.quiet_s)}"
        if self.state == "silent":
            return f"dead or on another machine: no outcome, and nothing written for {duration(s.quiet_s or 0)}"
        if self._needs_person():
            return "needs a person"
        return "not running; the same command goes on" if self.state == "ended" else self.state

    def _needs_person(self) -> bool:
        """Of a run that does not run: it asked for one, or its newest start was refused."""
        s = self.standing
        is_asked = s.ended is not None and s.ended.outcome == "person"
        return self.state in ("ended", "silent", "never started") and (is_asked or bool(s.refused))

    def _log(self) -> str:
        """Where the newest start wrote."""
        logs = sorted(self.run_dir.glob("logs/slurm-*.log"), key=lambda log: log.stat().st_mtime)
        return shlex.quote(str(logs[-1] if logs else self.run_dir / "logs" / "rank-0.log"))

    def _job_line(self) -> str:
        if self.job is None:
            return self.no_job
        job = self.job
        where = f"waits: {job.reason}" if job.state == "PENDING" else f"on {job.reason}, {job.time_left} left"
        return f"{job.id} {job.state.lower()}, {job.num_nodes} node{'s' * (job.num_nodes != '1')}, {where}"

    def _next(self) -> str:
        run = shlex.quote(str(self.run_dir))
        if self.state == "finished":
            return hint("report", self.run_dir)
        if self.state in ("running", "queued"):
            return hint("status", self.run_dir) if not self.standing.attempt else hint("report", self.run_dir)
        if self._needs_person():
            return f"next: less {self._log()}"
        if self.state == "never started":
            return "next: tubelet submit CONFIG run.dir=" + run
        if self.standing.durable:
            return "next: the line that started it, `tubelet submit …` or `tubelet pretrain …`"
        return f"next: less {self._log()}"


def status(run_dir: Path) -> Status:
    """Look at Slurm and at the run folder. Raises `UserError` where no run has been."""
    if not any((run_dir / name).exists() for name in _SIGNS):
        raise UserError(
            f"{run_dir} is not a run folder (none of {', '.join(_SIGNS)} in it); "
            "give the folder that run.dir named: for example runs/demo"
        )
    standing = read_standing(run_dir)
    no_job, jobs = "", list[Queued]()
    if has_program("squeue"):
        try:
            jobs = jobs_of(run_dir, standing.start if standing.ended is None else "")
            no_job = "none waits or runs in Slurm"
        except UserError as error:
            no_job = str(error)
    else:
        no_job = "not under Slurm (no squeue here)"
    blames = read_blames(run_dir)
    return Status(
        run_dir,
        jobs[0] if jobs else None,
        no_job,
        _state(standing, jobs),
        standing,
        {
            node: [f"{b.by}, attempt {b.attempt}: {b.reason}" for b in blames if b.node == node]
            for node in dict.fromkeys(blame.node for blame in blames)
        },
        list(excluded_nodes(run_dir)),
    )


def _state(standing: Standing, jobs: list[Queued]) -> str:
    if standing.done_step is not None and standing.done_step >= (standing.steps or 0):
        return "finished"
    if any(job.state != "PENDING" for job in jobs):
        return "running"
    if jobs:
        return "queued"
    if not standing.attempt:
        return "never started"
    if standing.ended is not None:
        return "ended"
    if not standing.start:  # torchrun and deepspeed leave no mark on their processes
        return "running" if standing.quiet_s is not None and standing.quiet_s < QUIET_S else "silent"
    return "running" if is_here(standing.start) else "silent"


def is_here(token: str) -> bool:
    """Whether a rank of this start lives on this machine."""
    wanted = f":{token}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if token and any(v.startswith(b"TUBELET_START=") and v.endswith(wanted) for v in variables):
            return True
    return False


def duration(seconds: float) -> str:
    """Two units at most: 3 d 4 h, 2 h 10 min, 45 s."""
    whole = round(seconds)
    for unit, name, smaller, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // smaller
            return f"{whole // unit} {name}" + (f" {rest} {small_name}" if rest else "")
    return f"{whole} s"


def _rate(steps_per_s: float) -> str:
    return f"{steps_per_s:.3g} steps/s" if steps_per_s >= 1 else f"{1 / steps_per_s:.3g} s per step"


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(moment))
