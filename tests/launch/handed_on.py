"""A run that is handed from launcher to launcher: each is killed, the last one finishes it."""

from __future__ import annotations

import signal
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from launch import outcome
from pretrain.attempt import newest_attempt
from pretrain.checkpoint import newest
from pretrain.ledger import ROW_DTYPE, walk_lineage
from pretrain.witness import audit_run
from tests.dist import ranks
from tests.launch.hosts import ROOT, Hosts, Start, parent, send, wait_for

STEPS, SAVES = 30, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    tree: dict[str, Any] = {
        "run": {"seed": 3},
        "data": {"shards": str(packed), "frames": 8, "stride": 2, "size": 32, "workers": 0},
        "model": {"size": "nano"},
        "objective": {"masked_frame": {"mask_ratio": 0.5}},
        "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 2, "precision": "bf16"},
        "zero": {"stage": 2},
        "optim": {"lr": 1e-3},
        "checkpoint": {"every_steps": SAVES},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    """Run folder of the run that two ranks of one machine finish in one go."""
    ranks.train(config, 2, f"run.dir={config.parent / 'run'}")
    return config.parent / "run"


def hand_on(hosts: Hosts, config: Path, run: Path, forms: Sequence[str]) -> Path:
    """Start the run with each form in turn: kill all but the last, which must finish it. Returns the run folder."""
    for number, form in enumerate(forms[:-1]):
        with started(hosts, form, config, run) as start:
            wait_for(partial(has_saved, run, after=saved(run)), 120, start.why)
            pids = start.ranks()
            assert len(pids) == 2, start.why()
            send(pids[:1], signal.SIGSTOP)  # the run must not end before the kill has worked
            send([victim(start, form)], signal.SIGKILL)
            send(pids[:1], signal.SIGCONT)
            wait_for(lambda: not start.ranks(), 20, start.why)
            wait_for(lambda: not start.processes(), 40, start.why)
            codes = start.codes()
        assert {decided(run, number, code) for code in codes} == {outcome.TRY_AGAIN}, codes
        if form == "no ssh":
            assert codes[1] == 0, "deepspeed used to hide the loss of its launch: tell the README if it no longer does"
    with started(hosts, forms[-1], config, run) as start:
        codes = start.codes()
        assert {decided(run, len(forms) - 1, code) for code in codes} == {outcome.FINISHED}, start.why()
    assert newest_attempt(run) == len(forms)
    return run


def has_saved(run: Path, *, after: int) -> bool:
    return saved(run) > after


def saved(run: Path) -> int:
    """Step of the newest checkpoint, 0 where there is none."""
    names = [path.parent.name for path in (run / "checkpoints").glob("step-*[0-9]/manifest.json")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def victim(start: Start, form: str) -> int:
    """What is killed: the launch of the second host under its deepspeed; else deepspeed, or the agent of the first."""
    return parent(start.ranks()[1]) if form == "no ssh" else start.launchers[0].pid


@contextmanager
def started(hosts: Hosts, form: str, config: Path, run: Path, cwd: Path = ROOT) -> Generator[Start]:
    """A start of which nothing is left afterwards."""
    start = Start(hosts, form, str(config), run, cwd)
    try:
        yield start
    finally:
        start.kill()


def decided(run: Path, since: int, code: int) -> int:
    """What the start after attempt number `since` came to, where its launcher returned `code`."""
    return outcome.exit_code(run, token="", since=since, launcher_code=code)


def assert_same_end(run: Path, undisturbed: Path) -> None:
    assert audit_run(run).exit_code == 0
    assert consumed(run) == consumed(undisturbed)
    expected = states(undisturbed)
    for name, values in states(run).items():
        assert torch.equal(values, expected[name]), name


def consumed(run: Path) -> list[tuple[int, ...]]:
    """(step, position, draw, sample, checksum) of every committed row, in the order of the run."""
    found = newest(run)
    assert found is not None
    rows: list[tuple[int, ...]] = []
    for _, link in walk_lineage(run / "ledger", found.lineage):
        for segment in link.segments:
            data = np.fromfile(run / "ledger" / segment.file, ROW_DTYPE)
            rows += [tuple(int(row[key]) for key in ("step", "position", "draw", "sample", "checksum")) for row in data]
    return sorted(rows)


def states(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of the last step, by name."""
    found = newest(run)
    assert found is not None
    assert found.facts.step == STEPS
    return {
        f"{name} {state}": found.read(name, state, 0, int(torch.Size(shape).numel()))
        for name, shape in found.facts.shapes.items()
        for state in ("fp32", "exp_avg", "exp_avg_sq")
    }
