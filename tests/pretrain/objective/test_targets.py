from __future__ import annotations

import pytest
import torch

from pretrain.batch import IMAGENET_MEAN, IMAGENET_STD
from pretrain.model.embed import patchify, unpatchify
from pretrain.model.sizes import Grid
from pretrain.objective.targets import nearest_visible, normalised_pixels, pixels_of, unnormalise

MEAN_C111 = torch.tensor(IMAGENET_MEAN).view(3, 1, 1, 1)
STD_C111 = torch.tensor(IMAGENET_STD).view(3, 1, 1, 1)


def clips(num_clips: int = 2) -> torch.Tensor:
    return torch.rand(num_clips, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))


def test_unnormalise_gives_the_pixels_back():
    pixels_BCTHW = clips()
    patches_BNP = patchify((pixels_BCTHW - MEAN_C111) / STD_C111)
    back = unpatchify(unnormalise(patches_BNP).flatten(2), Grid(2, 2, 2))
    torch.testing.assert_close(back, pixels_BCTHW, rtol=0, atol=1e-6)


def test_target_is_normalised_per_tubelet_and_channel_with_unbiased_variance():
    pixels_BCTHW = clips()
    target_BNP = normalised_pixels(patchify((pixels_BCTHW - MEAN_C111) / STD_C111))
    # token 5 = slot 1, row 0, column 1, by hand
    cut = pixels_BCTHW[1, :, 2:4, 0:16, 16:32].reshape(3, 512)
    expected = (cut - cut.mean(1, keepdim=True)) / (cut.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(target_BNP[1, 5], expected.T.reshape(-1), rtol=1e-4, atol=1e-5)


def test_flat_tubelets_become_zero():
    target = normalised_pixels(torch.full((1, 3, 1536), 0.25))
    assert float(target.abs().max()) < 0.2  # rounding over 1e-6, and no division by zero


def test_target_is_float32_without_a_graph_even_under_autocast():
    patches = torch.randn(1, 2, 1536, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        target = normalised_pixels(patches)
    assert target.dtype == torch.float32
    assert not target.requires_grad
    assert torch.equal(target, normalised_pixels(patches))


def test_a_perfect_prediction_gives_the_pixels_back():
    pixels_BCTHW = clips()
    patches_BNP = patchify((pixels_BCTHW - MEAN_C111) / STD_C111)
    back = unpatchify(pixels_of(normalised_pixels(patches_BNP), patches_BNP), Grid(2, 2, 2))
    torch.testing.assert_close(back, pixels_BCTHW, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("masked", "expected"),
    [
        (0, 0),  # beside 1 in space
        (8, 1),  # slot 2, cell 0: visible 1 is 2 slots and 1 cell off, 11 is 1 row and 1 column off
        (2, 0),  # slot 0, cell 2
        (7, 1),
    ],
)
def test_nearest_in_space_and_time(masked: int, expected: int):
    # 3 slots of 2 x 2 cells; visible are token 1 (slot 0, row 0, column 1) and token 11 (slot 2, row 1, column 1)
    found = nearest_visible(torch.tensor([[masked]]), torch.tensor([[1, 11]]), Grid(3, 2, 2))
    assert found.tolist() == [[expected]]
