"""What the answers of a check-up mean: ok, warn or fail, what was seen, what to do, and which nodes are at fault.

Pure functions of what ranks measured (pretrain/symptoms.py), in the order of the report. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.finding import NO_END, PROBLEM, Check, Level, Places, plural, short, size
from pretrain.memory import Memory

Answers = Sequence[Mapping[str, Any] | None]
"""By rank; None where no answer came."""

MAX_SKEW_S = 1.0
"""Clocks further apart make logs, retention by age and credentials of object stores unreliable."""
FREE_AT_START = 0.9
"""Share of a GPU that is free where nobody else uses it."""
MAX_COMMUNICATION = 0.5
"""Share of a measured step that adding up its gradients may take before it is worth a warning."""


def problems(answers: Answers) -> dict[int, str]:
    """Ranks whose work failed, and why."""
    return {rank: str(answer[PROBLEM]) for rank, answer in enumerate(answers) if answer and PROBLEM in answer}


def _failed(name: str, answers: Answers, places: Places, remedy: str) -> Check | None:
    """The check of a phase whose work failed somewhere, in the words of the first of those ranks."""
    found = problems(answers)
    if not found:
        return None
    # Where one rank fails in a collective, the others only wait for it.
    ranks = [rank for rank, problem in found.items() if not problem.startswith(NO_END)] or list(found)
    return Check(name, "fail", f"{places.name(ranks)}: {found[ranks[0]]}", remedy, places.at_fault(ranks))


def _good(answers: Answers) -> dict[int, Mapping[str, Any]]:
    return {rank: answer for rank, answer in enumerate(answers) if answer is not None and PROBLEM not in answer}


# ------------------------------------------------------------------------------------------------ who is here


def ranks(places: Places, silent: Mapping[int, str]) -> Check:
    """Every rank came up and answered to the end. `silent`: ranks that did not, and the phase since when."""
    num_nodes = len(set(places.nodes))
    here = f"{len(places.nodes)} rank{plural(len(places.nodes))} on {num_nodes} node{plural(num_nodes)}"
    if not silent:
        return Check("ranks", "ok", f"{here}, all answered")
    by_phase: dict[str, list[int]] = {}
    for rank, phase in silent.items():
        by_phase.setdefault(phase, []).append(rank)
    seen = "; ".join(
        f"{places.name(found)} never came up" if phase == "ranks" else f"{places.name(found)} fell silent in {phase}"
        for phase, found in by_phase.items()
    )
    remedy = "look at the messages above and at that node (dmesg, disk, network); leave it out or start again"
    return Check("ranks", "fail", f"{seen}, of {here}", remedy, places.at_fault(list(silent)))


def versions(answers: Answers, places: Places) -> Check:
    """The same programs, code and config on every node."""
    failed = _failed("versions", answers, places, "give every node the same config file, code and data mounts")
    if failed is not None:
        return failed
    found = {rank: dict(answer["versions"]) for rank, answer in _good(answers).items()}
    usual = Counter(tuple(sorted(mine.items())) for mine in found.values()).most_common(1)[0][0]
    others = {rank: mine for rank, mine in found.items() if tuple(sorted(mine.items())) != usual}
    if not others:
        listed = ", ".join(f"{name} {version}" for name, version in found[min(found)].items())
        return Check("versions", "ok", f"the same everywhere: {listed}")
    most, mine = dict(usual), next(iter(others.values()))
    names = [name for name in most | mine if mine.get(name) != most.get(name)]
    differ = "; ".join(f"{name} {mine.get(name, 'none')}, most have {most.get(name, 'none')}" for name in names)
    remedy = "give every node the same environment and code, best one folder that all see"
    seen = f"{places.name(list(others))}: {differ}"
    return Check("versions", "fail", seen, remedy, places.outvoted(list(others)))


def config(problem: str) -> Check:
    """Whether the run folder would take this config; `problem` says why not."""
    if not problem:
        return Check("config", "ok", "fits the data and what is in the run folder")
    if NO_END in problem:
        return Check(
            "config", "fail", problem, "data.shards or run.dir does not answer: look at the store or the mount"
        )
    what, colon, remedy = problem.rpartition(": ")
    return Check("config", "fail", what if colon else problem, remedy if colon else "change the config or run.dir")


# ------------------------------------------------------------------------------------------------ the run folder


def run_folder(written: Answers, seen: Answers, places: Places, run_dir: str) -> Check:
    """A POSIX folder that all nodes see: created once, read by all, renamed whole, fsynced."""
    remedy = "set run.dir to a shared POSIX folder that every node can write"
    for answers in (written, seen):
        failed = _failed("run folder", answers, places, remedy)
        if failed is not None:
            return failed
    wrote, saw = _good(written), _good(seen)
    created = [rank for rank, answer in wrote.items() if answer["created"]]
    complaints = {
        f"did not read what rank 0 wrote in {run_dir}": [r for r, answer in wrote.items() if not answer["token"]],
        f"do not see in {run_dir} what other ranks wrote": [r for r, answer in saw.items() if answer["missing"]],
        "saw a file missing or half written while it was replaced": [r for r, answer in saw.items() if answer["torn"]],
        "all created the same file": created if len(created) > 1 else [],
    }
    for complaint, found in complaints.items():
        if found:
            # Each rank was compared with rank 0, whose folder may be the wrong one.
            return Check("run folder", "fail", f"{places.name(found)}: {complaint}", remedy, places.outvoted(found))
    slowest_s = max(answer["fsync_s"] for answer in wrote.values())
    return Check("run folder", "ok", f"{run_dir}: read, created and renamed as one by all; fsync {slowest_s:.2g} s")


def space(room: Mapping[str, Any], checkpoint_bytes: int, *, num_at_most: int, run_dir: str) -> Check:
    """Room for two checkpoints. `num_at_most`: how many the folder will hold at its fullest."""
    if PROBLEM in room:
        return Check("space", "fail", str(room[PROBLEM]), f"look at the file system of {run_dir}")
    free_bytes, num_more = int(room["free_bytes"]), num_at_most - int(room["num_kept"])
    seen = f"{size(free_bytes)} free; a checkpoint is {size(checkpoint_bytes)}"
    if free_bytes < 2 * checkpoint_bytes:
        short_of = size(2 * checkpoint_bytes - free_bytes)
        return Check(
            "space", "fail", f"{seen}, two are needed", f"free {short_of} below {run_dir}, or set run.dir elsewhere"
        )
    if free_bytes < num_more * checkpoint_bytes:
        remedy = "lower checkpoint.keep, raise checkpoint.keep_every_steps, or free some"
        return Check("space", "warn", f"{seen}, the run will add {num_more} of them", remedy)
    return Check("space", "ok", f"{seen}, the run keeps at most {num_at_most}")


# ------------------------------------------------------------------------------------------------ between the nodes


def clocks(rounds: Sequence[tuple[float, Answers, Sequence[float]]], places: Places) -> Check:
    """Clocks agree. Of each round: when rank 0 asked (Unix time), the answers, when it saw each answer.

    A clock that was read between question and answer is off by at most what these bounds leave open; of several rounds
    the tightest counts.
    """
    bounds: dict[int, tuple[float, float]] = {}
    for asked_s, answers, arrived_s in rounds:
        for rank, answer in _good(answers).items():
            if "time" in answer:
                bound = (answer["time"] - arrived_s[rank], answer["time"] - asked_s)
                known = bounds.get(rank, (float("-inf"), float("inf")))
                bounds[rank] = bound if bound[1] - bound[0] < known[1] - known[0] else known
    middle = {rank: (low + high) / 2 for rank, (low, high) in bounds.items()}
    fast, slow = max(middle, key=middle.__getitem__), min(middle, key=middle.__getitem__)
    apart_s = middle[fast] - middle[slow]
    doubt_s = sum(sorted((high - low) / 2 for low, high in bounds.values())[-2:])
    worst = f", {places.name([fast])} ahead of {places.name([slow])}" if fast != slow else ""
    seen = f"{apart_s:.3f} s apart (known to {doubt_s:.3f} s){worst}"
    if apart_s - doubt_s > MAX_SKEW_S:
        return Check("clocks", "warn", seen, "start a time service (chrony, ntpd) on these nodes")
    if doubt_s > MAX_SKEW_S:
        return Check("clocks", "warn", seen, "answers took long: look at the network or the load, and run this again")
    return Check("clocks", "ok", seen)


def all_reduce(answers: Answers, places: Places, *, gradient_bytes: int, step_s: float | None) -> Check:
    """Sums are right, and how fast. `gradient_bytes` are added up in each step; `step_s` as measured before."""
    if len(places.nodes) == 1:
        return Check("all-reduce", "ok", "one rank: nothing to add up")
    remedy = "look at network, NCCL_DEBUG=INFO and GLOO_SOCKET_IFNAME; try other nodes"
    failed = _failed("all-reduce", answers, places, remedy)
    if failed is not None:
        return failed
    found = _good(answers)
    wrong = [rank for rank, answer in found.items() if answer["num_wrong"]]
    if wrong:
        seen = f"{places.name(wrong)} got a wrong sum ({found[wrong[0]]['num_wrong']} numbers of it)"
        return Check("all-reduce", "fail", seen, "do not train: test these nodes in halves", places.at_fault(wrong))
    seconds = {int(num): max(answer["seconds"][num] for answer in found.values()) for num in found[0]["seconds"]}
    num_ranks = len(places.nodes)
    rates = {num: 2 * (num_ranks - 1) / num_ranks * num / took_s for num, took_s in seconds.items()}
    gradient_s = seconds[max(seconds)] * gradient_bytes / max(seconds)
    listed = ", ".join(f"{size(rate)}/s at {size(num)}" for num, rate in rates.items())
    seen = f"right; per rank {listed}; gradients of a step ({size(gradient_bytes)}) {gradient_s:.2g} s"
    if step_s is not None and gradient_s > MAX_COMMUNICATION * step_s:
        remedy = "compare with the network's rate; check that NCCL uses it (NCCL_DEBUG=INFO), or raise micro_batch"
        return Check("all-reduce", "warn", f"{seen} of a step of {step_s:.2g} s", remedy)
    return Check("all-reduce", "ok", seen)


# ------------------------------------------------------------------------------------------------ data and mirror


def shards(answers: Answers, places: Places, *, per_step: int, step_s: float | None, bad_limit: float) -> Check:
    """Samples can be read, are what was packed, and come fast enough for `per_step` videos each `step_s` seconds."""
    remedy = "run `tubelet verify` on data.shards; every node must reach it: a mount, or the store and its credentials"
    failed = _failed("shards", answers, places, remedy)
    if failed is not None:
        return failed
    found = _good(answers)
    num_read = sum(answer["num_read"] for answer in found.values())
    bad = {rank: answer["bad"] for rank, answer in found.items() if answer["bad"]}
    seen = ""
    if bad:
        num_bad = sum(len(listed) for listed in bad.values())
        seen = f"{num_bad} of {num_read} samples are bad: {next(iter(bad.values()))[0]} at {places.name(list(bad))}"
        if num_bad > bad_limit * num_read:
            return Check("shards", "fail", seen, remedy, places.at_fault(list(bad)))
    empty = [rank for rank, answer in found.items() if not answer["num_read"]]
    if empty:
        late = f"{places.name(empty)} read no sample in time"
        return Check("shards", "fail", late, "look at the storage and its network", places.at_fault(empty))
    rates = {rank: answer["num_read"] / answer["seconds"] for rank, answer in found.items()}
    rate = sum(rates.values())
    bytes_rate = sum(answer["num_bytes"] / answer["seconds"] for answer in found.values())
    cached = sum(answer["num_cached"] for answer in found.values())
    slowest = min(rates, key=rates.__getitem__)
    speed = f"{num_read} samples, {short(rate)} a second ({size(bytes_rate)}/s)" + f", {cached} cached" * bool(cached)
    need = f"a step needs {per_step}: at most one each {per_step / rate:.2g} s"
    if step_s is not None:
        need = f"needed are {short(per_step / step_s)} (step {step_s:.2g} s)"
    slow = f"; slowest {places.name([slowest])} {short(rates[slowest])}" if len(rates) > 1 else ""
    if step_s is not None and rate < per_step / step_s:
        remedy = "raise data.run_length, use data.cache, or bring the shards nearer"
        return Check("shards", "warn", f"{speed}; {need}{slow}", remedy)
    if seen:
        return Check("shards", "warn", f"{seen}; {speed}", remedy)
    return Check("shards", "ok", f"{speed}; {need}{slow}")


def mirror(answers: Answers, places: Places, url: str | None) -> Check:
    """A small object can be written, read back and deleted from every node."""
    if url is None:
        return Check("mirror", "ok", "none is set (checkpoint.mirror)")
    failed = _failed("mirror", answers, places, "check checkpoint.mirror, its credentials and rights (write, delete)")
    if failed is not None:
        return failed
    slowest_s = max(answer.get("seconds", 0.0) for answer in _good(answers).values())
    return Check("mirror", "ok", f"{url}: written, read back and deleted from every node, {slowest_s:.2g} s")


# ------------------------------------------------------------------------------------------------ memory and time


def memory(answers: Answers, places: Places, need: Memory) -> Check:
    """A rank's share of the host, or its card, holds what training needs at the config's stage and micro batch."""
    failed = _failed("memory", answers, places, "look at nvidia-smi on that node; leave it out")
    if failed is not None:
        return failed
    found = _good(answers)
    card = min(found.values(), key=lambda answer: answer["total_bytes"])
    more = "" if card["is_card"] else "raise the job's --mem, use more ranks on more machines, "
    remedy = (
        f"{more}raise zero.stage, lower train.micro_batch, set train.activation_checkpointing=true: see `tubelet plan`"
    )
    # Without a card there is one memory for everything, and no CUDA that wants a part of it.
    on_device = need.total if card["is_card"] else need.total - need.reserve + need.host
    sure = need.total - need.reserve if card["is_card"] else on_device
    seen = (
        f"{size(on_device)} per rank, {size(need.activations + need.batch)} of it for the micro batch; "
        f"{card['device']} has {size(card['total_bytes'])}"
    )
    short_of = [rank for rank, answer in found.items() if answer["total_bytes"] < sure]
    if short_of:
        return Check("memory", "fail", f"{places.name(short_of)}: {seen}", remedy, places.at_fault(short_of))
    poor = [rank for rank, answer in found.items() if answer["is_card"] and answer["host_bytes"] < need.host]
    if poor:
        kept = f"{size(need.host)} per rank are kept in host memory"
        has = f"{places.name(poor)} has {size(found[poor[0]]['host_bytes'])} of it"
        return Check(
            "memory",
            "fail",
            f"{kept}; {has}",
            "raise the job's --mem, or use more ranks" + ", or set zero.offload=false" * (need.states.host > 0),
        )
    used = [rank for rank, answer in found.items() if answer["free_bytes"] < FREE_AT_START * answer["total_bytes"]]
    if used:
        left = size(found[used[0]]["free_bytes"])
        busy = f"{places.name(used)}: only {left} of {size(found[used[0]]['total_bytes'])} are free"
        return Check("memory", "warn", busy, "another process uses it: look at nvidia-smi there, end what is left over")
    if on_device > card["total_bytes"]:
        return Check("memory", "warn", f"{seen}: what CUDA and NCCL take may not fit", remedy)
    return Check("memory", "ok", seen)


def prologue() -> Check:
    """What the batch script runs before the ranks is left to whoever starts the check-up: it works on a shell."""
    return Check("prologue", "ok", "launch.prologue was not run: type it first if ranks need it")


def signal_lead(lead_s: float | None, save_s: float | None, step_s: float | None, script: str = "") -> Check:
    """Between Slurm's signal and its kill there is time for twice a save and a step, as measured before.

    `script`: where the lead was read. It is not proof: the command line of sbatch overrides what stands there.
    """
    if lead_s is None:
        return Check("signal", "warn", "how long before the end the job is told is not known (no batch script)")
    level: Level = "warn" if script else "fail"
    own = "; set TUBELET_SIGNAL_LEAD_S where sbatch got another --signal" if script else ""
    if not lead_s:
        remedy = "add #SBATCH --signal=USR1@300 to the batch script, as slurm/pretrain.sh has it"
        asks = f"{script or 'the job'} asks for no signal to the ranks before the time limit"
        return Check("signal", level, asks, remedy + own)
    told = f"{script} says {lead_s:.0f} s before the end" if script else f"{lead_s:.0f} s before the end"
    if save_s is None or step_s is None:
        return Check("signal", "ok", f"{told}; save and step are not measured yet (no run)")
    needed_s = 2 * save_s + step_s
    seen = f"{told}; twice a save ({save_s:.3g} s) and a step ({step_s:.3g} s) need {needed_s:.0f} s"
    if lead_s < needed_s:
        return Check("signal", level, seen, f"submit with --signal=USR1@{60 * int(-(-needed_s // 60))}{own}")
    return Check("signal", "ok", seen)
