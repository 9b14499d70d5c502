"""C8: what any number of ranks at any ZeRO stage saved, any other number at any other stage goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

STATES = ("fp32", "exp_avg", "exp_avg_sq")


def whole(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {
        f"{name} {state}": checkpoint.read(name, state, 0, int(torch.Size(shape).numel()))
        for name, shape in checkpoint.facts.shapes.items()
        for state in STATES
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_by_two_ranks_at_stage_2_goes_on_anywhere(ranks: Any, tmp_path: Path, precision: str) -> None:
    """Two ranks at stage 2 save after two of four steps; 1 rank at stage 3, 4 ranks at stage 1 and others go on.

    The seed of the initial weights differs in each of them, so whatever was not restored would show.
    """
    saved, end = tmp_path / "saved", tmp_path / "end"
    settings: dict[str, Any] = {"global_batch": 8, "micro_batch": 2, "precision": precision}
    [uninterrupted, _] = ranks(2).run("train", steps=[0, 1, 2, 3], stage=2, save=str(end), **settings)
    ranks(2).run("train", steps=[0, 1], stage=2, save=str(saved), **settings)
    folder = str(saved / "checkpoints" / "step-000002")
    before = whole(Path(folder))
    for world, stage in ((1, 3), (4, 1), (2, 0), (3, 2), (2, 3)):
        here = tmp_path / f"{world}-{stage}"
        ranks(world).run("resave", stage=stage, load=folder, save=str(here), step=2, **settings)
        after = whole(here / "checkpoints" / "step-000002")
        assert before.keys() == after.keys()
        for name, values in before.items():
            assert torch.equal(after[name], values), f"{name} at {world} ranks, stage {stage}"
        answers = ranks(world).run("train", steps=[2, 3], stage=stage, load=folder, seed=99, **settings)
        tolerance = 1e-5 if precision == "fp32" else 2e-2
        for step in (0, 1):
            expected = uninterrupted["losses"][2 + step]["loss"]
            assert answers[0]["losses"][step]["loss"] == pytest.approx(expected, rel=tolerance)
        assert answers[0]["optimizer_steps"] == 4


def test_same_layout_goes_on_bit_by_bit(ranks: Any, tmp_path: Path) -> None:
    for stage in (1, 2, 3):
        run = tmp_path / str(stage)
        settings: dict[str, Any] = {"stage": stage, "precision": "bf16", "global_batch": 8, "micro_batch": 2}
        ranks(2).run("train", steps=[0, 1, 2, 3], save=str(run / "whole"), **settings)
        ranks(2).run("train", steps=[0, 1], save=str(run / "half"), **settings)
        folder = run / "half" / "checkpoints" / "step-000002"
        ranks(2).run("train", steps=[2, 3], load=str(folder), seed=99, save=str(run / "resumed"), **settings)
        expected = whole(run / "whole" / "checkpoints" / "step-000004")
        for name, values in whole(run / "resumed" / "checkpoints" / "step-000004").items():
            assert torch.equal(values, expected[name]), f"{name} at stage {stage}"


@pytest.mark.parametrize(("optimizer", "keys"), [("sgd", ("momentum_buffer",)), ("adamw", STATES[1:])])
def test_offload_and_momentum_go_on_too(ranks: Any, tmp_path: Path, optimizer: str, keys: tuple[str, ...]) -> None:
    """Saved with states in CPU memory at stage 2, gone on with at stages 1 (offloaded), 3 (offloaded) and 0."""
    settings: dict[str, Any] = {"precision": "fp32", "global_batch": 8, "micro_batch": 2, "optimizer": optimizer}
    [uninterrupted, _] = ranks(2).run("train", steps=[0, 1, 2, 3], stage=2, offload=True, **settings)
    ranks(2).run("train", steps=[0, 1], stage=2, offload=True, save=str(tmp_path), **settings)
    folder = tmp_path / "checkpoints" / "step-000002"
    assert all(Checkpoint(folder).has("encoder.norm.weight", key) for key in keys)
    for world, stage, offload in ((2, 2, True), (3, 1, True), (1, 3, True), (2, 0, False)):
        answers = ranks(world).run(
            "train", steps=[2, 3], stage=stage, offload=offload, load=str(folder), seed=99, **settings
        )
        expected = [loss["loss"] for loss in uninterrupted["losses"][2:]]
        assert [loss["loss"] for loss in answers[0]["losses"]] == pytest.approx(expected, rel=1e-5)


def test_slices_cover_every_state_once(ranks: Any, tmp_path: Path) -> None:
    """commit() asserts the cover; here the sizes on disk show that nothing is stored twice."""
    for world, stage in ((1, 0), (4, 0), (3, 1), (3, 3)):
        run = tmp_path / f"{world}-{stage}"
        ranks(world).run("train", steps=[0], stage=stage, save=str(run))
        checkpoint = Checkpoint(run / "checkpoints" / "step-000001")
        numel = sum(int(torch.Size(shape).numel()) for shape in checkpoint.facts.shapes.values())
        stored = sum(file["bytes"] for file in checkpoint.files.values())
        assert stored < numel * 4 * len(STATES) * 1.1
