"""What only a GPU can show. `make test-gpu`; needs one NVIDIA GPU, and fails without."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import load_parameters
from pretrain.data.augment import to_model_input
from pretrain.data.loader import ClipLoader
from pretrain.sections import DataConfig
from pretrain.witness import audit_run
from tests.dist import ranks

ROOT = Path(__file__).resolve().parents[2]
GREY_LEVEL = 1 / 255 / 0.225


@pytest.fixture(autouse=True)
def gpu() -> None:
    assert torch.cuda.is_available(), "make test-gpu needs an NVIDIA GPU"


def test_pixels_agree_with_the_cpu_within_one_grey_level(packed: Path) -> None:
    """C3: floats within one grey level across devices."""
    with ClipLoader(DataConfig(shards=str(packed), size=64, workers=1), seed=0, global_batch=4) as loader:
        batch = next(loader)
    on_cpu = to_model_input(batch, 64)
    on_gpu = to_model_input(batch.to("cuda"), 64)
    assert on_gpu.device.type == "cuda"
    assert float((on_gpu.cpu() - on_cpu).abs().max()) <= GREY_LEVEL


def train(config: Path, *overrides: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "pretrain", str(config), "--ranks", "1", *overrides], cwd=ROOT, check=False
    )
    assert done.returncode == 0


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_alike(stage: int, tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """fp32 on the GPU at stage 0 against each stage, and the audit."""
    for name, wanted in (("zero", 0), ("other", stage)):
        train(tiny_config(name, **{"train.precision": "fp32", "zero.stage": wanted}))
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "zero"), rel=1e-4)
    assert audit_run(tmp_path / "other").exit_code == 0


def test_killed_and_resumed_is_bit_identical_when_asked_for(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"train.deterministic": True, "train.steps": 6}
    ranks.train(tiny_config("whole", **settings), 1)
    killed = tiny_config("killed", **settings)
    program = [str(ROOT / "tests" / "dist" / "die_at.py"), "between ledger and rename", "4", str(killed)]
    codes, outputs = ranks.finish(ranks.start(program, 1))
    assert codes == [-signal.SIGKILL], outputs
    ranks.train(killed, 1)
    expected, _ = load_parameters(tmp_path / "whole")
    for name, values in load_parameters(tmp_path / "killed")[0].items():
        assert torch.equal(values, expected[name]), name
