"""What the batch script asks before and after its one srun line: what is to run, how did it end, what now.

    launch.slurm before CONFIG …   check the config; print the newest attempt, the prologue, the words of srun
    srun … launch.node CONFIG …    train
    launch.slurm after SINCE CODE CONFIG …   finished -> 0; a person is needed -> 93; else back into the queue

srun's exit code is no guide (143 when a rank asked for another try): the run folder is.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from launch import job, outcome
from launch.blame import BLAMES_TO_EXCLUDE, FORGIVEN, Blame, excluded_nodes, read_blames
from launch.container import container_words
from launch.node import DEMO_CONFIG, free_port, master_port, meeting_hosts, split_arguments, start_token
from pretrain.attempt import attempt_of, newest_attempt, read_outcome, read_refusal
from pretrain.config import Config, load_config
from pretrain.redact import without_secrets
from shards.errors import UserError
from shards.storage import write_atomic

MAX_STARTS_WITHOUT_PROGRESS = 3
"""Starts in a row that end at no newer checkpoint before a person is asked: a crash loop helps nobody."""

PAUSES_BEFORE_S = (5.0, 15.0, 40.0, 60.0, 120.0, 240.0)
PAUSES_AFTER_S = (1.0, 3.0, 6.0)
"""Between looks at files that are away. Those after the ranks are together well within the 30 s (KillWait) that a job
has after its time limit.
"""
AWAY = (errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH)
"""What a file system says while its server fails over or cannot be reached."""

NODES = "TUBELET_NODES"
"""Environment variable: how many nodes the job was submitted for, or the range its copy was."""


def main(arguments: Sequence[str]) -> int:
    """`before CONFIG …` or `after SINCE CODE CONFIG …`; the exit code is the batch script's."""
    verb, *rest = arguments
    try:
        if verb == "before":
            lines = before(rest, os.environ)
            print("\n".join(lines))
            return 0 if lines else outcome.TRY_AGAIN
        # At the time limit, and when the job is requeued, Slurm sends TERM and some seconds later KILL: enough time.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        since, code, *rest = rest
        return after(int(since), int(code), rest, os.environ)
    except UserError as error:
        _say(str(error))
        return outcome.PERSON_NEEDED
    except OSError as error:
        if error.errno not in AWAY:
            raise
        _say(f"{error.filename} still cannot be read ({error.strerror}): nothing can be decided without it")
        return _queue_as_it_is(os.environ)


def before(arguments: Sequence[str], slurm: Mapping[str, str]) -> list[str]:
    """Lines for the batch script: the newest attempt, the prologue, then the words between `srun` and the ranks.

    Nothing if the job may not run on the nodes it got and has been replaced. Raises `UserError` for a config with
    problems, before any rank starts, and where the STOP file is there; `OSError` where files stay away.
    """
    if split_arguments(arguments)[0] not in arguments:
        _say(f"no config named: running {DEMO_CONFIG}; for yours: sbatch slurm/pretrain.sh CONFIG key=value …")
    config, run_dir = _found(arguments, PAUSES_BEFORE_S)
    if _takes_stop(run_dir):
        raise UserError(f"{run_dir}/STOP was there, and is removed: nothing was started; to go on, submit again")
    exported = ["ALL"]
    if "SLURM_JOB_NODELIST" in slurm:
        nodes = job.hostnames(slurm["SLURM_JOB_NODELIST"])
        if bad := sorted(excluded_nodes(run_dir).keys() & set(nodes)):
            _say(f"{', '.join(bad)} of this job: blamed twice, see {run_dir}/attempts/")
            _next(config, arguments, slurm, is_copy=True)
            return []
        # `status` finds the job by its comment, `submit` has set it already: nothing depends on this one.
        job.ask("scontrol", "update", f"JobId={slurm['SLURM_JOB_ID']}", f"Comment={job.mark_of(run_dir)}", patience_s=0)
        # This is the first node, where rank 0 will listen.
        exported += [f"TUBELET_HOSTS={'/'.join(meeting_hosts(nodes))}", f"TUBELET_PORT={free_port(master_port(slurm))}"]
    if config.launch.interface:
        exported.append(f"TUBELET_INTERFACE={config.launch.interface}")
    options, prefix = container_words(config, Path(split_arguments(arguments)[0]), slurm)
    start = str(newest_attempt(run_dir))
    return [start, config.launch.prologue.strip(), f"--export={','.join(exported)}", *options, *prefix]


def after(since: int, code: int, arguments: Sequence[str], slurm: Mapping[str, str]) -> int:
    """Decide from the run folder what becomes of the job; returns the exit code of the batch script.

    Raises `OSError` where its files stay away.
    """
    config, run_dir = _found(arguments, PAUSES_AFTER_S)
    token = start_token(slurm)
    own = attempt_of(run_dir, token, since)
    ended = read_refusal(run_dir, token) if own is None else read_outcome(run_dir, own)
    _say(f"{run_dir}: {ended.reason if ended else 'the ranks ended without a word'} (srun returned {code})")
    decided = outcome.exit_code(run_dir, token=token, since=since, launcher_code=code)
    if decided in (outcome.FINISHED, outcome.PERSON_NEEDED):
        return decided
    if _takes_stop(run_dir):
        _say(f"{run_dir}/STOP was there, and is removed: not queued again; to go on, submit again")
        return outcome.PERSON_NEEDED
    is_noted = own is not None or _note_unborn(run_dir, token, code)
    if _no_progress(run_dir, slurm, is_noted=is_noted):
        _note_asked(run_dir)
        _say(
            f"{MAX_STARTS_WITHOUT_PROGRESS} starts in a row reached no new checkpoint: not queued again. "
            f"Read the log of this job and {run_dir}/logs/, then submit again"
        )
        return outcome.PERSON_NEEDED
    return _next(config, arguments, slurm)


def _found(arguments: Sequence[str], pauses_s: Sequence[float]) -> tuple[Config, Path]:
    """The config and the run folder, once both can be read; looked for again after each pause.

    Raises `OSError` where they stay away. What is not there or not ours to read is for the ranks to tell.
    """
    for pause_s in (*pauses_s, None):
        try:
            config = _config(arguments)
            run_dir = Path(config.run.dir)
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                os.listdir(run_dir / "attempts")
        except OSError as error:
            if pause_s is None or error.errno not in AWAY:
                raise
            _say(f"{error.filename} cannot be read ({error.strerror}): looking again in {pause_s:g} s")
            time.sleep(pause_s)
        else:
            return config, run_dir
    raise AssertionError("the last look returns or raises")


def _queue_as_it_is(slurm: Mapping[str, str]) -> int:
    """The next start may find what this one could not read, on another node or later."""
    number = slurm.get("SLURM_JOB_ID", "")
    facts = job.facts_of(number)
    if not _is_ours_to_queue(facts):
        _say(_left_alone(number, facts))
    elif not job.requeue(number, None, _say):
        _say("submit the same line again by hand")
    return outcome.TRY_AGAIN


def _next(config: Config, arguments: Sequence[str], slurm: Mapping[str, str], *, is_copy: bool = False) -> int:
    """Queue this job again, or a copy of it where that is forbidden or other nodes are to be asked for (`is_copy`).

    Raises `UserError` where too few nodes are left.
    """
    run_dir, number = Path(config.run.dir), slurm.get("SLURM_JOB_ID", "")
    facts = job.facts_of(number)
    if not _is_ours_to_queue(facts):
        _say(_left_alone(number, facts))
        return outcome.TRY_AGAIN
    now = slurm.get(NODES) or slurm.get("SLURM_JOB_NUM_NODES") or facts.get("NumNodes", "1")
    before_that = job.hostnames(facts.get("ExcNodeList", ""))
    num_blames = Counter(blame.node for blame in read_blames(run_dir))
    # What nobody blamed twice the user has excluded; the rest was ours, and some of it may be forgiven by now.
    kept = [node for node in before_that if num_blames[node] < BLAMES_TO_EXCLUDE]
    has_one_rank_each = slurm.get("SLURM_NTASKS_PER_NODE") == "1"
    nodes, left_out = _nodes_to_ask(config, facts, now, kept, has_one_rank_each=has_one_rank_each)
    exclude = [*kept, *left_out]
    for node in set(exclude) - set(before_that):
        reasons = "; ".join(f"attempt {b.attempt}, {b.by}: {b.reason}" for b in left_out[node])
        mended = f"once mended: touch {run_dir / FORGIVEN}"
        _say(f"{node} is excluded from now on: blamed {len(left_out[node])} times ({reasons}); {mended}")
    changed = exclude if set(exclude) != set(before_that) else None
    if not is_copy and nodes == now and job.requeue(number, changed, _say):
        return outcome.TRY_AGAIN
    if nodes != now:
        _say(f"the copy of job {number} asks for {nodes} nodes instead of {now}")
    options = job.copy_options(slurm, facts, run_dir, nodes, exclude)
    is_submitted, said = job.submit_copy(number, options, arguments, {NODES: nodes})
    _say(f"a copy follows job {number}: {said}" if is_submitted else f"{said}: submit the same line again by hand")
    return outcome.TRY_AGAIN


def _left_alone(number: str, facts: Mapping[str, str]) -> str:
    state = f"job {number} was cancelled or is being ended by Slurm ({facts.get('JobState')})"
    return f"{state}: nothing is done about it; if nobody meant that, submit again"


def _is_ours_to_queue(facts: Mapping[str, str]) -> bool:
    """What somebody cancelled, or Slurm has queued again by itself, is left alone. The time limit is ours."""
    return facts.get("JobState", "RUNNING") in ("RUNNING", "SUSPENDED") or facts.get("Reason") == "TimeLimit"


def _nodes_to_ask(
    config: Config, facts: Mapping[str, str], now: str, kept: Sequence[str], *, has_one_rank_each: bool
) -> tuple[str, dict[str, list[Blame]]]:
    """How many nodes the next start asks for ("8", or "6-8" while fewer can be had), and which it must not get.

    `kept` are nodes that the user has excluded. Raises `UserError` where fewer than launch.min_nodes are left.
    """
    blamed = excluded_nodes(Path(config.run.dir))
    states = job.partition_nodes(facts.get("Partition", ""))
    asked, at_least = int(now.split("-")[-1]), min(config.launch.min_nodes, int(now.split("-")[-1]))
    if not states:
        return now, blamed
    blamed = {node: blames for node, blames in blamed.items() if node in states}
    remaining = [is_usable for node, is_usable in states.items() if node not in blamed and node not in kept]
    if len(remaining) < at_least:
        raise UserError(
            f"launch.min_nodes is {config.launch.min_nodes}; partition {facts.get('Partition')} has {len(remaining)} "
            f"nodes besides those blamed twice ({', '.join(blamed) or 'none'}) and those you excluded "
            f"({', '.join(kept) or 'none'}): lower it, or have the blamed nodes mended and touch "
            f"{config.run.dir}/{FORGIVEN}; then submit again"
        )
    if sum(remaining) >= asked:
        return str(asked), blamed
    # Seen with Slurm 22.05: with one task per node it fills a range with its smallest number, with more the largest.
    least = max(at_least, sum(remaining)) if has_one_rank_each else at_least
    return f"{least}-{asked}", blamed


def _config(arguments: Sequence[str]) -> Config:
    config, words = split_arguments(arguments)
    return load_config(config, [word for word in words if word != "--change"])


def _note_unborn(run_dir: Path, token: str, code: int) -> bool:
    """A start that took no attempt leaves a file too, so that such starts can be counted. False where it cannot."""
    try:
        (run_dir / "attempts").mkdir(parents=True, exist_ok=True)
        note = json.dumps({"time": time.time(), "srun": code}).encode()
        write_atomic(run_dir / "attempts" / f"unborn-{token}.json", note + b"\n")
    except OSError as error:  # perhaps the very cause of it
        _say(f"{run_dir} cannot be written: {error.strerror}")
        return False
    return True


def _takes_stop(run_dir: Path) -> bool:
    """Whether the STOP file is there: it goes, so that the same command goes on. Ranks look only between steps."""
    try:
        (run_dir / "STOP").unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        _say(f"{run_dir}/STOP cannot be looked for or removed: {error.strerror}")
        return False
    return True


def _note_asked(run_dir: Path) -> None:
    """Whoever submits again has looked: the starts until now are not held against the next one."""
    try:
        (run_dir / outcome.ASKED).touch()
    except OSError as error:
        _say(f"{run_dir}/{outcome.ASKED} cannot be written: {error.strerror}")


def _no_progress(run_dir: Path, slurm: Mapping[str, str], *, is_noted: bool) -> bool:
    """Whether the last starts all ended before a new checkpoint; no where the run folder cannot be read. Slurm's own
    count stands in where this start could leave no trace.
    """
    if not is_noted or not os.access(run_dir / "attempts", os.W_OK):
        return int(slurm.get("SLURM_RESTART_COUNT", "0")) + 1 >= MAX_STARTS_WITHOUT_PROGRESS
    try:
        return outcome.starts_without_progress(run_dir) >= MAX_STARTS_WITHOUT_PROGRESS
    except OSError as error:
        _say(f"the checkpoints and starts in {run_dir} cannot be counted ({error}): taken as progress")
        return False


def _say(text: str) -> None:
    """On stderr: the batch script reads stdout. Texts may quote what the user typed (C14)."""
    print(f"tubelet: {without_secrets(text)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
