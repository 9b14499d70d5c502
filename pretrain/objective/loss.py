"""The seam of the objectives: what one is asked and what it answers.

Everything is per clip (suffix _B), so that a clip's loss depends on nothing else in its micro batch (C10) and filler
clips are left out by their weight alone.

Legend: B clips  N tokens  P values of one tubelet
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pretrain.model.sizes import Size, embed_flops
from pretrain.model.vit import Encoder
from shards.order import uniform


@dataclass(frozen=True)
class Part:
    """A figure beside the loss as sums and counts per clip, so that it averages exactly over any set of clips."""

    sum_B: Tensor
    count_B: Tensor


@dataclass(frozen=True)
class Loss:
    """One objective's loss of each clip, fp32, with its graph; and parts without one."""

    value_B: Tensor
    parts: dict[str, Part]


@dataclass(frozen=True)
class ClipKeys:
    """What the random draws of each clip depend on (C3): the run's seed, and int64 CPU tensors per clip."""

    seed: int
    epoch_B: Tensor
    sample_B: Tensor
    draw_B: Tensor

    def __iter__(self) -> Iterator[ClipKey]:
        """One clip after the other."""
        for epoch, sample, draw in torch.stack([self.epoch_B, self.sample_B, self.draw_B], dim=1).numpy():
            yield ClipKey(self.seed, int(epoch), int(sample), int(draw))


@dataclass(frozen=True)
class ClipKey:
    """The key of one clip."""

    seed: int
    epoch: int
    sample: int
    draw: int

    def uniform(self, purpose: str, size: int) -> NDArray[np.float64]:
        """`size` numbers in [0, 1) that depend on this key and the purpose alone: the same on every rank."""
        return uniform(self.seed, epoch=self.epoch, sample=self.sample, draw=self.draw, purpose=purpose, size=size)


class Objective(nn.Module):
    """One thing to learn. Its own layers (decoder, head) are its submodules; the encoder is shared and handed in.

    A subclass runs the same modules in the same order in every step and connects its value to each of their parameters
    even where a clip has nothing to learn: ranks whose graphs differ hang in each other's collectives (ZeRO).
    """

    weight: float
    """Weight of this loss in the sum."""
    size: Size
    num_encoded: int
    """Tokens of a clip that pass through the encoder."""

    def plan(self, keys: ClipKeys) -> dict[str, Tensor]:
        """Draw the masks and permutations of a micro batch: int64 CPU tensors, first dimension B."""
        raise NotImplementedError

    def forward(
        self, encoder: Encoder, patches_BNP: Tensor, plan: Mapping[str, Tensor], *, baselines: bool = False
    ) -> Loss:
        """Loss of each clip. With `baselines` also what trivial predictors would lose, as further parts."""
        raise NotImplementedError

    def training_flops(self) -> int:
        """Of one clip, forward and backward: backward multiplies twice for each multiplication of forward.

        Only the embedding needs half of that: nobody asks for the gradient of the pixels.
        """
        return 3 * self.flops() - embed_flops(self.size, self.num_encoded)

    def flops(self) -> int:
        """Matmul and attention operations of one clip's forward pass, encoder passes included (2 per multiply-add)."""
        raise NotImplementedError
