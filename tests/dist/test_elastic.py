"""One run on 1, then 4, then 3, then 2 ranks, at stages 1, 3, 2, 0, and nobody notices (C8, C10).

Every start draws other initial weights: whatever is not restored would show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import newest
from pretrain.track import read_metrics
from pretrain.witness import audit_run
from tests.dist import ranks
from tests.dist.test_failures import write_config

pytestmark = pytest.mark.slow

CHAIN = ((1, 1), (4, 3), (3, 2), (2, 0))
RESEEDED = str(Path(__file__).with_name("reseeded.py"))
CONSTANT_RATE = {"optim__lr": 1e-3, "schedule__final_lr": 1e-3}


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if row["kind"] == "train"]


def states(run: Path) -> dict[str, torch.Tensor]:
    found = newest(run)
    assert found is not None
    assert found.facts.step == 8
    assert found.facts.optimizer_steps == 8
    return {
        f"{name} {state}": found.read(name, state, 0, int(torch.Size(shape).numel()))
        for name, shape in found.facts.shapes.items()
        for state in ("fp32", "exp_avg", "exp_avg_sq")
    }


def test_four_worlds_and_stages_make_one_run(tmp_path: Path, packed: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "chain").mkdir()
    batch: dict[str, Any] = {"train__global_batch": 12, **CONSTANT_RATE}
    ranks.train(write_config(tmp_path / "whole", packed, **batch), 1)
    config = write_config(tmp_path / "chain", packed, **batch)
    for number, (world, stage) in enumerate(CHAIN, start=1):
        steps = f"train.steps={2 * number}"
        ranks.train(config, world, steps, f"zero.stage={stage}", "--change", program=(RESEEDED, str(number)))
    whole, chain = tmp_path / "whole" / "run", tmp_path / "chain" / "run"
    result = audit_run(chain)
    assert result.exit_code == 0, "\n".join(result.lines)
    assert result.counts["clips"] == 8 * 12
    assert losses(chain) == pytest.approx(losses(whole), rel=2e-5)
    expected = states(whole)
    for name, values in states(chain).items():
        assert torch.allclose(values, expected[name], rtol=1e-3, atol=2e-6), name


def test_the_reseeded_start_is_another_one(tmp_path: Path, packed: Path) -> None:
    """Without a checkpoint to restore, the first loss differs: so the test above would see weights that were not."""
    runs: list[Path] = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        config = write_config(tmp_path / str(number), packed, train__steps=1)
        ranks.train(config, 1, program=(RESEEDED, str(number)))
        runs.append(tmp_path / str(number) / "run")
    assert losses(runs[0]) != pytest.approx(losses(runs[1]), rel=1e-4)
