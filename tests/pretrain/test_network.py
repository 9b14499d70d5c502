"""The plan's layers against the real model: names, parameters, operations, for every size and set of objectives."""

from __future__ import annotations

import pytest
import torch

from pretrain.config import load_config
from pretrain.model.sizes import SIZES
from pretrain.network import network_of
from pretrain.objective import Pretraining

MASKED, ORDER = "objective.masked_frame.mask_ratio=0.9", "objective.frame_order.mask_ratio=0.8"
NEEDED = ("run.dir=x", "data.shards=x", "train.steps=9", "train.global_batch=8", "optim.lr=1e-3")


@pytest.mark.parametrize("objectives", [(MASKED,), (ORDER,), (MASKED, ORDER)], ids=["masked", "order", "both"])
@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_operations_are_the_models(size: str, objectives: tuple[str, ...]) -> None:
    config = load_config(None, [*NEEDED, f"model.size={size}", "data.frames=16", "data.size=112", *objectives])
    with torch.device("meta"):  # shapes without a gigabyte behind them
        model = Pretraining(size, config.objective, frames=16, size=112, seed=0)
    network = network_of(config)
    expected = [(name, parameter.numel()) for name, parameter in model.named_parameters()]
    assert [(weight.name, weight.numel) for weight in network.weights] == expected
    linear = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    decayed = {name for name, parameter in model.named_parameters() if id(parameter) in linear}
    assert {weight.name for weight in network.weights if weight.is_decayed} == decayed
    assert network.training_flops == model.training_flops()
    assert sum(layer.flops for layer in network.layers) == model.flops()
    assert sum(network.parts().values()) == network.num_parameters == sum(numel for _, numel in expected)
