from __future__ import annotations

import torch
from torch import nn

from pretrain.model.embed import sinusoid_table
from pretrain.model.sizes import PATCH_VALUES, SIZES
from pretrain.model.vit import Encoder

NANO = SIZES["nano"]


def random_input(num_clips: int = 2, num_visible: int = 12, num_tokens: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    patches_BVP = torch.randn(num_clips, num_visible, PATCH_VALUES, generator=generator)
    rows = [torch.randperm(num_tokens, generator=generator)[:num_visible].sort().values for _ in range(num_clips)]
    return patches_BVP, torch.stack(rows)


def test_the_order_of_tokens_carries_no_information():
    encoder = Encoder(NANO, 64)
    patches_BVP, visible_BV = random_input()
    turned = encoder(patches_BVP.flip(1), visible_BV.flip(1)).flip(1)
    torch.testing.assert_close(turned, encoder(patches_BVP, visible_BV), rtol=1e-5, atol=1e-5)


def test_positions_are_used():
    encoder = Encoder(NANO, 64)
    patches_BVP, visible_BV = random_input()
    assert not torch.allclose(encoder(patches_BVP, visible_BV), encoder(patches_BVP, visible_BV.roll(1, 1)), atol=1e-2)


def test_clips_do_not_mix():
    encoder = Encoder(NANO, 64)
    patches_BVP, visible_BV = random_input(num_clips=3)
    alone = torch.cat([encoder(p[None], v[None]) for p, v in zip(patches_BVP, visible_BV, strict=True)])
    torch.testing.assert_close(encoder(patches_BVP, visible_BV), alone, rtol=1e-5, atol=1e-5)


def test_starts_as_in_videomae():
    encoder = Encoder(SIZES["tiny"], 64)
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear) and name != "embed":
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert float(module.weight.detach().abs().max()) <= bound
            assert abs(float(module.weight.detach().std()) - bound / 3**0.5) < 0.02 * bound
            assert module.bias is None or not module.bias.detach().any()
    biases = [p for name, p in encoder.named_parameters() if name.endswith(("q_bias", "v_bias"))]
    assert len(biases) == 2 * SIZES["tiny"].depth
    assert not any(p.detach().any() for p in biases)


def test_the_table_of_positions_is_no_weight_and_exact_in_bfloat16():
    encoder = Encoder(NANO, 64)
    assert not [name for name in encoder.state_dict() if "position" in name]
    assert encoder.position_ND.dtype == torch.float32
    assert torch.equal(encoder.bfloat16().position_ND, sinusoid_table(64, NANO.width).bfloat16())


def test_features_in_bfloat16_are_near_those_in_float32():
    encoder = Encoder(NANO, 64)
    patches_BVP, visible_BV = random_input()
    exact = encoder(patches_BVP, visible_BV).detach()
    rounded = encoder.bfloat16()(patches_BVP, visible_BV).detach()
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.float() - exact).abs().mean()) < 0.03 * float(exact.abs().mean())


def test_autocast_runs_over_float32_weights():
    encoder = Encoder(NANO, 64)
    patches_BVP, visible_BV = random_input()
    exact = encoder(patches_BVP, visible_BV).detach()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(patches_BVP, visible_BV).detach()
    assert float((mixed.float() - exact).abs().mean()) < 0.03 * float(exact.abs().mean())


def test_activation_checkpointing_changes_no_gradient():
    patches_BVP, visible_BV = random_input()
    gradients: list[list[torch.Tensor]] = []
    calls: list[int] = []
    for activation_checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = Encoder(NANO, 64, activation_checkpointing=activation_checkpointing)
        num_calls = 0

        def count(*_: object) -> None:
            nonlocal num_calls
            num_calls += 1

        encoder.blocks[0].register_forward_pre_hook(count)
        encoder(patches_BVP, visible_BV).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
        calls.append(num_calls)
    assert calls == [1, 2]  # computed again in the backward pass
    assert len(gradients[0]) == len(list(Encoder(NANO, 64).parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
