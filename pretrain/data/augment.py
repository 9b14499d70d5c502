"""On the device: decoded planes -> what the model sees. Crop, resize, flip, colour, normalise; no randomness here.

A crop-resize-flip is two small matrices per clip, one for rows and one for columns, multiplied with Y, U and V at their
own resolutions: matrix products are what both CPUs and GPUs are best at, and 4:2:0 chroma is never enlarged first.
The filter is the triangle of PIL and torchvision with antialias (its support grows when shrinking). Colour
conversion commutes with it and is done last, on the few pixels that are left.

Legend: B clips, C channels, T frames, H W pixels of the result, I rows and J columns of a source plane, X = T H W.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.batch import COLOR_BT709, COLOR_FULL_RANGE, COLOR_RGB24, IMAGENET_MEAN, IMAGENET_STD, ClipBatch


def to_model_input(batch: ClipBatch, size: int) -> Tensor:
    """Make ImageNet-normalised clips: float32 [B, 3, T, size, size] on the device of `batch.planes_BTN`.

    Chroma samples are taken as lying in the middle of their four luma pixels. Values are clamped to [0, 255] after
    the resize and not rounded.
    """
    device = batch.planes_BTN.device
    num_clips, num_frames, _ = batch.planes_BTN.shape
    frames_BCTHW = torch.empty((num_clips, 3, num_frames, size, size), device=device)
    crop_B4, flip_B = batch.crop_B4.to(device), batch.flip_B.to(device)
    # Shapes of planes must be known on the host: sizes and colour bits never left it.
    is_rgb_B = (batch.color_B & COLOR_RGB24).bool()
    colour_B34 = _colour_matrices()[batch.color_B.long()].to(device)
    for clip in range(num_clips):
        height, width = int(batch.height_B[clip]), int(batch.width_B[clip])
        planes_TN, pixels = batch.planes_BTN[clip], height * width
        view = (crop_B4[clip], flip_B[clip], size)
        if is_rgb_B[clip]:
            rgb_TCIJ = planes_TN[:, : pixels * 3].reshape(num_frames, height, width, 3).permute(0, 3, 1, 2)
            stored_TCHW = _resize(rgb_TCIJ, *view, subsampling=1)
        else:
            luma_TCIJ = planes_TN[:, :pixels].reshape(num_frames, 1, height, width)
            chroma_TCIJ = planes_TN[:, pixels : pixels * 3 // 2].reshape(num_frames, 2, height // 2, width // 2)
            halves = _resize(luma_TCIJ, *view, subsampling=1), _resize(chroma_TCIJ, *view, subsampling=2)
            stored_TCHW = torch.cat(halves, dim=1)
        stored_CX = stored_TCHW.transpose(0, 1).reshape(3, -1)
        rgb_CX = torch.addmm(colour_B34[clip, :, 3:], colour_B34[clip, :, :3], stored_CX).clamp_(0, 255)
        frames_BCTHW[clip] = rgb_CX.view(3, num_frames, size, size)
    mean_C111 = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1, 1) * 255
    std_C111 = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1, 1) * 255
    return frames_BCTHW.sub_(mean_C111).div_(std_C111)


def _resize(planes_TCIJ: Tensor, crop_4: Tensor, flip: Tensor, size: int, *, subsampling: int) -> Tensor:
    """Crop, resize and flip planes: float32 [T, C, size, size]. The crop is given in luma pixels."""
    top, left, height, width = (crop_4 / subsampling).unbind()
    if planes_TCIJ.device.type == "cpu":
        # Convert and multiply the crop only. A GPU has time to spare, and to ask it for the crop would stall it.
        first_row, first_column = int(top), int(left)
        last_row, last_column = math.ceil(float(top + height)), math.ceil(float(left + width))
        planes_TCIJ = planes_TCIJ[:, :, first_row:last_row, first_column:last_column]
        top, left = top - first_row, left - first_column
    rows_HI = _triangle_filter(top, height, planes_TCIJ.shape[2], size)
    columns_WJ = _triangle_filter(left, width, planes_TCIJ.shape[3], size)
    columns_WJ = torch.where(flip, columns_WJ.flip(0), columns_WJ)
    return rows_HI @ (planes_TCIJ.float() @ columns_WJ.T)


def _triangle_filter(start: Tensor, length: Tensor, num_pixels: int, size: int) -> Tensor:
    """Weights [size, num_pixels] that resample [start, start + length) of a line of pixels to `size` values.

    What PIL's BILINEAR does after a crop: a triangle as wide as the step between results, at least one pixel, over
    the pixels of the crop, each row adding up to one.
    """
    step = length / size
    centre_H1 = (start + (torch.arange(size, device=start.device) + 0.5) * step)[:, None]
    left_edge_I = torch.arange(num_pixels, device=start.device)
    weight_HI = (1 - (left_edge_I + 0.5 - centre_H1).abs() / step.clamp(min=1)).clamp(min=0)
    weight_HI = weight_HI * ((left_edge_I + 1 > start) & (left_edge_I < start + length))
    return weight_HI / weight_HI.sum(dim=1, keepdim=True)


def _colour_matrices() -> Tensor:
    """Matrices [8, 3, 4] from stored values to R, G, B in [0, 255], by colour bits; the last column is an offset.

    Luma weights and ranges: ITU-R BT.601-7 and BT.709-6.
    """
    matrices = torch.zeros((8, 3, 4), dtype=torch.float64)
    for color in range(8):
        if color & COLOR_RGB24:
            matrices[color, :, :3] = torch.eye(3)
            continue
        red, blue = (0.2126, 0.0722) if color & COLOR_BT709 else (0.299, 0.114)
        green = 1 - red - blue
        luma_scale, chroma_scale, black = (1.0, 1.0, 0) if color & COLOR_FULL_RANGE else (255 / 219, 255 / 224, 16)
        from_cb = (0.0, -2 * blue * (1 - blue) / green, 2 * (1 - blue))
        from_cr = (2 * (1 - red), -2 * red * (1 - red) / green, 0.0)
        for channel in range(3):
            gains = luma_scale, chroma_scale * from_cb[channel], chroma_scale * from_cr[channel]
            offset = -black * gains[0] - 128 * (gains[1] + gains[2])
            matrices[color, channel] = torch.tensor([*gains, offset])
    return matrices.float()
