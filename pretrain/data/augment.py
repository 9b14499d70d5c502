"""On the device: decoded planes -> what the model sees. Crop, resize, flip, colour, normalise; no randomness here.

The filter is the triangle of PIL and torchvision with antialias (its support grows when shrinking). Y, U and V are
resized at their own resolutions, so 4:2:0 chroma is never enlarged first. Colour conversion commutes with that and is
done last, on the few pixels that are left, in one product with the normalisation.

On a GPU crop, resize and flip are two small matrices per clip, one for columns and one for rows: matrix products are
what it is best at, and to ask it for the crop would stall it. On a CPU torch's own uint8 resize is several times
faster; it rounds to whole grey levels, which is all that the two differ by (0.3 in the mean).

Legend: B clips, C channels, T frames, H W pixels of the result, G planes of one resolution, I rows and J columns of a
source plane, X = T H W.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.batch import COLOR_BT709, COLOR_FULL_RANGE, COLOR_RGB24, IMAGENET_MEAN, IMAGENET_STD, ClipBatch


def to_model_input(batch: ClipBatch, size: int) -> Tensor:
    """Make ImageNet-normalised clips: float32 [B, 3, T, size, size] on the device of `batch.planes_BTN`.

    Chroma samples are taken as lying in the middle of their four luma pixels. Values are clamped to [0, 255].
    """
    device = batch.planes_BTN.device
    num_clips, num_frames, _ = batch.planes_BTN.shape
    frames_BCTHW = torch.empty((num_clips, 3, num_frames, size, size), device=device)
    view = _view_on_cpu if device.type == "cpu" else _view_by_matrices
    crop_B4, flip_B = batch.crop_B4.to(device), batch.flip_B.to(device)
    # Shapes of planes must be known on the host: sizes and colour bits never left it.
    matrix_B34 = _colour_matrices()[batch.color_B.long()].to(device, non_blocking=True)
    for clip in range(num_clips):
        height, width = int(batch.height_B[clip]), int(batch.width_B[clip])
        is_rgb = bool(int(batch.color_B[clip]) & COLOR_RGB24)
        groups = _planes(batch.planes_BTN[clip], height, width, is_rgb=is_rgb)
        view(groups, crop_B4[clip], flip_B[clip], matrix_B34[clip], frames_BCTHW[clip])
    return frames_BCTHW


def _planes(planes_TN: Tensor, height: int, width: int, *, is_rgb: bool) -> list[tuple[Tensor, int]]:
    """The planes of a clip [T, G, I, J], grouped by resolution, with how many luma pixels a pixel of theirs spans."""
    num_frames, pixels = len(planes_TN), height * width
    if is_rgb:
        return [(planes_TN[:, : pixels * 3].view(num_frames, height, width, 3).permute(0, 3, 1, 2), 1)]
    luma_TGIJ = planes_TN[:, :pixels].view(num_frames, 1, height, width)
    chroma_TGIJ = planes_TN[:, pixels : pixels * 3 // 2].view(num_frames, 2, height // 2, width // 2)
    return [(luma_TGIJ, 1), (chroma_TGIJ, 2)]


def _view_by_matrices(
    groups: list[tuple[Tensor, int]], crop_4: Tensor, flip: Tensor, matrix_34: Tensor, frames_CTHW: Tensor
) -> None:
    """Fill the clip without asking the device for anything."""
    size = frames_CTHW.shape[-1]
    resized: list[Tensor] = []
    for planes_TGIJ, subsampling in groups:
        top, left, height, width = (crop_4 / subsampling).unbind()
        rows_HI = _triangle_filter(top, height, planes_TGIJ.shape[2], size)
        columns_WJ = _triangle_filter(left, width, planes_TGIJ.shape[3], size)
        columns_WJ = torch.where(flip, columns_WJ.flip(0), columns_WJ)
        resized.append(rows_HI @ (planes_TGIJ.float() @ columns_WJ.T))
    stored_CX = torch.cat(resized, dim=1).transpose(0, 1).reshape(3, -1)
    normal_CX = torch.addmm(matrix_34[:, 3:], matrix_34[:, :3], stored_CX)
    for channel, (darkest, brightest) in enumerate(_bounds()):
        torch.clamp(normal_CX[channel].view_as(frames_CTHW[0]), darkest, brightest, out=frames_CTHW[channel])


def _view_on_cpu(
    groups: list[tuple[Tensor, int]], crop_4: Tensor, flip: Tensor, matrix_34: Tensor, frames_CTHW: Tensor
) -> None:
    """Fill the clip with torch's uint8 resize, which needs crops that are whole pixels of every plane."""
    if any(float(edge) % subsampling for edge in crop_4 for _, subsampling in groups):
        _view_by_matrices(groups, crop_4, flip, matrix_34, frames_CTHW)
        return
    stored_CTHW = torch.empty(frames_CTHW.shape)
    channel = 0
    for planes_TGIJ, subsampling in groups:
        top, left, height, width = (int(edge) // subsampling for edge in crop_4)
        cropped_TGIJ = planes_TGIJ[:, :, top : top + height, left : left + width]
        resized_TGHW = _resize_uint8(cropped_TGIJ, frames_CTHW.shape[-1])
        num_planes = planes_TGIJ.shape[1]
        oriented_TGHW = resized_TGHW.flip(3) if bool(flip) else resized_TGHW
        stored_CTHW[channel : channel + num_planes] = oriented_TGHW.transpose(0, 1)
        channel += num_planes
    normal_CX = frames_CTHW.view(3, -1)
    torch.addmm(matrix_34[:, 3:], matrix_34[:, :3], stored_CTHW.view(3, -1), out=normal_CX)
    for channel, (darkest, brightest) in enumerate(_bounds()):
        normal_CX[channel].clamp_(darkest, brightest)


def _resize_uint8(planes_TGIJ: Tensor, size: int) -> Tensor:
    """Resize planes to [T, G, size, size]. torch works on up to four channels at a time: four planes pass for those."""
    num_frames, num_planes, height, width = planes_TGIJ.shape
    num_together = math.gcd(num_frames * num_planes, 4)
    packed = planes_TGIJ.reshape(-1, num_together, height, width)
    resized = functional.interpolate(packed, (size, size), mode="bilinear", antialias=True)
    return resized.view(num_frames, num_planes, size, size)


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


def _bounds() -> list[tuple[float, float]]:
    """What black and white become in each channel."""
    return [(-mean / std, (1 - mean) / std) for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]


@functools.cache
def _colour_matrices() -> Tensor:
    """Matrices [8, 3, 4] from stored values to normalised R, G, B, by colour bits; the last column is an offset.

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
    std_31 = torch.tensor(IMAGENET_STD, dtype=torch.float64)[:, None] * 255
    matrices[:, :, 3] -= torch.tensor(IMAGENET_MEAN, dtype=torch.float64) * 255
    return (matrices / std_31).float()
