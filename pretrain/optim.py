"""Which optimizer, and which parameters it decays."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrain.sections import OptimConfig


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of torch optimizers: weights of linear layers are decayed; biases, norms and tokens are not.

    Told by the kind of layer and not by the number of dimensions, which partitioned parameters (ZeRO-3) have not kept.
    Parameters that are frozen are left out, and so are empty groups.
    """
    linear_weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if id(parameter) in linear_weights]
    others = [parameter for parameter in trained if id(parameter) not in linear_weights]
    groups = ({"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Torch's AdamW, Adam (where decay is added to the gradient) or SGD over the decay groups of `model`."""
    groups = decay_groups(model, config.weight_decay)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    adam = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return adam(groups, lr=config.lr, betas=config.betas, eps=config.eps)
