"""ClipBatch: the one type that the data side makes and the model side takes. Model and data meet only here.

Pixels travel as the decoder gave them (uint8 planes, half the bytes of RGB); crop, flip, colour and
normalisation are numbers beside them, applied on the device by `pretrain.data.augment.to_model_input`.

Legend: B clips, T frames, N bytes per frame (padded to the largest frame of the batch).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

COLOR_BT709 = 1
"""Bit of `color_B`: the YUV matrix is BT.709 (else BT.601)."""
COLOR_FULL_RANGE = 2
"""Bit of `color_B`: luma uses 0..255 (else 16..235)."""
COLOR_RGB24 = 4
"""Bit of `color_B`: frames are packed RGB, three bytes a pixel (else I420: planes Y, U, V)."""


@dataclass(frozen=True)
class ClipBatch:
    """One micro batch of one rank: pixels, how to look at them, and where they came from.

    A filler clip (weight 0, sample -1) is black: it only makes up the number, and never enters a ledger.
    """

    step: int
    micro_step: int
    planes_BTN: Tensor
    """uint8. The first height * width * 3 // 2 (I420) or * 3 (RGB) bytes of a frame are used, the rest is padding."""
    height_B: Tensor
    """int32, source pixels, even for I420."""
    width_B: Tensor
    """int32, source pixels, even for I420."""
    crop_B4: Tensor
    """float32: top, left, height, width in source pixels."""
    flip_B: Tensor
    """bool: mirror left and right after the crop."""
    color_B: Tensor
    """uint8: COLOR_ bits."""
    frame_numbers_BT: Tensor
    """int32: which frames of the source were taken."""
    position_B: Tensor
    """int64: place in the run's order; -1 filler."""
    epoch_B: Tensor
    """int64."""
    draw_B: Tensor
    """int64: which of the clips of this position."""
    wanted_B: Tensor
    """int64: the sample that the order names; -1 filler."""
    sample_B: Tensor
    """int64: the sample that was delivered; another than wanted only with a journal row that says so."""
    checksum_B: Tensor
    """int64: crc32 of the very bytes that were decoded."""
    weight_B: Tensor
    """float32: 1, or 0 for a filler."""

    @property
    def num_real(self) -> int:
        """Clips that are no fillers."""
        return int((self.sample_B >= 0).sum())

    def to(self, device: torch.device | str) -> ClipBatch:
        """Copy what is computed with to `device`. Sizes, colour bits and bookkeeping stay where the host reads them."""
        return dataclasses.replace(
            self,
            planes_BTN=self.planes_BTN.to(device, non_blocking=True),
            crop_B4=self.crop_B4.to(device, non_blocking=True),
            flip_B=self.flip_B.to(device, non_blocking=True),
            weight_B=self.weight_B.to(device, non_blocking=True),
        )
