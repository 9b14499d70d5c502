"""C10: losses and gradients are the same however the batch is split over ranks, micro batches and ZeRO stages.

The gradient is read from Adam's first moment after one step: (1 - beta1) * gradient, gathered from every rank's slices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

GLOBAL_BATCH = 6
RELATIVE = 1e-5

# world, stage, micro batch, offload: every pair of values of two columns occurs at least once (offload needs a stage).
PAIRWISE = [
    (1, 0, 2, False),
    (1, 1, 6, True),
    (1, 2, 1, False),
    (1, 3, 4, True),
    (2, 0, 1, False),
    (2, 1, 2, False),
    (2, 2, 4, True),
    (2, 3, 6, False),
    (3, 0, 4, False),
    (3, 1, 1, True),
    (3, 2, 2, True),
    (3, 3, 1, False),
    (4, 0, 6, False),
    (4, 1, 4, False),
    (4, 2, 6, True),
    (4, 3, 2, True),
]


def tensors(folder: Path, state: str) -> dict[str, torch.Tensor]:
    """Every parameter's whole state, put together from all ranks' slices."""
    checkpoint = Checkpoint(folder)
    return {
        name: checkpoint.read(name, state, 0, int(torch.Size(shape).numel()))
        for name, shape in checkpoint.facts.shapes.items()
    }


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        worst = float((got[name] - values).abs().max())
        scale = float(values.abs().max())
        assert worst <= relative * scale + 1e-9, f"{name}: {worst} of {scale}"


@pytest.fixture(scope="module")
def reference(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """One rank, no sharding, the whole batch at once."""
    run = tmp_path_factory.mktemp("reference")
    [answer] = ranks(1).run(
        "train", steps=[0], stage=0, global_batch=GLOBAL_BATCH, micro_batch=GLOBAL_BATCH, save=str(run), clip_norm=0.0
    )
    return answer["losses"][0], tensors(run / "checkpoints" / "step-000001", "exp_avg")


@pytest.mark.parametrize(("world", "stage", "micro_batch", "offload"), PAIRWISE)
def test_loss_and_gradient_do_not_depend_on_the_split(
    ranks: Any, tmp_path: Path, reference: Any, world: int, stage: int, micro_batch: int, offload: bool
) -> None:
    check_split(ranks(world), tmp_path, reference, stage=stage, micro_batch=micro_batch, offload=offload)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_recomputed_activations_change_nothing(ranks: Any, tmp_path: Path, reference: Any, stage: int) -> None:
    check_split(ranks(2), tmp_path, reference, stage=stage, micro_batch=2, activation_checkpointing=True)


def check_split(
    pool: Any, run: Path, reference: tuple[dict[str, float], dict[str, torch.Tensor]], **split: Any
) -> None:
    """One step of this split against the reference (also used by tests/full)."""
    answers = pool.run("train", steps=[0], global_batch=GLOBAL_BATCH, save=str(run), clip_norm=0.0, **split)
    losses, gradients = reference
    for answer in answers:
        assert answer["losses"][0] == pytest.approx(losses, rel=RELATIVE)
    assert_close(tensors(run / "checkpoints" / "step-000001", "exp_avg"), gradients, RELATIVE)


def test_clipping_is_the_same_at_every_stage(ranks: Any, tmp_path: Path) -> None:
    """The norm is that of the whole gradient, so a clipped step agrees too."""
    norms, moments = [], []
    for stage in range(4):
        run = tmp_path / str(stage)
        run.mkdir()
        answers = ranks(2).run("train", steps=[0], stage=stage, global_batch=4, clip_norm=0.1, save=str(run))
        norms.append(answers[0]["norms"][0])
        moments.append(tensors(run / "checkpoints" / "step-000001", "exp_avg"))
    assert norms == pytest.approx([norms[0]] * 4, rel=RELATIVE)
    assert norms[0] > 0.1
    for other in moments[1:]:
        assert_close(other, moments[0], RELATIVE)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_is_told(ranks: Any, stage: int, precision: str) -> None:
    """Whether DeepSpeed dropped the step or torch applied it: no rank takes it for a good one."""
    assert ranks(2).run("not_finite", stage=stage, precision=precision) == [[True, False]] * 2


@pytest.mark.parametrize(("optimizer", "state"), [("adam", "exp_avg"), ("sgd", "momentum_buffer"), ("sgd", "fp32")])
def test_other_optimizers_agree_over_stages(ranks: Any, tmp_path: Path, optimizer: str, state: str) -> None:
    """Adam's parameters are left out: it divides by the size of the gradient, and so blows up its last bits."""
    results = []
    for stage in range(4):
        run = tmp_path / str(stage)
        run.mkdir()
        ranks(2).run("train", steps=[0], stage=stage, optimizer=optimizer, save=str(run))
        results.append(tensors(run / "checkpoints" / "step-000001", state))
    for other in results[1:]:
        assert_close(other, results[0], RELATIVE)
