"""`tubelet doctor`: start the ranks of a check-up where training would run, and read the report that rank 0 prints.

    on one machine          as `tubelet pretrain` starts ranks (launch/local.py), the module being pretrain.doctor
    in a Slurm allocation   srun … python -m launch.node --doctor CONFIG …

Their stdout goes to a file: a run folder that cannot be written must not keep the report from being seen.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from launch import local
from launch.container import container_words
from launch.job import hostnames
from launch.node import free_port, master_port, meeting_hosts, tasks_on_node
from launch.snapshot import ROOT
from pretrain.config import Config, load_config
from pretrain.finding import is_fit, lines, next_command
from shards.errors import UserError

MODULE = "pretrain.doctor"
BATCH_SCRIPT = "slurm/pretrain.sh"
SIGNAL_DEFAULT_S = 60
"""What --signal=USR1 without a time means."""
NOT_FIT = 2
NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
LEFT_ALONE_S = 300
"""How long srun lets the other ranks go on after one has ended: they name it, and end by themselves."""


def doctor(
    config: Path, overrides: Sequence[str] = (), ranks: int | None = None, *, allow_change: bool = False
) -> dict[str, Any]:
    """Examine this machine, or this allocation, for the run that the config describes; returns the report.

    Raises `UserError` for a config with problems, and where the ranks ended without a report.
    """
    loaded = load_config(config, overrides)
    arguments = [str(config), *overrides, "--json", *["--change"] * allow_change]
    with tempfile.TemporaryDirectory(prefix="tubelet-doctor-") as folder:
        printed = Path(folder) / "report"
        if "SLURM_JOB_ID" in os.environ:
            command = srun_command(loaded, config, arguments, ranks, os.environ)
            with printed.open("wb") as file:
                code = subprocess.run(command, stdout=file, env=srun_environment(os.environ), check=False).returncode
        else:
            num_ranks = local.default_ranks() if ranks is None else ranks
            command = local_command(arguments, num_ranks)
            redirected = ["/bin/sh", "-c", 'exec "$@" >"$0"', str(printed), *command]
            code = local.run_marked(redirected, local.environment(num_ranks), secrets.token_hex(8))
        report = read_report(printed)
    if report is None:
        raise UserError(
            f"the ranks ended without a report (exit code {code}); what they said stands above: mend that, then run "
            "this again"
        )
    return report


def read_report(printed: Path) -> dict[str, Any] | None:
    """The last line that is a report: launchers print to stdout as well."""
    for line in reversed(printed.read_text(errors="replace").splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "checks" in found:
            return cast(dict[str, Any], found)
    return None


def exit_code(report: Mapping[str, Any]) -> int:
    """0 fit, perhaps with warnings; 2 a check failed."""
    return 0 if is_fit(report) else NOT_FIT


def report_lines(report: Mapping[str, Any], config: Path, overrides: Sequence[str], ranks: int | None) -> list[str]:
    """The report for a person; the last line is the next command."""
    return [*lines(report), next_command(report, [str(config), *overrides], ranks)]


def local_command(arguments: Sequence[str], num_ranks: int) -> list[str]:
    """What starts the ranks on this machine."""
    if num_ranks == 1:
        return local.one_rank(arguments, module=MODULE)
    return local.several_ranks(arguments, num_ranks, local.free_port(), module=MODULE)


# ------------------------------------------------------------------------------------------------ Slurm


def srun_command(
    loaded: Config, config: Path, arguments: Sequence[str], ranks: int | None, slurm: Mapping[str, str]
) -> list[str]:
    """One srun line with the tasks of the allocation, in the container of the config. A rank that dies ends no other:
    rank 0 must live to name it.
    """
    exported = [f"{name}={value}" for name, value in host_facts(loaded, slurm).items()]
    options, inside = container_words(loaded, config, slurm)
    started = [sys.executable]
    if options or inside:  # launch.node must not ask for the names in these lists: there is no scontrol
        started = ["env", *(word for name in NODE_LISTS for word in ("-u", name)), "python"]
    return [
        *("srun", "--kill-on-bad-exit=0", f"--wait={LEFT_ALONE_S}", "--overlap"),
        *([f"--ntasks={ranks}"] if ranks is not None else []),
        f"--export={','.join(['ALL', *exported])}",
        *options,
        *inside,
        *(*started, "-m", "launch.node", "--doctor"),
        *arguments,
    ]


def host_facts(loaded: Config, slurm: Mapping[str, str]) -> dict[str, str]:
    """Variables of the ranks, worked out here as for the batch script: inside a container nobody can ask Slurm."""
    facts: dict[str, str] = {}
    if "SLURM_JOB_NODELIST" in slurm:
        nodes = hostnames(slurm["SLURM_JOB_NODELIST"])
        facts = {"TUBELET_HOSTS": "/".join(meeting_hosts(nodes)), "TUBELET_PORT": str(free_port(master_port(slurm)))}
        counts = slurm.get("SLURM_TASKS_PER_NODE")
        tasks = [tasks_on_node(counts, number) for number in range(len(nodes))] if counts else []
        facts |= slurm_facts(slurm, nodes[: len(tasks)], tasks)
    if loaded.launch.interface:
        facts["TUBELET_INTERFACE"] = loaded.launch.interface
    return facts


def srun_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """srun no longer takes the cores of a task from sbatch or salloc by itself."""
    cores = slurm.get("SLURM_CPUS_PER_TASK")
    return {**slurm, **({"SRUN_CPUS_PER_TASK": cores} if cores else {})}


def slurm_facts(slurm: Mapping[str, str], nodes: Sequence[str], tasks: Sequence[int]) -> dict[str, str]:
    """What rank 0 must be told of Slurm: the node of every rank (for ranks that never say), and the signal's lead.

    `nodes` and `tasks`: the names of the nodes in rank order, and how many tasks each has. Without nodes, or with a
    lead in `slurm`, what was found out before stays.
    """
    placed = [name for name, number in zip(nodes, tasks, strict=True) for _ in range(number)]
    listed = "/".join(f"{name}*{len(list(group))}" for name, group in groupby(placed))
    facts = {"TUBELET_PLACES": listed} if placed else {}
    is_told = "TUBELET_SIGNAL_LEAD_S" in slurm or "TUBELET_SCRIPT_LEAD_S" in slurm
    return facts if is_told else {**facts, **script_facts(slurm.get("SLURM_JOB_ID", ""))}


def script_facts(job: str) -> dict[str, str]:
    """The lead that the script of this job asks for; of an interactive allocation, which has none, the one that will
    be submitted, by its name. The options of sbatch override it, and Slurm does not show them.
    """
    command = ["scontrol", "write", "batch_script", job, "-"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
        if shown.stdout.startswith("#!"):  # salloc has none, and its exit code is 0 then
            return {"TUBELET_SCRIPT_LEAD_S": str(signal_lead_s(shown.stdout))}
        ours = (ROOT / BATCH_SCRIPT).read_text()
    except OSError:
        return {}
    return {"TUBELET_SCRIPT_LEAD_S": str(signal_lead_s(ours)), "TUBELET_SCRIPT": BATCH_SCRIPT}


def signal_lead_s(script: str) -> int:
    """Seconds before the end at which the script asks for a signal to the ranks; 0 if it asks for none."""
    found = re.search(r"^#SBATCH\b.*--signal[= ]\"?(?:([BR]+):)?\w+(?:@(\d+))?", script, re.MULTILINE)
    if found is None or "B" in (found[1] or ""):  # B: the batch shell alone gets it
        return 0
    return int(found[2] or SIGNAL_DEFAULT_S)
