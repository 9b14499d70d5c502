"""One check of a check-up, which ranks and nodes it names, and the report for a person. No torch."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pretrain.redact import without_secrets

Level = Literal["ok", "warn", "fail"]

WIDTH = 80
NUM_NAMED = 4
PROBLEM = "problem"
"""Key of a rank's answer that says why there is no other."""
NO_END = "no end within"
"""How a problem begins that is a wait."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    level: Level
    seen: str
    remedy: str = ""
    nodes: tuple[str, ...] = ()
    """Nodes at fault: at most half of all, else it is not the nodes."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, URLs bare."""
        return without_secrets(asdict(self))


@dataclass(frozen=True)
class Places:
    """Which node each rank runs on."""

    nodes: Sequence[str]

    def name(self, ranks: Sequence[int]) -> str:
        """rank 3 (node1); several: ranks 3, 4 (node1, node2) and 12 more."""
        shown = list(ranks)[:NUM_NAMED]
        where = ", ".join(dict.fromkeys(self.nodes[rank] for rank in shown))
        more = f" and {len(ranks) - len(shown)} more" if len(ranks) > len(shown) else ""
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, shown))} ({where}){more}"

    def at_fault(self, ranks: Sequence[int]) -> tuple[str, ...]:
        """Their nodes, unless these are more than half: then the cause is elsewhere."""
        bad, all_nodes = {self.nodes[rank] for rank in ranks}, set(self.nodes)
        return tuple(sorted(bad)) if 2 * len(bad) <= len(all_nodes) else ()

    def outvoted(self, ranks: Sequence[int]) -> tuple[str, ...]:
        """Nodes of ranks that differ from others, if they are fewer than half: of two nobody knows which is right."""
        bad, all_nodes = {self.nodes[rank] for rank in ranks}, set(self.nodes)
        return tuple(sorted(bad)) if 2 * len(bad) < len(all_nodes) else ()


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report for a person, at most 80 columns wide."""
    checks: list[dict[str, Any]] = report["checks"]
    margin = 6 + max(len(check["name"]) for check in checks) + 2
    text: list[str] = []
    for check in checks:
        head = (
            f"{check['level'].upper() if check['level'] == 'fail' else check['level']:<6}{check['name']:<{margin - 6}}"
        )
        text += _wrapped(head, check["seen"], margin)
        if check["remedy"]:
            text += _wrapped(f"{'':<6}{'  do':<{margin - 6}}", check["remedy"], margin)
    levels = Counter(check["level"] for check in checks)
    num_failed, num_warned = levels["fail"], levels["warn"]
    verdict = f"not fit: {num_failed} of {len(checks)} checks failed" if num_failed else "fit to train"
    text.append(verdict + f", {num_warned} warning{plural(num_warned)}" * bool(num_warned))
    if report["blamed_nodes"]:
        text.append(f"blamed: {', '.join(report['blamed_nodes'])} (blamed twice, a node is left out at a requeue)")
    return text


def is_fit(report: Mapping[str, Any]) -> bool:
    """Whether no check failed."""
    return all(check["level"] != "fail" for check in report["checks"])


def next_command(report: Mapping[str, Any], arguments: Sequence[str], num_ranks: int | None = None) -> str:
    """What to type: start training, or this again."""
    ranks = [] if num_ranks is None else ["--ranks", str(num_ranks)]
    if not is_fit(report):
        return f"next: tubelet doctor {shlex.join([*arguments, *ranks])}"
    if "SLURM_JOB_ID" in os.environ:
        return f"next: tubelet submit {shlex.join([*arguments, *_resources(report)])}"
    return f"next: tubelet pretrain {shlex.join([*arguments, *ranks])}"


def _resources(report: Mapping[str, Any]) -> list[str]:
    """Options of `tubelet submit` that ask for what was examined."""
    num_nodes = len(report["nodes"])
    per_node = -(-report["world_size"] // num_nodes)
    ranks = ["--gpus", str(per_node)] if report["device"] == "cuda" else [f"--sbatch=--ntasks-per-node={per_node}"]
    return ["--nodes", str(num_nodes), *ranks]


def _wrapped(head: str, text: str, margin: int) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def size(num: float) -> str:
    """A number of bytes for people."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num >= scale:
            return f"{short(num / scale)} {unit}"
    return f"{num:.0f} B"


def short(value: float) -> str:
    """Two or three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def plural(number: int) -> str:
    """The s of several."""
    return "" if number == 1 else "s"
