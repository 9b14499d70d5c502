from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.model.decoder import Decoder
from pretrain.model.embed import take
from pretrain.model.sizes import PATCH_VALUES, SIZES, Grid, decoder_flops, encoder_flops
from pretrain.model.vit import Encoder
from shards.errors import UserError


def test_published_sizes():
    # VideoMAE's base, large and huge: encoder width, depth, heads; decoder width, depth, heads
    assert (SIZES["base"].width, SIZES["base"].depth, SIZES["base"].heads) == (768, 12, 12)
    assert (SIZES["base"].decoder_width, SIZES["base"].decoder_depth, SIZES["base"].decoder_heads) == (384, 4, 6)
    assert (SIZES["large"].decoder_depth, SIZES["large"].decoder_width, SIZES["large"].decoder_heads) == (12, 512, 8)
    assert (SIZES["huge"].decoder_depth, SIZES["huge"].decoder_width, SIZES["huge"].decoder_heads) == (12, 640, 8)
    assert SIZES["giant"].mlp_width == 6144


@pytest.mark.parametrize("name", SIZES)
def test_widths_divide_by_heads_and_are_even(name: str):
    size = SIZES[name]
    assert size.width % (2 * size.heads) == 0
    assert size.decoder_width % (2 * size.decoder_heads) == 0


def test_base_has_as_many_parameters_as_published():
    with torch.device("meta"):
        encoder = Encoder(SIZES["base"], 1568)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(86.2e6, rel=0.01)


def test_grid_of_the_standard_clip():
    grid = Grid.of(16, 224)
    assert (grid.slots, grid.cells, grid.num_tokens) == (8, 196, 1568)


@pytest.mark.parametrize(
    ("frames", "size", "text"),
    [
        (15, 224, "data.frames is 15; it must be a multiple of 2: use 14"),
        (0, 224, "data.frames is 0; it must be a multiple of 2: use 2"),
        (16, 100, "data.size is 100; it must be a multiple of 16: use 96"),
    ],
)
def test_clips_that_tubelets_do_not_fill_are_refused(frames: int, size: int, text: str):
    with pytest.raises(UserError, match=text):
        Grid.of(frames, size)


@sdpa_kernel(SDPBackend.MATH)  # torch's counter does not know the fused attention of CPUs
def test_counted_operations_equal_torchs_count():
    size, grid = SIZES["tiny"], Grid.of(16, 96)
    visible_BV = torch.arange(0, grid.num_tokens, 9)[None]
    masked_BM = torch.tensor([[n for n in range(grid.num_tokens) if n % 9]])
    encoder, decoder = Encoder(size, grid.num_tokens), Decoder(size, grid.num_tokens)
    patches_BNP = torch.randn(1, grid.num_tokens, PATCH_VALUES)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        latent_BVD = encoder(take(patches_BNP, visible_BV), visible_BV)
    assert encoder_flops(size, visible_BV.shape[1]) == pytest.approx(counter.get_total_flops(), rel=0.02)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(latent_BVD, visible_BV, masked_BM)
    counted = decoder_flops(size, visible_BV.shape[1], masked_BM.shape[1])
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)
