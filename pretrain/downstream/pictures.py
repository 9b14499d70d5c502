"""Pixels of a reconstruction -> pictures: filled-in frames, and a grid of them as PNG. Tensors in, files out.

Legend: B clips, C=3 channels, T frames, H, W pixels, N tokens, M masked tokens, P values of a tubelet,
X = 2 * 16 * 16 pixels of a tubelet in one channel.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from pretrain.model.decoder import Decoder
from pretrain.model.embed import patchify, take, unpatchify
from pretrain.model.sizes import TUBELET, Grid
from pretrain.model.vit import Encoder
from pretrain.objective.targets import pixels_of, unnormalise

MASK_GREY = 0.5
GAP = 4
LINE_HEIGHT = 14
LABEL_WIDTH = 74
MIN_SIDE = 96
"""Smaller frames are enlarged to at least this, by whole factors, pixel by pixel."""
ROW_LABELS = ("original", "masked", "filled in")


@dataclass(frozen=True)
class Reconstruction:
    """Three views of the same clips, RGB in 0..1, float32 [B, C, T, H, W]."""

    original: Tensor
    masked: Tensor
    """Hidden tubelets grey."""
    filled: Tensor
    """Hidden tubelets as predicted, visible ones as they are."""


@torch.no_grad()
def fill_in(
    encoder: Encoder, decoder: Decoder, frames_BCTHW: Tensor, visible_BV: Tensor, masked_BM: Tensor
) -> Reconstruction:
    """Encode what is visible, predict what is not, and put both together as pictures.

    What training shows at an evaluation: `write_pictures(fill_in(model.encoder, objective.decoder, frames_BCTHW,
    plan["visible_BV"], plan["masked_BM"]), folder)`. `frames_BCTHW` is model input; positions are int64, sorted.
    """
    latent_BVD = encoder(take(patchify(frames_BCTHW), visible_BV), visible_BV)
    return rebuild(frames_BCTHW, decoder(latent_BVD, visible_BV, masked_BM), masked_BM)


def rebuild(frames_BCTHW: Tensor, predicted_BMP: Tensor, masked_BM: Tensor) -> Reconstruction:
    """Put predicted tubelets back among the visible ones.

    The model predicts tubelets normalised by their own mean and deviation, so it says nothing about either: both are
    taken from the original tubelet (per channel), as the visualisation of VideoMAE does. What is shown is therefore
    structure and texture, not absolute brightness or contrast.

    Args:
        frames_BCTHW: Model input, float32, ImageNet-normalised.
        predicted_BMP: Output of the decoder: normalised tubelets, P ordered (time, row, column, channel).
        masked_BM: int64 positions of the hidden tubelets, sorted.
    """
    grid = Grid.of(frames_BCTHW.shape[2], frames_BCTHW.shape[-1])
    patches_BNP = patchify(frames_BCTHW.float())
    original_BNP = unnormalise(patches_BNP).flatten(2).clamp(0, 1)
    guess_BMP = pixels_of(predicted_BMP, take(patches_BNP, masked_BM)).clamp(0, 1)
    index_BMP = masked_BM.unsqueeze(-1).expand_as(guess_BMP)
    return Reconstruction(
        original=unpatchify(original_BNP, grid),
        masked=unpatchify(original_BNP.scatter(1, index_BMP, MASK_GREY), grid),
        filled=unpatchify(original_BNP.scatter(1, index_BMP, guess_BMP), grid),
    )


def write_pictures(
    pictures: Reconstruction,
    folder: Path,
    *,
    name: str = "reconstruction",
    captions: Sequence[str] = (),
    columns: int = 8,
) -> list[Path]:
    """Write one PNG per clip: rows original, masked, filled-in; columns are the first frames of evenly spaced slots.

    Args:
        pictures: Of `rebuild`, on any device.
        folder: Created if it is not there. Files are named `NAME-0.png`, `NAME-1.png`, … and replaced atomically.
        name: Start of the file names.
        captions: One line per clip, drawn under it (for example step and loss).
        columns: At most so many time slots.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for clip in range(pictures.original.shape[0]):
        path = folder / f"{name}-{clip}.png"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        grid_of(pictures, clip, captions[clip] if clip < len(captions) else "", columns).save(temporary, format="PNG")
        temporary.replace(path)
        written.append(path)
    return written


def grid_of(pictures: Reconstruction, clip: int, caption: str = "", columns: int = 8) -> Image.Image:
    """One clip as a picture: rows original, masked, filled-in; columns are time."""
    views = (pictures.original, pictures.masked, pictures.filled)
    num_slots = views[0].shape[2] // TUBELET
    slots = torch.linspace(0, num_slots - 1, min(columns, num_slots)).round().long()
    factor = max(1, -(-MIN_SIDE // views[0].shape[-1]))
    height, width = (side * factor for side in views[0].shape[-2:])
    sheet = Image.new(
        "RGB",
        (LABEL_WIDTH + len(slots) * (width + GAP), len(views) * (height + GAP) + (LINE_HEIGHT if caption else 0)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for row, (label, view_BCTHW) in enumerate(zip(ROW_LABELS, views, strict=True)):
        top = row * (height + GAP)
        draw.text((GAP, top + height // 2 - LINE_HEIGHT // 2), label, fill="black")
        for column, frame_HW3 in enumerate(to_bytes(view_BCTHW[clip, :, slots * TUBELET])):
            frame = Image.fromarray(frame_HW3).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(frame, (LABEL_WIDTH + column * (width + GAP), top))
    if caption:
        draw.text((GAP, len(views) * (height + GAP)), caption, fill="black")
    return sheet


def to_bytes(frames_CTHW: Tensor) -> NDArray[np.uint8]:
    """RGB in 0..1, [C, T, H, W] -> uint8 [T, H, W, C] on the CPU."""
    return (frames_CTHW * 255).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()
