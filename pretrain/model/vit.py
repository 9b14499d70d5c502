"""The encoder: a plain vision Transformer over the tubelets that are seen.

VideoMAE (arXiv 2203.12602), the layout that transformers' `VideoMAEModel` loads. Pre-norm blocks; queries and values
have a bias, keys none; no class token; no dropout; GELU exact.

Legend: B clips  V visible tokens  N tokens of a clip  D width  H heads  E = D / H  P values of one tubelet
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    checkpoint,  # pyright: ignore[reportUnknownVariableType]  # torch leaves the function's type open
)

from pretrain.model.embed import Embed, Linear, sinusoid_table
from pretrain.model.sizes import Size

NORM_EPS = 1e-12
"""eps of every norm in the blocks and of the encoder's last one: transformers' default for VideoMAE."""


class Attention(nn.Module):
    """Self-attention over all tokens of a clip, [B, V, D] -> [B, V, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False)
        # Outside of `qkv`: softmax makes a bias of the keys void, and an export has no place for it.
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def forward(self, tokens_BVD: Tensor) -> Tensor:
        """Mix the tokens of each clip."""
        query_BVD, key_BVD, value_BVD = self.qkv(tokens_BVD).chunk(3, dim=-1)
        # The casts do nothing unless autocast made `qkv` bf16 while the biases stayed fp32.
        query_BVD = query_BVD + self.q_bias.to(query_BVD.dtype)
        value_BVD = value_BVD + self.v_bias.to(value_BVD.dtype)
        mixed_BHVE = F.scaled_dot_product_attention(
            self._split(query_BVD), self._split(key_BVD), self._split(value_BVD)
        )
        return self.proj(rearrange(mixed_BHVE, "b h v e -> b v (h e)"))

    def _split(self, tokens_BVD: Tensor) -> Tensor:
        return rearrange(tokens_BVD, "b v (h e) -> b h v e", h=self.heads)


class Mlp(nn.Module):
    """Two linear layers with GELU between them, token by token."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, mlp_width)
        self.fc2 = Linear(mlp_width, width)

    def forward(self, tokens_BVD: Tensor) -> Tensor:
        """[B, V, D] -> [B, V, D]."""
        return self.fc2(F.gelu(self.fc1(tokens_BVD)))


class Block(nn.Module):
    """Norm, attention, norm, MLP, each pair with a residual."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, tokens_BVD: Tensor) -> Tensor:
        """[B, V, D] -> [B, V, D]."""
        tokens_BVD = tokens_BVD + self.attention(self.norm1(tokens_BVD))
        return tokens_BVD + self.mlp(self.norm2(tokens_BVD))


def run_blocks(blocks: Iterable[nn.Module], tokens_BVD: Tensor, *, activation_checkpointing: bool) -> Tensor:
    """Send tokens through the blocks. With checkpointing, only block inputs are kept and the rest is computed twice."""
    for block in blocks:
        if activation_checkpointing and torch.is_grad_enabled():
            # Blocks draw no random numbers, so there is no generator state to put back.
            tokens_BVD = cast(Any, checkpoint)(block, tokens_BVD, use_reentrant=False, preserve_rng_state=False)
        else:
            tokens_BVD = block(tokens_BVD)
    return tokens_BVD


class Encoder(nn.Module):
    """Tubelets that are seen -> features. Hidden tubelets cost nothing: they are never embedded."""

    position_ND: Tensor

    def __init__(self, size: Size, num_tokens: int, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.embed = Embed(size.width)
        self.register_buffer("position_ND", sinusoid_table(num_tokens, size.width), persistent=False)
        self.blocks = nn.ModuleList(Block(size.width, size.heads, size.mlp_width) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)

    def forward(self, patches_BVP: Tensor, visible_BV: Tensor) -> Tensor:
        """Features of V tubelets, latent_BVD in the parameters' dtype.

        `visible_BV` (int64) says at which token of the clip each tubelet stands: it chooses the position embedding,
        nothing else.
        """
        tokens_BVD: Tensor = self.embed(patches_BVP)
        tokens_BVD = tokens_BVD + self.position_ND[visible_BV].to(tokens_BVD.dtype)
        tokens_BVD = run_blocks(self.blocks, tokens_BVD, activation_checkpointing=self.activation_checkpointing)
        return self.norm(tokens_BVD)
