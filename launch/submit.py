"""`tubelet submit`: config ─ checks ─ snapshot of code and config in the run folder ─ sbatch slurm/pretrain.sh."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.job import MORE, has_program, jobs_of, mark_of, outer_environment
from launch.slurm import NODES
from launch.snapshot import ROOT, Revision, note, revision, settings_of, take_snapshot
from launch.standing import done_step, newest_start
from pretrain.config import Config, load_config
from shards.errors import UserError

SCRIPT = "slurm/pretrain.sh"


@dataclass(frozen=True)
class Wanted:
    """The resources of a job. What is None is left to the script's own lines and to the partition."""

    nodes: int = 1
    gpus: int | None = None
    """Of each node; as many ranks run there."""
    time: str | None = None
    partition: str | None = None
    more: tuple[str, ...] = ()
    """Further options of sbatch, as they are."""


@dataclass(frozen=True)
class Submitted:
    """What was submitted, or would be."""

    job: str | None
    """None for a dry run."""
    command: tuple[str, ...]
    run_dir: Path
    code: Path | None
    revision: Revision
    settings: dict[str, Any]

    def lines(self) -> list[str]:
        """For a person."""
        if self.job is None:
            return [f"would run: {shlex.join(self.command)}", f"code: {self.revision}", "nothing was submitted"]
        return [
            f"job {self.job}: {self.run_dir}",
            f"code: {self.code} ({self.revision}); later edits do not change this job",
            f"log: {self.run_dir}/logs/slurm-{self.job}.log",
            f"to save and stop it for good: touch {shlex.quote(str(self.run_dir / 'STOP'))}",
        ]

    def to_json(self) -> dict[str, Any]:
        """For a machine."""
        return {
            "job": self.job,
            "command": list(self.command),
            "run": str(self.run_dir),
            "code": None if self.code is None else str(self.code),
            "commit": self.revision.commit,
            "is_dirty": self.revision.is_dirty,
            "config": self.settings,
        }


def submit(
    config_file: Path,
    overrides: Sequence[str],
    wanted: Wanted,
    *,
    allow_change: bool = False,
    dry_run: bool = False,
) -> Submitted:
    """Submit the run that the config describes; `dry_run` only says how.

    Raises `UserError` for a config with problems, a run that is finished or has a job already, and without Slurm.
    """
    config = load_config(config_file, overrides)
    settings, run_dir = settings_of(config), Path(config.run.dir)
    _check_size(config, wanted)
    step = done_step(run_dir)
    if step is not None and step >= config.train.steps:
        raise UserError(
            f"train.steps is {config.train.steps}; {run_dir} is finished (step {step}): look at it with "
            f"`tubelet report {shlex.quote(str(run_dir))}`, or ask for more steps with --change"
        )
    change = ["--change"] * allow_change
    if dry_run:
        command = _command(run_dir, run_dir / "code/NNN", wanted, change)
        return Submitted(None, tuple(command), run_dir, None, revision(), settings)
    if not has_program("sbatch"):
        raise UserError(
            "sbatch is not on the PATH; submit must run where Slurm's commands are: log in to a login node of the "
            f"cluster, or on one machine use `tubelet pretrain {shlex.quote(str(config_file))}`"
        )
    if jobs := jobs_of(run_dir, newest_start(run_dir)):
        run = shlex.quote(str(run_dir))
        raise UserError(
            f"{run_dir} has job {jobs[0].id} already ({jobs[0].state}); a run has one job at a time: see it with "
            f"`tubelet status {run}`, end it with `touch {run}/STOP`, which saves, or `scancel {jobs[0].id}`"
        )
    if (run_dir / "STOP").exists():
        raise UserError(f"{run_dir}/STOP is there; the job would end at its start: remove it, then submit")
    if not (ROOT / SCRIPT).is_file():
        raise UserError(
            f"{ROOT / SCRIPT} is missing; submit needs the project folder: install it with pip install -e ."
        )
    return _submit(config, run_dir, wanted, change, settings)


def _submit(
    config: Config, run_dir: Path, wanted: Wanted, change: Sequence[str], settings: dict[str, Any]
) -> Submitted:
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    run_dir.chmod(0o700)
    code = take_snapshot(run_dir, config)
    command = _command(run_dir, code, wanted, change)
    done = subprocess.run(command, env=_environment(code, wanted), capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(code)
        raise UserError(
            f"sbatch refused ({done.stderr.strip()}): change --nodes, --time, --partition or --sbatch; the line was: "
            f"{shlex.join(command)}"
        )
    job = done.stdout.strip().partition(";")[0]
    note(code, {"job": job, "command": command})
    return Submitted(job, tuple(command), run_dir, code, revision(), settings)


def _command(run_dir: Path, code: Path, wanted: Wanted, change: Sequence[str]) -> list[str]:
    code, logs = code.resolve(), run_dir.resolve() / "logs"
    name = re.sub(r"[^\w.-]", "_", run_dir.resolve().name)
    filled = {"nodes": wanted.nodes, "time": wanted.time, "partition": wanted.partition}
    if wanted.gpus:
        filled |= {"gpus-per-node": wanted.gpus, "ntasks-per-node": wanted.gpus}
    return [
        *("sbatch", "--parsable", "--export=ALL", f"--job-name={name}", f"--comment={mark_of(run_dir)}"),
        f"--output={str(logs).replace('%', '%%')}/slurm-%j.log",
        *(f"--{option}={value}" for option, value in filled.items() if value is not None),
        *wanted.more,
        str(code / SCRIPT),
        str(code / "config.yaml"),
        *change,
    ]


def _environment(code: Path, wanted: Wanted) -> Mapping[str, str]:
    """The job finds the code and the Python that it was submitted with."""
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    ours = {"TUBELET_CODE": str(code.resolve()), NODES: str(wanted.nodes), MORE: shlex.join(wanted.more)}
    return {**outer_environment(), "PATH": path, **ours}


def _check_size(config: Config, wanted: Wanted) -> None:
    if config.launch.min_nodes > wanted.nodes:
        raise UserError(
            f"launch.min_nodes is {config.launch.min_nodes}; it must not exceed --nodes ({wanted.nodes}): change one"
        )
    num_ranks = wanted.nodes * (wanted.gpus or 1)
    if num_ranks > config.train.global_batch:
        raise UserError(
            f"train.global_batch is {config.train.global_batch}; each of {num_ranks} ranks needs at least one clip: "
            "ask for fewer nodes or GPUs, or raise it in a new run"
        )
