"""What is to be predicted, and the way back from a prediction to pixels. All in fp32, all without a graph.

Legend: B clips  M masked tokens  V visible tokens  C channels  I pixels of one tubelet in one channel (512)
P = C * I values of one tubelet, in two orders: patches are (channel, pixel), targets and predictions (pixel, channel)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from pretrain.batch import IMAGENET_MEAN, IMAGENET_STD
from pretrain.model.sizes import CHANNELS, Grid

STD_EPS = 1e-6
"""Added to the deviation, not to the variance, as VideoMAE does."""


@torch.no_grad()
def unnormalise(patches_BMP: Tensor) -> Tensor:
    """Model input [..., P] -> values in [0, 1], fp32 [..., C, I]: undoes the ImageNet mean and deviation."""
    mean_C1, std_C1 = _imagenet(patches_BMP.device)
    return rearrange(patches_BMP.float(), "... (c i) -> ... c i", c=CHANNELS) * std_C1 + mean_C1


@torch.no_grad()
def normalised_pixels(patches_BMP: Tensor) -> Tensor:
    """VideoMAE's target: values in [0, 1] with mean 0 and deviation 1 within each tubelet and channel.

    (x - mean) / (sqrt(unbiased variance) + 1e-6) over the 512 pixels of a channel; fp32 [B, M, P], P ordered (time,
    row, column, channel). Flat tubelets become 0. As MCG-NJU/VideoMAE engine_for_pretraining.py and transformers'
    `norm_pix_loss`.
    """
    pixels_BMCI = unnormalise(patches_BMP)
    mean_BMC1 = pixels_BMCI.mean(dim=-1, keepdim=True)
    deviation_BMC1 = pixels_BMCI.var(dim=-1, unbiased=True, keepdim=True).sqrt()
    return rearrange((pixels_BMCI - mean_BMC1) / (deviation_BMC1 + STD_EPS), "b m c i -> b m (i c)")


@torch.no_grad()
def pixels_of(predicted_BMP: Tensor, patches_BMP: Tensor) -> Tensor:
    """A prediction as values in [0, 1] (not clamped): fp32 [B, M, P], in the order that `unpatchify` takes.

    Mean and deviation of each tubelet, which the model does not predict, are taken from the true `patches_BMP`.
    """
    pixels_BMCI = unnormalise(patches_BMP)
    mean_BMC1 = pixels_BMCI.mean(dim=-1, keepdim=True)
    deviation_BMC1 = pixels_BMCI.var(dim=-1, unbiased=True, keepdim=True).sqrt()
    predicted_BMCI = rearrange(predicted_BMP.float(), "b m (i c) -> b m c i", c=CHANNELS)
    return (predicted_BMCI * (deviation_BMC1 + STD_EPS) + mean_BMC1).flatten(2)


@torch.no_grad()
def nearest_visible(masked_BM: Tensor, visible_BV: Tensor, grid: Grid) -> Tensor:
    """Which of the V visible tokens of its clip is nearest to each masked token: int64 [B, M], values below V.

    Euclidean distance in tubelets over (slot, row, column); of several the first.
    """
    distance_BMV = torch.cdist(
        _places(masked_BM, grid), _places(visible_BV, grid), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return distance_BMV.argmin(dim=-1)


def _places(tokens_BK: Tensor, grid: Grid) -> Tensor:
    cell_BK = tokens_BK % grid.cells
    return torch.stack([tokens_BK // grid.cells, cell_BK // grid.cols, cell_BK % grid.cols], dim=-1).float()


@lru_cache(maxsize=8)
def _imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation as fp32 [C, 1], once per device. No buffers: a module cast to bf16 would round those."""
    with torch.inference_mode(False):
        mean_C = torch.tensor(IMAGENET_MEAN, dtype=torch.float32, device=device)
        std_C = torch.tensor(IMAGENET_STD, dtype=torch.float32, device=device)
        return mean_C[:, None], std_C[:, None]
