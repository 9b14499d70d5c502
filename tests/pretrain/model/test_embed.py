from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from pretrain.model.embed import Embed, patchify, sinusoid_table, take, unpatchify
from pretrain.model.sizes import PATCH_VALUES, Grid


def test_unpatchify_undoes_patchify():
    frames_BCTHW = torch.randn(2, 3, 6, 32, 48)
    grid = Grid(slots=3, rows=2, cols=3)
    patches_BNP = patchify(frames_BCTHW)
    assert patches_BNP.shape == (2, grid.num_tokens, PATCH_VALUES)
    assert torch.equal(unpatchify(patches_BNP, grid), frames_BCTHW)


def test_token_number_is_slot_then_row_then_column():
    frames_BCTHW = torch.zeros(1, 3, 6, 32, 48)
    frames_BCTHW[:, :, 2:4, 16:32, 32:48] = 1  # slot 1, row 1, column 2
    filled = patchify(frames_BCTHW)[0].sum(dim=-1).nonzero().flatten().tolist()
    assert filled == [1 * 6 + 1 * 3 + 2]


def test_embedding_a_tubelet_equals_the_convolution_of_videomae():
    embed = Embed(24)
    frames_BCTHW = torch.randn(2, 3, 4, 32, 32)
    weight = embed.weight.detach().view(24, 3, 2, 16, 16)
    expected = F.conv3d(frames_BCTHW, weight, embed.bias.detach(), stride=(2, 16, 16)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(patchify(frames_BCTHW)), expected, rtol=1e-5, atol=1e-5)


def test_take_picks_per_clip():
    tokens = torch.arange(2 * 5 * 3).view(2, 5, 3)
    taken = take(tokens, torch.tensor([[4, 0], [1, 1]]))
    assert torch.equal(taken, torch.stack([tokens[0, [4, 0]], tokens[1, [1, 1]]]))


def test_table_of_positions_follows_its_formula():
    table = sinusoid_table(1568, 384)
    assert table.dtype == torch.float32
    for position, column in [(0, 0), (0, 1), (1, 0), (1567, 383), (200, 37), (1000, 4)]:
        angle = position / 10000 ** (2 * (column // 2) / 384)
        expected = math.sin(angle) if column % 2 == 0 else math.cos(angle)
        assert abs(float(table[position, column]) - expected) < 1e-6


def test_embed_starts_as_the_convolution_does():
    torch.manual_seed(0)
    weight = Embed(512).weight.detach()
    bound = 1 / math.sqrt(PATCH_VALUES)
    assert float(weight.abs().max()) <= bound * (1 + 1e-6)  # the bound itself, rounded to fp32
    assert abs(float(weight.std()) - bound / math.sqrt(3)) < 1e-4


def test_embed_takes_float32_pixels_in_bfloat16():
    embed = Embed(8).bfloat16()
    assert embed(torch.randn(1, 2, PATCH_VALUES)).dtype == torch.bfloat16
