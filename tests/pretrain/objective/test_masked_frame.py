from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.model.embed import patchify
from pretrain.model.sizes import SIZES, Grid
from pretrain.model.vit import Encoder
from pretrain.objective.loss import ClipKeys
from pretrain.objective.masked_frame import MaskedFrame
from pretrain.objective.targets import normalised_pixels
from pretrain.sections import MaskedFrameConfig
from shards.errors import UserError

NANO = SIZES["nano"]
GRID = Grid.of(8, 64)


def keys(num_clips: int, first: int = 0) -> ClipKeys:
    zeros = torch.zeros(num_clips, dtype=torch.int64)
    return ClipKeys(7, zeros, torch.arange(first, first + num_clips), zeros)


def build(**config: object) -> tuple[Encoder, MaskedFrame]:
    torch.manual_seed(0)
    return Encoder(NANO, GRID.num_tokens), MaskedFrame(MaskedFrameConfig.model_validate(config), NANO, GRID)


def patches(num_clips: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return patchify(torch.randn(num_clips, 3, 8, 64, 64, generator=generator))


def test_plan_is_int64_and_the_same_in_any_micro_batch():
    _, objective = build()
    whole = objective.plan(keys(6))
    assert {value.dtype for value in whole.values()} == {torch.int64}
    assert {value.device.type for value in whole.values()} == {"cpu"}
    for first in range(0, 6, 2):
        part = objective.plan(keys(2, first))
        assert all(torch.equal(part[name], whole[name][first : first + 2]) for name in whole)


def test_filler_clips_can_be_planned():
    _, objective = build()
    filler = torch.full((2,), -1, dtype=torch.int64)
    assert objective.plan(ClipKeys(0, filler, filler, filler))["visible_BV"].shape == (2, GRID.slots * 2)


def test_loss_is_the_mean_over_masked_tokens_of_the_squared_error():
    encoder, objective = build()
    plan = objective.plan(keys(3))
    patches_BNP = patches(3)
    loss = objective(encoder, patches_BNP, plan)
    for b in range(3):
        visible, masked = plan["visible_BV"][b : b + 1], plan["masked_BM"][b : b + 1]
        latent = encoder(patches_BNP[b : b + 1, visible[0]], visible)
        predicted = objective.decoder(latent, visible, masked)
        target = normalised_pixels(patches_BNP[b : b + 1])[:, masked[0]]
        torch.testing.assert_close(loss.value_B[b], (predicted - target).square().mean())


def test_tube_and_frame_parts_make_up_the_loss():
    encoder, objective = build()
    plan = objective.plan(keys(8))
    loss = objective(encoder, patches(8), plan)
    tube, frame = loss.parts["tube"], loss.parts["frame"]
    assert torch.equal(tube.count_B + frame.count_B, torch.full((8,), float(plan["masked_BM"].shape[1])))
    torch.testing.assert_close((tube.sum_B + frame.sum_B) / plan["masked_BM"].shape[1], loss.value_B.detach())
    num_hidden = torch.tensor([GRID.slots - len(set((row // GRID.cells).tolist())) for row in plan["visible_BV"]])
    assert torch.equal(frame.count_B, num_hidden * GRID.cells)
    assert set(num_hidden.tolist()) == {0, 2}


def test_baselines_only_when_asked_for():
    encoder, objective = build()
    plan = objective.plan(keys(2))
    patches_BNP = patches(2)
    assert objective(encoder, patches_BNP, plan).parts.keys() == {"tube", "frame"}
    parts = objective(encoder, patches_BNP, plan, baselines=True).parts
    zero, copy = (parts[name].sum_B / parts[name].count_B for name in ("zero", "copy"))
    torch.testing.assert_close(zero, torch.full((2,), 511 / 512), rtol=0, atol=1e-3)
    torch.testing.assert_close(copy, torch.full((2,), 2.0), rtol=0, atol=0.05)  # noise copied onto other noise


def test_copying_is_perfect_where_every_tubelet_is_alike():
    encoder, objective = build()
    patches_BNP = patches(2)[:, :1].expand(-1, GRID.num_tokens, -1).contiguous()
    parts = objective(encoder, patches_BNP, objective.plan(keys(2)), baselines=True).parts
    assert float(parts["copy"].sum_B.sum()) == 0
    assert float(parts["zero"].sum_B.sum()) > 1


def test_hidden_pixels_reach_the_loss_only_as_targets():
    encoder, objective = build()
    plan = objective.plan(keys(1))
    patches_BNP = patches(1)
    seen: list[Tensor] = []
    encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    objective(encoder, patches_BNP, plan)
    assert seen[0].shape[1] == plan["visible_BV"].shape[1]
    assert torch.equal(seen[0], patches_BNP[:, plan["visible_BV"][0]])


def test_impossible_counts_are_refused_when_built():
    with pytest.raises(UserError, match=r"objective\.masked_frame\.num_frames_masked is 1; .*: use 0"):
        build(num_frames_masked=(1,))
