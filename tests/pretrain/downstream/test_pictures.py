"""Filled-in pictures: what is shown where, and the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.batch import IMAGENET_MEAN, IMAGENET_STD
from pretrain.downstream.pictures import MASK_GREY, Reconstruction, grid_of, rebuild, to_bytes, write_pictures
from pretrain.model.embed import patchify, take
from pretrain.objective.targets import normalised_pixels

MASKED_BM = torch.tensor([[0, 5, 6, 7]])  # of 8 tokens: 4 frames of 32 x 32


def clip() -> tuple[torch.Tensor, torch.Tensor]:
    """Model input and the same clip as RGB in 0..1."""
    rgb = torch.rand(1, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (rgb - mean) / std, rgb


def test_perfect_prediction_gives_the_original() -> None:
    frames_BCTHW, rgb = clip()
    target_BMP = normalised_pixels(take(patchify(frames_BCTHW), MASKED_BM))
    pictures = rebuild(frames_BCTHW, target_BMP, MASKED_BM)
    torch.testing.assert_close(pictures.original, rgb, atol=1e-5, rtol=0)
    torch.testing.assert_close(pictures.filled, rgb, atol=1e-4, rtol=0)


def test_visible_tubelets_are_shown_as_they_are_and_hidden_ones_are_grey() -> None:
    frames_BCTHW, rgb = clip()
    noise_BMP = torch.randn(1, 4, 1536, generator=torch.Generator().manual_seed(1))
    pictures = rebuild(frames_BCTHW, noise_BMP, MASKED_BM)
    visible_BV = torch.tensor([[1, 2, 3, 4]])
    for view in (pictures.masked, pictures.filled):
        torch.testing.assert_close(take(patchify(view), visible_BV), take(patchify(rgb), visible_BV), atol=1e-5, rtol=0)
    assert (take(patchify(pictures.masked), MASKED_BM) == MASK_GREY).all()
    hidden_BMP = take(patchify(pictures.filled), MASKED_BM)
    assert hidden_BMP.min() >= 0
    assert hidden_BMP.max() <= 1
    assert (hidden_BMP - take(patchify(rgb), MASKED_BM)).abs().mean() > 0.1


def test_predicting_zero_draws_the_mean_of_each_tubelet() -> None:
    frames_BCTHW, rgb = clip()
    pictures = rebuild(frames_BCTHW, torch.zeros(1, 4, 1536), MASKED_BM)
    shown = take(patchify(pictures.filled), MASKED_BM).unflatten(-1, (3, 512))
    expected = take(patchify(rgb), MASKED_BM).unflatten(-1, (3, 512)).mean(-1, keepdim=True).expand_as(shown)
    torch.testing.assert_close(shown, expected, atol=1e-5, rtol=0)


def test_grid_has_three_rows_of_time() -> None:
    views = [torch.full((1, 3, 8, 32, 32), value) for value in (0.0, 0.5, 1.0)]
    for frame in range(8):
        views[0][:, :, frame] = frame / 10
    sheet = np.asarray(grid_of(Reconstruction(*views), 0, "step 3", columns=4))
    left, step = 74, 3 * 32 + 4  # frames of 32 pixels are drawn three times as large
    assert [int(sheet[10, left + step * column + 5, 0]) for column in range(4)] == [0, 51, 102, 153]  # 0, 2, 4, 6
    assert int(sheet[step + 10, left + 5, 0]) == 128
    assert int(sheet[2 * step + 10, left + 5, 0]) == 255
    assert sheet[3 * step :].min() < 128  # the caption


def test_files_are_written_whole_one_per_clip(tmp_path: Path) -> None:
    frames_BCTHW, _ = clip()
    pictures = rebuild(frames_BCTHW.expand(2, -1, -1, -1, -1), torch.zeros(2, 4, 1536), MASKED_BM.expand(2, -1))
    for _ in range(2):
        written = write_pictures(pictures, tmp_path / "pictures", name="step-000020", captions=["first", "second"])
        assert [path.name for path in written] == ["step-000020-0.png", "step-000020-1.png"]
        assert sorted(tmp_path.glob("pictures/*")) == written
    with Image.open(written[0]) as image:
        assert image.size == (74 + 2 * 100, 3 * 100 + 14)


def test_bytes_are_rounded() -> None:
    frames_CTHW = torch.tensor([0.0, 0.5, 1.0, 0.1]).view(1, 1, 2, 2).expand(3, -1, -1, -1)
    assert to_bytes(frames_CTHW)[0, :, :, 0].tolist() == [[0, 128], [255, 26]]


def test_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    frames_BCTHW, _ = clip()
    with pytest.raises(OSError, match="file"):
        write_pictures(rebuild(frames_BCTHW, torch.zeros(1, 4, 1536), MASKED_BM), tmp_path / "file" / "pictures")
