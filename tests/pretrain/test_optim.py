from __future__ import annotations

import pytest
import torch

from pretrain.objective import Pretraining
from pretrain.optim import build_optimizer, decay_groups
from pretrain.sections import FrameOrderConfig, MaskedFrameConfig, ObjectiveConfig, OptimConfig


@pytest.fixture(scope="module")
def model() -> Pretraining:
    config = ObjectiveConfig(masked_frame=MaskedFrameConfig(mask_ratio=0.5), frame_order=FrameOrderConfig())
    return Pretraining("nano", config, frames=6, size=32, seed=0)


def test_only_weights_of_linear_layers_are_decayed(model: Pretraining):
    decayed, others = decay_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    kept = {names[id(p)] for p in others["params"]}
    assert kept == {name for name, p in model.named_parameters() if p.ndim == 1}
    assert "objectives.masked_frame.decoder.mask_token" in kept
    assert "encoder.blocks.0.attention.q_bias" in kept
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - kept


def test_every_trained_parameter_is_in_one_group(model: Pretraining):
    groups = decay_groups(model, 0.05)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_frozen_parameters_and_empty_groups_are_left_out():
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    assert [group["params"] for group in decay_groups(layer, 0.1)] == [[layer.weight]]


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_settings_reach_torch(model: Pretraining, name: str, kind: type[torch.optim.Optimizer]):
    config = OptimConfig.model_validate(
        {"name": name, "lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2, "momentum": 0.7}
    )
    optimizer = build_optimizer(model, config)
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    for group in optimizer.param_groups:
        assert group["lr"] == 0.01
        if name == "sgd":
            assert group["momentum"] == 0.7
        else:
            assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)
