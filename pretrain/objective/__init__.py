"""What is learned: OBJECTIVES by name, and the module that holds the encoder and those of a run.

A further objective is a file beside these, a section in `ObjectiveConfig` and a line in OBJECTIVES; `train.py`
does not change.

Legend: B clips  C channels  T frames  H,W pixels  N tokens  P values of one tubelet
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from pretrain.model.embed import patchify
from pretrain.model.sizes import SIZES, Grid
from pretrain.model.vit import Encoder
from pretrain.objective.frame_order import FrameOrder
from pretrain.objective.loss import ClipKey, ClipKeys, Loss, Objective, Part
from pretrain.objective.masked_frame import MaskedFrame
from pretrain.sections import ObjectiveConfig

__all__ = ["OBJECTIVES", "ClipKey", "ClipKeys", "Loss", "Objective", "Part", "Pretraining"]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "masked_frame": MaskedFrame,
    "frame_order": FrameOrder,
}
"""Name of the section in `ObjectiveConfig` -> objective, called with (section, size, grid, activation_checkpointing=).
The order is the one in which they run."""


class Pretraining(nn.Module):
    """Encoder and objectives: the module that is trained. One forward pass gives the losses of all objectives."""

    def __init__(
        self,
        model_size: str,
        config: ObjectiveConfig,
        *,
        frames: int,
        size: int,
        seed: int,
        activation_checkpointing: bool = False,
    ) -> None:
        """Build for clips of `frames` x `size` x `size`, with weights that depend on `seed` alone."""
        super().__init__()
        model = SIZES[model_size]
        self.grid = Grid.of(frames, size)
        with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]  # torch: untyped
            torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]  # torch: untyped
            self.encoder = Encoder(model, self.grid.num_tokens, activation_checkpointing=activation_checkpointing)
            self.objectives = nn.ModuleDict(
                {
                    name: build(section, model, self.grid, activation_checkpointing=activation_checkpointing)
                    for name, build in OBJECTIVES.items()
                    if (section := getattr(config, name)) is not None
                }
            )
        assert len(self.objectives) > 0, "ObjectiveConfig without an objective; pretrain.rules refuses it"

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each objective's loss in the sum."""
        return {name: objective.weight for name, objective in self._items()}

    def plan(self, keys: ClipKeys) -> dict[str, dict[str, Tensor]]:
        """Every objective's draws for a micro batch, on the CPU, the same on any rank."""
        return {name: objective.plan(keys) for name, objective in self._items()}

    def forward(
        self,
        frames_BCTHW: Tensor,
        plans: Mapping[str, Mapping[str, Tensor]],
        *,
        baselines: bool = False,
    ) -> dict[str, Loss]:
        """Losses by objective, for normalised fp32 frames and what `plan` drew, both on the module's device."""
        patches_BNP = patchify(frames_BCTHW)
        return {
            name: objective(self.encoder, patches_BNP, plans[name], baselines=baselines)
            for name, objective in self._items()
        }

    def flops(self) -> int:
        """Matmul and attention operations of one clip's forward pass (2 per multiply-add)."""
        return sum(objective.flops() for _, objective in self._items())

    def training_flops(self) -> int:
        """The same, forward and backward."""
        return sum(objective.training_flops() for _, objective in self._items())

    def _items(self) -> list[tuple[str, Objective]]:
        return [(name, cast(Objective, objective)) for name, objective in self.objectives.items()]
