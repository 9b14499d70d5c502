"""Masked frames: fill in the tubes and the whole frames that the encoder does not see.

VideoMAE's tube masks (arXiv 2203.12602), and beside them time slots hidden as a whole, which cannot be filled in from
their neighbours in space.

Legend: B clips  N tokens  V visible  M masked  P values of one tubelet  D width
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pretrain.geometry import allowed_counts, visible_cells
from pretrain.model.decoder import Decoder
from pretrain.model.embed import take
from pretrain.model.mask import num_tube_and_frame_uniforms, tube_and_frame_mask
from pretrain.model.sizes import Grid, Size, decoder_flops, encoder_flops
from pretrain.model.vit import Encoder
from pretrain.objective.loss import ClipKeys, Loss, Objective, Part
from pretrain.objective.targets import nearest_visible, normalised_pixels
from pretrain.sections import MaskedFrameConfig


class MaskedFrame(Objective):
    """Mean squared error of the normalised pixels of all masked tubelets of a clip.

    Parts, as means over tokens: `tube` (tubelets whose slot shows others), `frame` (of slots hidden as a whole); with
    baselines `zero` (predicting 0, their mean) and `copy` (copying the nearest visible tubelet), on the same tubelets.
    """

    def __init__(
        self, config: MaskedFrameConfig, size: Size, grid: Grid, *, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.weight = config.weight
        self.mask_ratio = config.mask_ratio
        self.allowed = allowed_counts(grid.slots, grid.cells, config.mask_ratio, config.num_frames_masked)
        self.size, self.grid = size, grid
        self.num_encoded = grid.slots * visible_cells(grid.cells, config.mask_ratio)
        self.decoder = Decoder(size, grid.num_tokens, activation_checkpointing=activation_checkpointing)

    def plan(self, keys: ClipKeys) -> dict[str, Tensor]:
        """visible_BV, masked_BM, and whole_BM (1 where a masked token's slot is hidden as a whole)."""
        masks = [
            tube_and_frame_mask(
                key.uniform("masked_frame.mask", num_tube_and_frame_uniforms(self.grid.cells)),
                slots=self.grid.slots,
                cells=self.grid.cells,
                mask_ratio=self.mask_ratio,
                allowed=self.allowed,
            )
            for key in keys
        ]
        return {
            "visible_BV": torch.as_tensor(np.stack([mask.visible_V for mask in masks])),
            "masked_BM": torch.as_tensor(np.stack([mask.masked_M for mask in masks])),
            "whole_BM": torch.as_tensor(np.stack([mask.whole_M for mask in masks])),
        }

    def forward(
        self, encoder: Encoder, patches_BNP: Tensor, plan: Mapping[str, Tensor], *, baselines: bool = False
    ) -> Loss:
        """Encode what is visible, predict what is not, compare."""
        visible_BV, masked_BM = plan["visible_BV"], plan["masked_BM"]
        latent_BVD = encoder(take(patches_BNP, visible_BV), visible_BV)
        predicted_BMP: Tensor = self.decoder(latent_BVD, visible_BV, masked_BM)
        target_BMP = normalised_pixels(take(patches_BNP, masked_BM))
        error_BM = (predicted_BMP.float() - target_BMP).square().mean(dim=-1)
        parts = _parts(error_BM.detach(), plan["whole_BM"])
        if baselines:
            parts |= self._baselines(patches_BNP, target_BMP, visible_BV, masked_BM)
        return Loss(error_BM.mean(dim=-1), parts)

    def flops(self) -> int:
        """One encoder pass over the visible tubelets, the decoder over all."""
        num_masked = self.grid.num_tokens - self.num_encoded
        return encoder_flops(self.size, self.num_encoded) + decoder_flops(self.size, self.num_encoded, num_masked)

    @torch.no_grad()
    def _baselines(
        self, patches_BNP: Tensor, target_BMP: Tensor, visible_BV: Tensor, masked_BM: Tensor
    ) -> dict[str, Part]:
        shown_BVP = normalised_pixels(take(patches_BNP, visible_BV))
        copied_BMP = take(shown_BVP, nearest_visible(masked_BM, visible_BV, self.grid))
        zero_BM = target_BMP.square().mean(dim=-1)
        copy_BM = (copied_BMP - target_BMP).square().mean(dim=-1)
        everything_BM = torch.ones_like(zero_BM)
        return {"zero": _mean_part(zero_BM, everything_BM), "copy": _mean_part(copy_BM, everything_BM)}


def _parts(error_BM: Tensor, whole_BM: Tensor) -> dict[str, Part]:
    whole_BM = whole_BM.to(error_BM.dtype)
    return {"tube": _mean_part(error_BM, 1 - whole_BM), "frame": _mean_part(error_BM, whole_BM)}


def _mean_part(value_BM: Tensor, counted_BM: Tensor) -> Part:
    return Part((value_BM * counted_BM).sum(dim=-1), counted_BM.sum(dim=-1))
