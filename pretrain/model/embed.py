"""Clips -> tubelets -> tokens: cutting, its inverse, the linear embedding and the table of positions.

Legend: B clips  C channels  T frames  H,W pixels  N tokens = S slots * A cells  K some of the N tokens  D width
P values of one tubelet, ordered (channel, time, row, column) as the weight of VideoMAE's Conv3d is
"""

from __future__ import annotations

import math

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from pretrain.model.sizes import PATCH, PATCH_VALUES, TUBELET, Grid


def patchify(frames_BCTHW: Tensor) -> Tensor:
    """Cut clips into tubelets: [B, C, T, H, W] -> patches_BNP, of the same dtype. T, H, W fit the tubelets."""
    return rearrange(
        frames_BCTHW,
        "b c (s t) (r h) (q w) -> b (s r q) (c t h w)",
        t=TUBELET,
        h=PATCH,
        w=PATCH,
    )


def unpatchify(patches_BNP: Tensor, grid: Grid) -> Tensor:
    """Put tubelets together again: the inverse of `patchify`, patches_BNP -> [B, C, T, H, W]."""
    return rearrange(
        patches_BNP,
        "b (s r q) (c t h w) -> b c (s t) (r h) (q w)",
        s=grid.slots,
        r=grid.rows,
        q=grid.cols,
        t=TUBELET,
        h=PATCH,
        w=PATCH,
    )


def take(tokens_BNX: Tensor, positions_BK: Tensor) -> Tensor:
    """Of each clip the tokens at its own positions: [B, N, X], int64 [B, K] -> [B, K, X]."""
    return tokens_BNX.gather(1, positions_BK.unsqueeze(-1).expand(-1, -1, tokens_BNX.shape[-1]))


def sinusoid_table(num_tokens: int, width: int) -> Tensor:
    """VideoMAE's fixed positions: one sinusoid over the flattened tokens (time and space not told apart), fp32 [N, D].

    Computed in float64 as in transformers, so that both tables are equal to the last bit.
    """
    position_N1 = np.arange(num_tokens, dtype=np.float64)[:, None]
    angle_ND = position_N1 / np.power(10000, 2 * (np.arange(width) // 2) / width)
    table_ND = np.where(np.arange(width) % 2 == 0, np.sin(angle_ND), np.cos(angle_ND))
    return torch.as_tensor(table_ND.astype(np.float32))


class Linear(nn.Linear):
    """A linear layer that starts as in VideoMAE: Xavier-uniform weight, zero bias.

    The draw happens inside the constructor, so that it also holds where parameters are partitioned as they are made.
    """

    def reset_parameters(self) -> None:
        """Draw the weight, zero the bias."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]  # None with bias=False
            nn.init.zeros_(self.bias)


class Embed(nn.Linear):
    """Tubelets -> tokens: VideoMAE's Conv3d as one matmul, so that only the tubelets that are seen are embedded.

    Starts as that Conv3d does: weight and bias uniform within 1/sqrt(P). Input of any float dtype, output in the
    weight's.
    """

    def __init__(self, width: int) -> None:
        super().__init__(PATCH_VALUES, width)  # pyright: ignore[reportUnknownMemberType]  # torch types device loosely

    def reset_parameters(self) -> None:
        """Draw weight and bias."""
        bound = 1 / math.sqrt(PATCH_VALUES)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """patches_BKP -> tokens_BKD."""
        return super().forward(input.to(self.weight.dtype))
