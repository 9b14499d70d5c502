"""C4: the audit can fail. Real training with a loader that repeats, swaps, drops, or delivers the wrong bytes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.ledger import ROW_DTYPE
from pretrain.witness import audit_run
from tests.dist import ranks

pytestmark = pytest.mark.slow


def audit(run_dir: Path) -> tuple[int, str]:
    """The real command."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "audit", str(run_dir)],
        cwd=ranks.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("kind", ["nothing", "repeats", "swaps", "drops", "delivers other bytes"])
def test_a_wrong_loader_is_caught(kind: str, tmp_path: Path, tiny_config: Callable[..., Path]) -> None:
    config = tiny_config(**{"train.steps": 2, "zero.stage": 0, "train.precision": "fp32"})
    ranks.train(config, 1, program=(str(Path(__file__).with_name("mutant.py")), kind))
    code, said = audit(tmp_path / "run")
    assert code == (0 if kind == "nothing" else 1), said
    assert ("VIOLATED" in said) == (kind != "nothing")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    config = folder / "run.yaml"
    config.write_text(
        f"""
run: {{dir: {folder / "run"}}}
data: {{shards: {packed}, frames: 8, stride: 2, size: 32, workers: 0}}
model: {{size: nano}}
objective: {{frame_order: {{mask_ratio: 0.5, min_motion: 0}}}}
train: {{steps: 2, global_batch: 4, micro_batch: 4}}
optim: {{lr: 1e-3}}
"""
    )
    ranks.train(config, 1)
    return folder / "run"


@pytest.mark.parametrize("kind", ["removed", "doubled", "edited"])
def test_a_ledger_row_that_was_touched_is_seen(kind: str, honest: Path, tmp_path: Path) -> None:
    assert audit_run(honest).exit_code == 0
    subprocess.run(["cp", "-r", str(honest), str(tmp_path / "run")], check=True)
    [path] = (tmp_path / "run" / "ledger").glob("*.rows")
    rows = np.fromfile(path, ROW_DTYPE)
    if kind == "removed":
        rows = rows[:-1]
    elif kind == "doubled":
        rows = np.concatenate([rows, rows[-1:]])
    else:
        rows["sample"][0] ^= 1
    rows.tofile(path)
    assert audit_run(tmp_path / "run").exit_code == 1
