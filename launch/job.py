"""A job as Slurm knows it: its facts, the jobs of a run, what nodes are left, back into the queue, a copy of it."""

from __future__ import annotations

import getpass
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError

MARK = "tubelet "
"""A job's comment is this and its run folder: so that `status` and `submit` find the jobs of a run."""

PATIENCE_S, PAUSE_S = 600.0, 15.0
"""How long a controller that does not answer is asked again, and how often."""

UNUSABLE = ("down", "drain", "fail", "error", "unknown", "inval", "powering_down", "powered_down", "future")

_COPIED = {
    "JobName": "job-name",
    "Partition": "partition",
    "Account": "account",
    "QOS": "qos",
    "Reservation": "reservation",
    "Features": "constraint",
    "TimeLimit": "time",
    "CPUs/Task": "cpus-per-task",
    "MinMemoryNode": "mem",
    "MinMemoryCPU": "mem-per-cpu",
    "StdOut": "output",
}
"""Fields of `scontrol show job` and the sbatch options that ask for the same."""
_GPUS = {
    "TresPerJob": "gpus",
    "TresPerNode": "gpus-per-node",
    "TresPerSocket": "gpus-per-socket",
    "TresPerTask": "gpus-per-task",
}
MORE = "TUBELET_SBATCH"
"""Environment variable: further options of sbatch that the job was submitted with (`tubelet submit --sbatch`)."""
_NOT_AGAIN = {
    *("array", "a", "begin", "b", "hold", "H", "wait", "W", "test-only", "parsable"),
    *("nodelist", "w", "nodefile", "F", "nodes", "N", "exclude", "x", "dependency", "d", "comment"),
}
"""Options that were meant for the first submission only, and those that a copy says itself."""


@dataclass(frozen=True)
class Queued:
    """A job that waits or runs."""

    id: str
    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETING, …"""
    reason: str
    """Why it waits; of a running job, its nodes."""
    num_nodes: str
    time_left: str


def mark_of(run_dir: Path) -> str:
    """The comment of the jobs of this run."""
    return f"{MARK}{run_dir.resolve()}"


def jobs_of(run_dir: Path, started_by: str = "") -> list[Queued]:
    """My jobs on this run that wait or run, also that of the start token `started_by`; none without Slurm here.

    Raises `UserError` where Slurm is there and does not answer.
    """
    if not has_program("squeue"):
        return []
    done = ask("squeue", "--noheader", "--user", getpass.getuser(), "--format=%i|%T|%D|%L|%R|%k", patience_s=0)
    if done.returncode:
        raise UserError(f"squeue failed ({done.stderr.strip()}): try again, or ask who runs this Slurm")
    token = re.fullmatch(r"slurm-(\d+)\.\d+", started_by)
    found: list[Queued] = []
    for line in done.stdout.splitlines():
        fields = line.split("|", 5)
        if len(fields) != 6:
            continue
        job, state, num_nodes, left, reason, comment = fields
        if comment.strip() == mark_of(run_dir) or (token and job == token[1]):
            found.append(Queued(job, state, reason.strip("()"), num_nodes, left))
    return sorted(found, key=lambda job: job.state == "PENDING")


def facts_of(job: str) -> dict[str, str]:
    """Fields of `scontrol show job`; those with spaces in them are cut short, but for JobName and StdOut."""
    shown = ask("scontrol", "show", "job", job).stdout  # with --oneliner nobody could tell where these two end
    to_the_end_of_line = re.findall(r"^(?:JobId=.*? | +)(JobName|StdOut)=(.*)$", shown, re.MULTILINE)
    return dict(re.findall(r"(?:^|\s)([A-Z][\w/:]*)=(\S*)", shown)) | dict(to_the_end_of_line)


def hostnames(nodes: str) -> list[str]:
    """Slurm's short list, as in "gpu[03-05]" -> its names, in rank order."""
    if nodes in ("", "(null)"):
        return []
    done = ask("scontrol", "show", "hostnames", nodes)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise UserError(f"`scontrol show hostnames {nodes}` failed ({said}): try again, or ask who runs this Slurm")
    return done.stdout.split()


def partition_nodes(partition: str) -> dict[str, bool]:
    """Nodes of a partition (or several, with commas) and whether they can be used now; empty if Slurm does not say."""
    done = ask("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%T")
    rows = [line.split("|") for line in done.stdout.split()] if done.returncode == 0 else []
    return {name: not (state.endswith("*") or state.startswith(UNUSABLE)) for name, state in rows}


def requeue(job: str, exclude: Sequence[str] | None, say: Callable[[str], None]) -> bool:
    """Put the job back into the queue, without these nodes. False where Slurm forbids it, which is said.

    `exclude` is the whole list from now on, and may be empty; None leaves it as it is.

    This ends the job and soon this process: everything else must be on disk before. Slurm lets the list of nodes be
    changed only once the job waits; until the job starts again, seconds later at the earliest, there is time for it.
    """
    again = ask("scontrol", "requeue", job)
    if again.returncode:
        say(f"job {job} cannot be requeued ({again.stderr.strip()})")
        return False
    if exclude is not None:
        changed = ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(exclude)}", patience_s=0)
        if changed.returncode:
            words = f"the excluded nodes could not be changed to {','.join(exclude) or 'none'}"
            say(f"{words} ({changed.stderr.strip()}); tried again at the next start")
    say(f"job {job} is queued again")
    return True


def submit_copy(
    job: str, options: Sequence[str], arguments: Sequence[str], more_env: dict[str, str]
) -> tuple[bool, str]:
    """Submit this job's script once more with other options; (whether it worked, what Slurm said)."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        script = f"{folder}/tubelet"
        written = ask("scontrol", "write", "batch_script", job, script)
        done = (
            written
            if written.returncode
            else ask("sbatch", *options, script, *arguments, env=outer_environment() | more_env)
        )
    return done.returncode == 0, f"{done.stdout.strip()}{done.stderr.strip()}"


def copy_options(
    slurm: Mapping[str, str], facts: Mapping[str, str], run_dir: Path, nodes: str, exclude: Sequence[str]
) -> list[str]:
    """The sbatch options that give a copy this job's resources: the command line may have overridden the script.

    `nodes` is a number or a range, `exclude` the nodes to do without.
    """
    options = _meant_for_copies(shlex.split(slurm.get(MORE, "")))
    options += [f"--dependency=afterany:{slurm['SLURM_JOB_ID']}", f"--comment={mark_of(run_dir)}", f"--nodes={nodes}"]
    options += [f"--exclude={','.join(exclude)}"] * bool(exclude)
    for field, option in _COPIED.items():
        value = facts.get(field, "")
        if (
            field == "StdOut"
        ):  # a percent sign is two for sbatch, and one or two (seen with Slurm 22.05) in what it shows
            value = re.sub("%%?", "%%", value)
        if value not in ("", "(null)", "N/A"):  # "0" is a wish, too: all memory of a node
            options.append(f"--{option}={value}")
    if "SLURM_NTASKS_PER_NODE" in slurm:
        options.append(f"--ntasks-per-node={slurm['SLURM_NTASKS_PER_NODE']}")
    is_smaller = nodes != facts.get("NumNodes", nodes)
    for field, option in _GPUS.items():
        if gpus := re.search(r"(?:^|,)gres[:/]gpu[:=]([^,]+)", facts.get(field, "")):
            kind, _, number = gpus[1].rpartition(":")
            if field == "TresPerJob" and is_smaller:  # fewer nodes have fewer cards
                option, number = "gpus-per-node", str(int(number) // int(facts["NumNodes"]))
            options.append(f"--{option}={kind}{':' if kind else ''}{number}")
    wanted = [] if is_smaller else hostnames(facts.get("ReqNodeList", ""))
    if wanted and not set(wanted) & set(exclude):
        options.append(f"--nodelist={','.join(wanted)}")
    options += ["--exclusive"] * (facts.get("OverSubscribe") == "NO")
    return options


def _meant_for_copies(words: Sequence[str]) -> list[str]:
    """The options of sbatch that a copy gets too, with their values: `--name=value`, `-nvalue`, or two words."""
    kept: list[str] = []
    is_kept = True
    for word in words:
        if word.startswith("-"):
            is_kept = (word[2:].partition("=")[0] if word.startswith("--") else word[1:2]) not in _NOT_AGAIN
        kept += [word] * is_kept
    return kept


def outer_environment() -> dict[str, str]:
    """Our environment without what Slurm says of the job we are in: srun in another job would believe it."""
    kept = ("SLURM_CONF",)
    inner = ("SLURM_", "SLURMD_", "SRUN_")
    return {name: value for name, value in os.environ.items() if name in kept or not name.startswith(inner)}


def has_program(name: str) -> bool:
    """Whether a command is on the PATH."""
    return any(os.access(Path(folder) / name, os.X_OK) for folder in os.environ.get("PATH", "").split(os.pathsep))


def ask(
    *command: str, patience_s: float = PATIENCE_S, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm; while its controller does not answer (a fail-over, a restart), ask again."""
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        except OSError as error:
            return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: {error.strerror}")
        is_away = done.returncode != 0 and "contact slurm controller" in done.stderr.lower()
        if not is_away or time.monotonic() > deadline_s:
            return done
        time.sleep(PAUSE_S)
