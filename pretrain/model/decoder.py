"""The decoder: features of the visible tokens -> normalised pixels of the masked ones.

VideoMAE (arXiv 2203.12602), the layout that transformers' `VideoMAEForPreTraining` loads. Used in pretraining only.

Legend: B clips  V visible  M masked tokens  N = all tokens of a clip  D encoder width  E decoder width
P values of one tubelet, here ordered (time, row, column, channel) as VideoMAE predicts them
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.model.embed import Linear, sinusoid_table
from pretrain.model.sizes import PATCH_VALUES, Size
from pretrain.model.vit import Block, run_blocks

HEAD_NORM_EPS = 1e-5
"""eps of the norm before the head: transformers leaves torch's default there, unlike in the blocks."""
MASK_TOKEN_STD = 0.02


class Decoder(nn.Module):
    """A narrow Transformer over visible features and mask tokens."""

    position_NE: Tensor

    def __init__(self, size: Size, num_tokens: int, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        width = size.decoder_width
        self.embed = Linear(size.width, width, bias=False)
        # One dimension, so that it falls under the rule "vectors are not decayed"; an export adds the two others.
        self.mask_token = nn.Parameter(_truncated_normal(width))
        self.register_buffer("position_NE", sinusoid_table(num_tokens, width), persistent=False)
        self.blocks = nn.ModuleList(
            Block(width, size.decoder_heads, size.decoder_mlp_width) for _ in range(size.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=HEAD_NORM_EPS)
        self.head = Linear(width, PATCH_VALUES)

    def forward(self, latent_BVD: Tensor, visible_BV: Tensor, masked_BM: Tensor) -> Tensor:
        """Predict the masked tubelets, predicted_BMP in the parameters' dtype.

        Visible tokens stand first, masked ones after them, each with the embedding of its true position.
        """
        visible_BVE: Tensor = self.embed(latent_BVD)
        visible_BVE = visible_BVE + self.position_NE[visible_BV].to(visible_BVE.dtype)
        masked_BME = self.mask_token + self.position_NE[masked_BM].to(visible_BVE.dtype)
        tokens_BNE = run_blocks(
            self.blocks,
            torch.cat([visible_BVE, masked_BME], dim=1),
            activation_checkpointing=self.activation_checkpointing,
        )
        return self.head(self.norm(tokens_BNE[:, -masked_BM.shape[1] :]))


def _truncated_normal(width: int) -> Tensor:
    """Cut off at one standard deviation, as VideoMAE does."""
    return nn.init.trunc_normal_(torch.empty(width), std=MASK_TOKEN_STD, a=-MASK_TOKEN_STD, b=MASK_TOKEN_STD)
