from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pretrain.batch import COLOR_BT709, COLOR_FULL_RANGE, COLOR_RGB24, IMAGENET_MEAN, IMAGENET_STD, ClipBatch
from pretrain.data import augment
from pretrain.data.augment import to_model_input


def make_batch(
    sizes: list[tuple[int, int]], crops: list[tuple[float, ...]], flips: list[bool], colors: list[int], frames: int = 2
) -> ClipBatch:
    rng = np.random.default_rng(0)
    num_bytes = max(h * w * 3 for h, w in sizes)
    # Smooth and rough clips: filters differ on the latter, clamping on saturated colours.
    planes_BTN = rng.integers(0, 256, (len(sizes), frames, num_bytes), dtype=np.uint8)
    none_B = torch.zeros(len(sizes), dtype=torch.int64)
    return ClipBatch(
        step=0,
        micro_step=0,
        planes_BTN=torch.from_numpy(planes_BTN),
        height_B=torch.tensor([h for h, _ in sizes], dtype=torch.int32),
        width_B=torch.tensor([w for _, w in sizes], dtype=torch.int32),
        crop_B4=torch.tensor(crops, dtype=torch.float32),
        flip_B=torch.tensor(flips),
        color_B=torch.tensor(colors, dtype=torch.uint8),
        frame_numbers_BT=torch.zeros((len(sizes), frames), dtype=torch.int32),
        position_B=none_B,
        epoch_B=none_B,
        draw_B=none_B,
        wanted_B=none_B,
        sample_B=none_B,
        checksum_B=none_B,
        weight_B=torch.ones(len(sizes)),
    )


def resample(line: NDArray[np.float64], start: float, length: float, size: int) -> NDArray[np.float64]:
    """Antialiased triangle filter along axis 0, one output at a time."""
    step = length / size
    width = max(step, 1.0)
    out = np.zeros((size, *line.shape[1:]))
    for i in range(size):
        centre = start + (i + 0.5) * step
        total = 0.0
        for j in range(line.shape[0]):
            inside = j + 1 > start and j < start + length
            weight = max(0.0, 1 - abs(j + 0.5 - centre) / width) if inside else 0.0
            out[i] += weight * line[j]
            total += weight
        out[i] /= total
    return out


def reference(batch: ClipBatch, clip: int, size: int) -> NDArray[np.float64]:
    """RGB in [0, 255], float64 [T, size, size, 3], written from the definitions."""
    height, width = int(batch.height_B[clip]), int(batch.width_B[clip])
    top, left, crop_height, crop_width = batch.crop_B4[clip].tolist()
    color, frames = int(batch.color_B[clip]), []
    for row in batch.planes_BTN[clip].numpy().astype(np.float64):

        def view(plane: NDArray[np.float64], scale: int) -> NDArray[np.float64]:
            rows = resample(plane, top / scale, crop_height / scale, size)
            return resample(rows.swapaxes(0, 1), left / scale, crop_width / scale, size).swapaxes(0, 1)

        if color & COLOR_RGB24:
            rgb = view(row[: height * width * 3].reshape(height, width, 3), 1)
        else:
            pixels = height * width
            luma = view(row[:pixels].reshape(height, width), 1)
            cb = view(row[pixels : pixels * 5 // 4].reshape(height // 2, width // 2), 2) - 128
            cr = view(row[pixels * 5 // 4 : pixels * 3 // 2].reshape(height // 2, width // 2), 2) - 128
            if not color & COLOR_FULL_RANGE:
                luma, cb, cr = (luma - 16) * 255 / 219, cb * 255 / 224, cr * 255 / 224
            kr, kb = (0.2126, 0.0722) if color & COLOR_BT709 else (0.299, 0.114)
            red, blue = luma + 2 * (1 - kr) * cr, luma + 2 * (1 - kb) * cb
            rgb = np.stack([red, (luma - kr * red - kb * blue) / (1 - kr - kb), blue], axis=-1)
        frames.append(rgb[:, ::-1] if bool(batch.flip_B[clip]) else rgb)
    return np.clip(np.stack(frames), 0, 255)


def grey_levels(frames_BCTHW: torch.Tensor, clip: int) -> NDArray[np.float64]:
    normal_THWC = frames_BCTHW[clip].permute(1, 2, 3, 0).double().numpy()
    return (normal_THWC * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)) * 255


@pytest.mark.parametrize(("mean", "most", "by_matrices"), [(0.01, 0.1, True), (1.0, 4.0, False)])
def test_equals_a_float64_reference_in_every_colour_mode(
    mean: float, most: float, by_matrices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU, run here, exactly; the way of a CPU, which rounds to whole grey levels, within four."""
    if by_matrices:
        monkeypatch.setattr(augment, "_view_on_cpu", augment._view_by_matrices)
    colors = [0, COLOR_BT709, COLOR_FULL_RANGE, COLOR_BT709 | COLOR_FULL_RANGE, COLOR_RGB24, 0]
    sizes = [(48, 64), (64, 48), (40, 40), (48, 64), (48, 64), (16, 20)]
    crops = [(0, 0, 48, 48), (8, 2, 42, 36), (1, 1, 30, 26), (4, 20, 32, 42), (3, 5, 36, 42), (2, 2, 14, 12)]
    flips = [False, True, False, True, True, False]
    batch = make_batch(sizes, crops, flips, colors)
    frames_BCTHW = to_model_input(batch, 32)
    assert frames_BCTHW.shape == (6, 3, 2, 32, 32)
    assert frames_BCTHW.dtype == torch.float32
    for clip in range(6):
        difference = np.abs(grey_levels(frames_BCTHW, clip) - reference(batch, clip, 32))
        assert difference.mean() < mean
        assert difference.max() < most


def test_the_reference_notices_a_flip_and_a_matrix() -> None:
    batch = make_batch([(48, 64)], [(0, 0, 48, 48)], [False], [0])
    right = grey_levels(to_model_input(batch, 32), 0)
    for wrong in (replace(batch, flip_B=~batch.flip_B), replace(batch, color_B=batch.color_B + COLOR_BT709)):
        assert np.abs(right - reference(wrong, 0, 32)).max() > 10


@pytest.mark.parametrize(
    ("values", "color", "rgb"),
    [
        ((126.0, 90.0, 174.0), 0, (202, 106, 51)),
        ((16.0, 128.0, 128.0), 0, (0, 0, 0)),
        ((235.0, 128.0, 128.0), COLOR_BT709, (255, 255, 255)),
        ((255.0, 128.0, 128.0), COLOR_FULL_RANGE, (255, 255, 255)),
        ((0.0, 128.0, 128.0), COLOR_FULL_RANGE | COLOR_BT709, (0, 0, 0)),
    ],
)
def test_known_colours(values: tuple[float, ...], color: int, rgb: tuple[int, ...]) -> None:
    batch = make_batch([(8, 8)], [(0, 0, 8, 8)], [False], [color])
    luma, cb, cr = values
    flat = torch.tensor([luma] * 64 + [cb] * 16 + [cr] * 16, dtype=torch.uint8)
    batch.planes_BTN[0, :, :96] = flat
    assert np.abs(grey_levels(to_model_input(batch, 8), 0) - np.array(rgb)).max() < 2


def test_a_whole_crop_at_its_own_size_changes_no_rgb_value() -> None:
    batch = make_batch([(32, 32)], [(0, 0, 32, 32)], [False], [COLOR_RGB24])
    pixels = batch.planes_BTN[0].reshape(2, 32, 32, 3).double().numpy()
    assert np.abs(grey_levels(to_model_input(batch, 32), 0) - pixels).max() < 1e-3


def test_a_clip_does_not_depend_on_its_neighbours() -> None:
    sizes, crops = [(48, 64), (64, 48)], [(0.0, 0.0, 48.0, 48.0), (7.0, 3.0, 42.0, 36.0)]
    both = make_batch(sizes, crops, [False, True], [0, COLOR_RGB24])
    first = replace(
        both,
        planes_BTN=both.planes_BTN[:1],
        height_B=both.height_B[:1],
        width_B=both.width_B[:1],
        crop_B4=both.crop_B4[:1],
        flip_B=both.flip_B[:1],
        color_B=both.color_B[:1],
    )
    assert torch.allclose(to_model_input(both, 32)[:1], to_model_input(first, 32), atol=1e-5)


@pytest.mark.parametrize("size", [24, 112, 224])
@pytest.mark.parametrize("color", [0, COLOR_RGB24])
def test_a_cpu_differs_from_matrices_by_rounding_only(size: int, color: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enlarged, shrunk a little and a lot, at the borders, and at odd pixels and fractions of one."""
    sizes = [(256, 342), (90, 160), (64, 48), (300, 200)]
    crops = [(0.0, 0.0, 256.0, 256.0), (6.0, 14.0, 84.0, 62.0), (0.5, 0.25, 63.5, 47.75), (101.0, 3.0, 199.0, 197.0)]
    batch = make_batch(sizes, crops, [False, True, True, False], [color] * 4)
    rounded = to_model_input(batch, size)
    monkeypatch.setattr(augment, "_view_on_cpu", augment._view_by_matrices)
    exact = to_model_input(batch, size)
    for clip in range(4):
        difference = np.abs(grey_levels(rounded, clip) - grey_levels(exact, clip))
        assert difference.mean() < 1
        assert difference.max() < 4
    assert (rounded - exact.flip(-1)).abs().max() > 1


def test_the_result_is_near_the_reference_at_full_size() -> None:
    batch = make_batch([(180, 320)], [(2, 30, 158, 178)], [True], [COLOR_BT709], frames=1)
    difference = np.abs(grey_levels(to_model_input(batch, 224), 0) - reference(batch, 0, 224))
    assert difference.mean() < 1
    assert difference.max() < 4
