"""Withdraw samples, and say which checkpoints have seen them: what is written down comes first, then the search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.keys import Found, find_samples
from shards.manifest import load_manifest
from shards.withdraw import Withdrawal, withdraw, withdrawn_url

if TYPE_CHECKING:
    from pretrain.traces import Trace

RUNS = Path("runs")
NUM_SHOWN = 20


@dataclass(frozen=True)
class Forgotten:
    """What was withdrawn, and where it has left traces."""

    where: str
    found: dict[str, list[Found]]
    """By the word that named them."""
    new: tuple[Withdrawal, ...]
    """Those that were not withdrawn before."""
    traces: tuple[Trace, ...]
    """One per run that was looked at."""
    is_default: bool
    """No runs were named."""

    @property
    def samples(self) -> set[Found]:
        """All samples that were named."""
        return {sample for samples in self.found.values() for sample in samples}

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "withdrawn": {word: [asdict(sample) for sample in samples] for word, samples in self.found.items()},
            "new": [asdict(row) for row in self.new],
            "runs": [trace.to_json() for trace in self.traces],
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        num, num_old = len(self.samples), len(self.samples) - len(self.new)
        before = f" ({num_old} of them were before)" if num_old else ""
        lines = [f"{num} sample{'s' * (num > 1)} withdrawn{before}: {self.where}"]
        rows = [(word, sample) for word, samples in self.found.items() for sample in samples]
        lines += [f"  {word}: {sample.split} sample {sample.sample} {sample.key}" for word, sample in rows[:NUM_SHOWN]]
        if len(rows) > NUM_SHOWN:
            lines.append(f"  and {len(rows) - NUM_SHOWN} more, see the file")
        lines.append(
            "runs that start from now on leave them out; one that is training goes on with them until it restarts"
        )
        for trace in self.traces:
            lines += trace.lines(num)
        if not self.traces:
            where = f"{RUNS} holds no run with a checkpoint" if self.is_default else "there is no run"
            lines.append(f"no checkpoint was looked at: {where}; name the folders of other runs with --runs")
        lines.append(
            "exports, and copies of checkpoints kept elsewhere, hold no ledger and cannot be traced: whatever was made "
            "from a checkpoint that has seen a sample has seen it too"
        )
        return lines


def forget(
    url: str,
    words: Sequence[str],
    runs: Sequence[Path] | None = None,
    on_scan: Callable[[int, int], None] | None = None,
) -> Forgotten:
    """Withdraw the samples of these keys, sources or groups. `runs` are run folders or folders of them; None: runs/.

    Raises UserError, with nothing written, for a name or a run folder that is not there.
    """
    from pretrain.traces import find_runs, runs_below, trace_runs  # imports torch

    folders = find_runs(runs) if runs is not None else runs_below(RUNS)
    manifest = load_manifest(url)
    found = find_samples(url, words, on_scan)
    samples: dict[str, set[int]] = {}
    for sample in (sample for named in found.values() for sample in named):
        samples.setdefault(sample.split, set()).add(sample.sample)
    new = withdraw(url, (sample for named in found.values() for sample in named))
    hashes = {manifest.hash, *(version.hash for version in manifest.history)}
    traces = trace_runs(folders, url, hashes, samples)
    return Forgotten(withdrawn_url(url), found, tuple(new), tuple(traces), runs is None)
