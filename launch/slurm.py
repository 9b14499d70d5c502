"""What the batch script asks before and after its one srun line: is the config sound, how did it end, what now.

    launch.slurm before CONFIG …   check the config; print the number of the newest attempt
    srun … launch.node CONFIG …    train
    launch.slurm after SINCE CODE CONFIG …   finished -> 0; a person is needed -> 93; else back into the queue

srun's exit code is no guide (143 when a rank asked for another try): the run folder is.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import outcome
from launch.node import DEMO_CONFIG, split_arguments, start_token
from pretrain.attempt import attempt_of, newest_attempt, read_outcome, read_refusal
from pretrain.config import load_config
from shards.errors import UserError

MAX_STARTS_WITHOUT_PROGRESS = 3
"""Starts in a row that end at no newer checkpoint before a person is asked: a crash loop helps nobody."""

_COPIED = {
    "JobName": "job-name",
    "Partition": "partition",
    "Account": "account",
    "QOS": "qos",
    "Reservation": "reservation",
    "Features": "constraint",
    "TimeLimit": "time",
    "NumNodes": "nodes",
    "CPUs/Task": "cpus-per-task",
    "MinMemoryNode": "mem",
    "MinMemoryCPU": "mem-per-cpu",
    "StdOut": "output",
}
"""Fields of `scontrol show job` and the sbatch options that ask for the same."""


def main(arguments: Sequence[str]) -> int:
    """`before CONFIG …` or `after SINCE CODE CONFIG …`; the exit code is the batch script's."""
    verb, *rest = arguments
    try:
        if verb == "before":
            print(before(rest))
            return 0
        since, code, *rest = rest
        return after(int(since), int(code), rest, os.environ)
    except UserError as error:
        _say(str(error))
        return outcome.PERSON_NEEDED


def before(arguments: Sequence[str]) -> int:
    """Number of the newest attempt. Raises `UserError` for a config with problems, before any rank starts."""
    if split_arguments(arguments)[0] not in arguments:
        _say(f"no config named: running {DEMO_CONFIG}; for yours: sbatch slurm/pretrain.sh CONFIG key=value …")
    return newest_attempt(_run_dir(arguments))


def after(since: int, code: int, arguments: Sequence[str], slurm: Mapping[str, str]) -> int:
    """Decide from the run folder what becomes of the job; returns the exit code of the batch script."""
    run_dir = _run_dir(arguments)
    token = start_token(slurm)
    own = attempt_of(run_dir, token, since)
    ended = read_refusal(run_dir, token) if own is None else read_outcome(run_dir, own)
    _say(f"{run_dir}: {ended.reason if ended else 'the ranks ended without a word'} (srun returned {code})")
    decided = outcome.exit_code(run_dir, token=token, since=since, launcher_code=code)
    if decided in (outcome.FINISHED, outcome.PERSON_NEEDED):
        return decided
    if _no_progress(run_dir, since, slurm):
        _say(
            f"{MAX_STARTS_WITHOUT_PROGRESS} starts in a row reached no new checkpoint: not queued again. "
            f"Read the log of this job and {run_dir}/logs/, then submit again"
        )
        return outcome.PERSON_NEEDED
    return requeue(arguments, slurm)


def requeue(arguments: Sequence[str], slurm: Mapping[str, str]) -> int:
    """Put this job back into the queue, or a copy of it where that is forbidden. Returns 75.

    `scontrol requeue` ends this process too: everything must be on disk before.
    """
    job = slurm.get("SLURM_JOB_ID", "")
    shown = _run("scontrol", "show", "job", "--oneliner", job)
    facts = job_facts(shown.stdout)
    if facts.get("JobState") == "CANCELLED":
        _say(f"job {job} was cancelled: not queued again")
        return outcome.TRY_AGAIN
    again = _run("scontrol", "requeue", job)
    if again.returncode == 0:
        _say(f"job {job} is queued again")
        return outcome.TRY_AGAIN
    _say(f"job {job} cannot be requeued ({again.stderr.strip()}): submitting a copy that follows it")
    with tempfile.TemporaryDirectory() as folder:
        script = f"{folder}/{facts.get('JobName', 'tubelet')}"
        written = _run("scontrol", "write", "batch_script", job, script)
        copy = _run("sbatch", *copy_options(slurm, facts), script, *arguments) if not written.returncode else written
    _say(f"{copy.stdout.strip()}{copy.stderr.strip()}")
    if copy.returncode:
        _say("no copy was submitted: submit the same line again by hand")
    return outcome.TRY_AGAIN


def job_facts(shown: str) -> dict[str, str]:
    """`scontrol show job --oneliner` -> its fields; those with spaces in them (Command) are cut short."""
    return dict(re.findall(r"(?:^|\s)([A-Z][\w/:]*)=(\S*)", shown))


def copy_options(slurm: Mapping[str, str], facts: Mapping[str, str]) -> list[str]:
    """The sbatch options that give a copy this job's resources: the command line may have overridden the script."""
    options = [f"--dependency=afterany:{slurm['SLURM_JOB_ID']}"]
    for field, option in _COPIED.items():
        value = facts.get(field, "")
        if value not in ("", "0", "(null)", "N/A"):
            options.append(f"--{option}={value}")
    if "SLURM_NTASKS_PER_NODE" in slurm:
        options.append(f"--ntasks-per-node={slurm['SLURM_NTASKS_PER_NODE']}")
    gpus = re.fullmatch(r"gres[:/]gpu[:=](.+)", facts.get("TresPerNode", ""))
    if gpus:
        options.append(f"--gpus-per-node={gpus[1]}")
    return options


def _run_dir(arguments: Sequence[str]) -> Path:
    config, words = split_arguments(arguments)
    return Path(load_config(config, [word for word in words if word != "--change"]).run.dir)


def _no_progress(run_dir: Path, since: int, slurm: Mapping[str, str]) -> bool:
    """Whether the last starts all ended before a new checkpoint, or before they could even take an attempt."""
    if newest_attempt(run_dir) > since:
        return outcome.starts_without_progress(run_dir) >= MAX_STARTS_WITHOUT_PROGRESS
    return int(slurm.get("SLURM_RESTART_COUNT", "0")) + 1 >= MAX_STARTS_WITHOUT_PROGRESS


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _say(text: str) -> None:
    """On stderr: the batch script reads stdout."""
    print(f"tubelet: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
