from __future__ import annotations

import dataclasses

import pytest
import torch

from pretrain.batch import ClipBatch

MOVES = {"planes_BTN", "crop_B4", "flip_B", "weight_B"}


@pytest.fixture
def batch() -> ClipBatch:
    return ClipBatch(
        step=3,
        micro_step=1,
        planes_BTN=torch.zeros((3, 2, 6), dtype=torch.uint8),
        height_B=torch.full((3,), 2, dtype=torch.int32),
        width_B=torch.full((3,), 2, dtype=torch.int32),
        crop_B4=torch.tensor([[0.0, 0.0, 2.0, 2.0]]).expand(3, 4),
        flip_B=torch.zeros(3, dtype=torch.bool),
        color_B=torch.zeros(3, dtype=torch.uint8),
        frame_numbers_BT=torch.zeros((3, 2), dtype=torch.int32),
        position_B=torch.tensor([6, 7, -1]),
        epoch_B=torch.tensor([0, 1, 0]),
        draw_B=torch.zeros(3, dtype=torch.int64),
        wanted_B=torch.tensor([4, 0, -1]),
        sample_B=torch.tensor([4, 0, -1]),
        checksum_B=torch.tensor([9, 9, 0]),
        weight_B=torch.tensor([1.0, 1.0, 0.0]),
    )


def test_fillers_are_not_counted(batch: ClipBatch) -> None:
    assert batch.num_real == 2


def test_only_what_the_model_computes_with_moves(batch: ClipBatch) -> None:
    moved = batch.to("meta")
    for field in dataclasses.fields(ClipBatch):
        value = getattr(moved, field.name)
        if isinstance(value, torch.Tensor):
            assert value.device.type == ("meta" if field.name in MOVES else "cpu"), field.name
        else:
            assert value == getattr(batch, field.name)
    assert moved.num_real == 2


def test_a_batch_cannot_be_changed(batch: ClipBatch) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.step = 4
