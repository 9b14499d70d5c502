from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from pretrain.objective import OBJECTIVES, ClipKeys, Loss, Pretraining
from pretrain.sections import FrameOrderConfig, MaskedFrameConfig, ObjectiveConfig

BOTH = ObjectiveConfig(masked_frame=MaskedFrameConfig(mask_ratio=0.75), frame_order=FrameOrderConfig(weight=0.25))
FRAMES, SIZE = 8, 64


def build(config: ObjectiveConfig = BOTH, *, seed: int = 0, activation_checkpointing: bool = False) -> Pretraining:
    return Pretraining(
        "nano", config, frames=FRAMES, size=SIZE, seed=seed, activation_checkpointing=activation_checkpointing
    )


def clips(num_clips: int) -> Tensor:
    return torch.randn(num_clips, 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def keys(num_clips: int, first: int = 0) -> ClipKeys:
    zeros = torch.zeros(num_clips, dtype=torch.int64)
    return ClipKeys(3, zeros, torch.arange(first, first + num_clips), zeros)


def total(model: Pretraining, losses: dict[str, Loss]) -> Tensor:
    return torch.stack([model.weights[name] * loss.value_B.sum() for name, loss in losses.items()]).sum()


def test_every_objective_has_a_section_and_the_other_way_round():
    assert list(OBJECTIVES) == list(ObjectiveConfig.model_fields)


def test_one_pass_gives_all_losses_per_clip_in_float32():
    model = build()
    losses = model(clips(3), model.plan(keys(3)))
    assert list(losses) == ["masked_frame", "frame_order"]
    assert model.weights == {"masked_frame": 1.0, "frame_order": 0.25}
    for loss in losses.values():
        assert loss.value_B.shape == (3,)
        assert loss.value_B.dtype == torch.float32
        assert loss.value_B.requires_grad
        for part in loss.parts.values():
            assert part.sum_B.shape == part.count_B.shape == (3,)
            assert not part.sum_B.requires_grad


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_an_objective_alone(name: str):
    model = build(BOTH.model_copy(update={other: None for other in OBJECTIVES if other != name}))
    losses = model(clips(2), model.plan(keys(2)))
    assert list(losses) == [name]
    total(model, losses).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    one = build(seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    two, other = build(seed=4).state_dict(), build(seed=5).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["encoder.embed.weight"], other["encoder.embed.weight"])


def test_a_clips_losses_do_not_depend_on_its_micro_batch():
    model, frames_BCTHW = build(), clips(4)
    together = model(frames_BCTHW, model.plan(keys(4)), baselines=True)
    for b in range(4):
        alone = model(frames_BCTHW[b : b + 1], model.plan(keys(1, first=b)), baselines=True)
        for name, loss in together.items():
            torch.testing.assert_close(alone[name].value_B[0], loss.value_B[b], rtol=1e-6, atol=1e-6)
            for part, pair in loss.parts.items():
                torch.testing.assert_close(alone[name].parts[part].sum_B[0], pair.sum_B[b], rtol=1e-5, atol=1e-5)
                assert alone[name].parts[part].count_B[0] == pair.count_B[b]


def test_gradients_of_four_clips_are_those_of_four_times_one():
    frames_BCTHW, model = clips(4), build()
    total(model, model(frames_BCTHW, model.plan(keys(4)))).backward()
    together = {name: parameter.grad for name, parameter in model.named_parameters()}
    apart = build()
    for b in range(4):
        total(apart, apart(frames_BCTHW[b : b + 1], apart.plan(keys(1, first=b)))).backward()
    for name, parameter in apart.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, together[name], rtol=1e-4, atol=1e-5)


def test_every_parameter_has_a_gradient_path_whatever_the_clips_show():
    model = build()
    black = torch.zeros(2, 3, FRAMES, SIZE, SIZE)  # wholly gated, flat targets
    losses = model(black, model.plan(keys(2)))
    (total(model, losses) * 0).backward()  # a filler micro batch: every weight is zero
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


def test_modules_run_in_the_same_order_in_every_step():
    model = build()
    orders: list[list[str]] = []
    for frames_BCTHW, first in ((clips(2), 0), (torch.zeros(2, 3, FRAMES, SIZE, SIZE), 100), (clips(2), 7)):
        called: list[str] = []
        hooks = [
            module.register_forward_pre_hook(lambda _module, _args, name=name, called=called: called.append(name))
            for name, module in model.named_modules()
        ]
        model(frames_BCTHW, model.plan(keys(2, first)))
        for hook in hooks:
            hook.remove()
        orders.append(called)
    assert orders[0] == orders[1] == orders[2]
    assert orders[0].count("encoder") == 2


def test_activation_checkpointing_changes_no_gradient():
    gradients: list[list[Tensor | None]] = []
    for activation_checkpointing in (False, True):
        model = build(activation_checkpointing=activation_checkpointing)
        total(model, model(clips(2), model.plan(keys(2)))).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_in_bfloat16_losses_stay_float32_and_near():
    model, frames_BCTHW = build(), clips(4)
    exact = model(frames_BCTHW, model.plan(keys(4)))
    rounded = copy.deepcopy(model).bfloat16()(frames_BCTHW, model.plan(keys(4)))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(frames_BCTHW, model.plan(keys(4)))
    for losses in (rounded, mixed):
        for name, loss in losses.items():
            assert loss.value_B.dtype == torch.float32
            torch.testing.assert_close(loss.value_B, exact[name].value_B, rtol=0.03, atol=0.03)


def test_targets_do_not_depend_on_the_precision_of_the_model():
    model, frames_BCTHW = build(), clips(2)
    plans = model.plan(keys(2))
    exact = model(frames_BCTHW, plans, baselines=True)["masked_frame"].parts
    rounded = model.bfloat16()(frames_BCTHW, plans, baselines=True)["masked_frame"].parts
    assert torch.equal(exact["zero"].sum_B, rounded["zero"].sum_B)
    assert torch.equal(exact["copy"].sum_B, rounded["copy"].sum_B)


def test_learns_to_fill_in_a_clip():
    """Loss on a fixed clip falls far below predicting zero: the gradient points the right way through all parts."""
    model = build()
    ramp = torch.linspace(-1, 1, SIZE)
    frames_BCTHW = (ramp[:, None] + ramp[None, :].sin()).expand(1, 3, FRAMES, SIZE, SIZE).contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    plans = model.plan(keys(1))
    for _ in range(40):
        losses = model(frames_BCTHW, plans, baselines=True)
        optimizer.zero_grad()
        total(model, losses).backward()
        optimizer.step()
    zero = losses["masked_frame"].parts["zero"]
    assert float(losses["masked_frame"].value_B.detach()) < 0.3 * float(zero.sum_B / zero.count_B)


def test_operations_are_the_sum_over_objectives():
    model = build()
    encoder_only = build(BOTH.model_copy(update={"masked_frame": None}))
    decoder_too = build(BOTH.model_copy(update={"frame_order": None}))
    assert model.flops() == encoder_only.flops() + decoder_too.flops()
