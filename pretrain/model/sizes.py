"""How large the networks are, how clips are cut into tubelets, and what a forward pass costs. No torch.

Legend: S slots (tubelets in time)  A cells (tubelets in space)  N = S * A tokens  P values of one tubelet
"""

from __future__ import annotations

from dataclasses import dataclass

from shards.errors import UserError

TUBELET = 2
"""Frames of one slot."""
PATCH = 16
"""Side of one cell in pixels."""
CHANNELS = 3
PIXELS = TUBELET * PATCH * PATCH
"""Pixels of one tubelet in one channel."""
PATCH_VALUES = CHANNELS * PIXELS
"""P: values of one tubelet, 1,536."""


@dataclass(frozen=True)
class Size:
    """Widths and depths of one encoder and of the narrow decoder that goes with it."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int

    @property
    def decoder_mlp_width(self) -> int:
        """Hidden width of the decoder's MLPs: four times its width, at every size."""
        return 4 * self.decoder_width


# small to huge: VideoMAE (arXiv 2203.12602), giant: VideoMAE V2 (arXiv 2303.16727) at patch 16. tiny and nano are ours.
SIZES: dict[str, Size] = {
    "nano": Size(128, 4, 4, 512, 64, 2, 2),
    "tiny": Size(192, 12, 3, 768, 96, 4, 3),
    "small": Size(384, 12, 6, 1536, 192, 4, 3),
    "base": Size(768, 12, 12, 3072, 384, 4, 6),
    "large": Size(1024, 24, 16, 4096, 512, 12, 8),
    "huge": Size(1280, 32, 16, 5120, 640, 12, 8),
    "giant": Size(1408, 40, 16, 6144, 512, 4, 8),
}


@dataclass(frozen=True)
class Grid:
    """The tubelet grid of a clip. Token number = slot * cells + row * cols + col."""

    slots: int
    rows: int
    cols: int

    @property
    def cells(self) -> int:
        """A: tubelets of one slot."""
        return self.rows * self.cols

    @property
    def num_tokens(self) -> int:
        """N: tubelets of one clip."""
        return self.slots * self.cells

    @classmethod
    def of(cls, frames: int, size: int) -> Grid:
        """Grid of a square clip of `frames` frames and `size` pixels a side.

        Raises UserError where tubelets of 2 x 16 x 16 do not fill the clip.
        """
        if frames < TUBELET or frames % TUBELET:
            use = max(TUBELET, frames // TUBELET * TUBELET)
            raise UserError(f"data.frames is {frames}; it must be a multiple of {TUBELET}: use {use}")
        if size < PATCH or size % PATCH:
            use = max(PATCH, round(size / PATCH) * PATCH)
            raise UserError(f"data.size is {size}; it must be a multiple of {PATCH}: use {use}")
        return cls(frames // TUBELET, size // PATCH, size // PATCH)


def blocks_flops(num_tokens: int, *, width: int, mlp_width: int, depth: int) -> int:
    """Floating-point operations (2 per multiply-add) of `depth` blocks on one clip, forward, matmuls and attention."""
    linears = num_tokens * (4 * width * width + 2 * width * mlp_width)
    attention = 2 * num_tokens * num_tokens * width
    return 2 * depth * (linears + attention)


def embed_flops(size: Size, num_visible: int) -> int:
    """Forward operations of the patch embedding of `num_visible` tokens."""
    return 2 * num_visible * PATCH_VALUES * size.width


def encoder_flops(size: Size, num_visible: int) -> int:
    """Forward operations of the encoder, embedding included, on `num_visible` tokens of one clip."""
    return embed_flops(size, num_visible) + blocks_flops(
        num_visible, width=size.width, mlp_width=size.mlp_width, depth=size.depth
    )


def decoder_flops(size: Size, num_visible: int, num_masked: int) -> int:
    """Forward operations of the decoder, head included, that predicts `num_masked` tokens of one clip."""
    embed = 2 * num_visible * size.width * size.decoder_width
    head = 2 * num_masked * size.decoder_width * PATCH_VALUES
    return (
        embed
        + head
        + blocks_flops(
            num_visible + num_masked,
            width=size.decoder_width,
            mlp_width=size.decoder_mlp_width,
            depth=size.decoder_depth,
        )
    )
