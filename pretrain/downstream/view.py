"""Decoded frames -> model input as an evaluation sees them: the middle of the video, the middle of the picture.

The same conversion as in training (`to_model_input`), with a fixed crop instead of a drawn one.

Legend: B clips, C channels, T frames, H, W pixels, N bytes of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain.batch import ClipBatch
from pretrain.data.augment import to_model_input
from pretrain.data.decode import Frames


def middle_crops(clips: Sequence[Frames], size: int, device: str | torch.device = "cpu") -> Tensor:
    """Largest square in the middle of each clip, resized: frames_BCTHW float32, ImageNet-normalised.

    All clips must have equally many frames; their sizes may differ.
    """
    return to_model_input(_as_batch(clips).to(device), size)


def _as_batch(clips: Sequence[Frames]) -> ClipBatch:
    """Clips as the batch that training would get; the bookkeeping is that of no run."""
    num_clips, num_frames = len(clips), len(clips[0].planes_TN)
    num_bytes = max(clip.planes_TN.shape[1] for clip in clips)
    planes_BTN = np.zeros((num_clips, num_frames, num_bytes), np.uint8)
    for row, clip in zip(planes_BTN, clips, strict=True):
        row[:, : clip.planes_TN.shape[1]] = clip.planes_TN
    numbers_B = torch.arange(num_clips)
    return ClipBatch(
        step=0,
        micro_step=0,
        planes_BTN=torch.as_tensor(planes_BTN),
        height_B=torch.tensor([clip.height for clip in clips], dtype=torch.int32),
        width_B=torch.tensor([clip.width for clip in clips], dtype=torch.int32),
        crop_B4=torch.tensor([_middle_square(clip) for clip in clips], dtype=torch.float32),
        flip_B=torch.zeros(num_clips, dtype=torch.bool),
        color_B=torch.tensor([clip.color for clip in clips], dtype=torch.uint8),
        frame_numbers_BT=torch.arange(num_frames, dtype=torch.int32).expand(num_clips, -1),
        position_B=numbers_B,
        epoch_B=torch.zeros_like(numbers_B),
        draw_B=torch.zeros_like(numbers_B),
        wanted_B=numbers_B,
        sample_B=numbers_B,
        checksum_B=torch.zeros_like(numbers_B),
        weight_B=torch.ones(num_clips),
    )


def _middle_square(clip: Frames) -> list[int]:
    side = min(clip.height, clip.width)
    return [(clip.height - side) // 2, (clip.width - side) // 2, side, side]
