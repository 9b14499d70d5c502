"""A video as the network fills it in: original | masked | filled in, side by side as mp4.

    video -> windows of T frames, one after the other -> tube mask -> encoder, decoder -> pixels -> mp4

Legend: B clips, C channels, T frames, H, W pixels, A cells of a slot, V visible, M masked tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.data.clip import pick_frames
from pretrain.downstream.clips import Sample, open_samples
from pretrain.downstream.encode import write_mp4
from pretrain.downstream.pictures import Reconstruction, fill_in, to_bytes
from pretrain.downstream.view import middle_crops
from pretrain.geometry import visible_cells
from pretrain.load import Export, load_export
from pretrain.model.mask import tube_mask
from shards.errors import UserError
from shards.pack import PackProgress

MASK_RATIO = 0.9
"""Where the export does not say at which ratio it was trained."""
MAX_WINDOWS = 32
GAP = 8


@dataclass(frozen=True)
class ReconstructReport:
    """What was made."""

    out: Path
    num_windows: int
    num_frames: int
    stride: int
    mask_ratio: float
    rate: float
    """Frames per second of the output: that of the video over the stride, so that time runs as it did."""

    def to_json(self) -> dict[str, Any]:
        """Plain types only."""
        return {**self.__dict__, "out": str(self.out)}

    def lines(self) -> list[str]:
        """For a terminal."""
        return [
            f"{self.out}: original | masked ({self.mask_ratio:.0%} hidden) | filled in, {self.num_frames} frames "
            f"at {self.rate:.3g}/s, {self.num_windows} windows of every {self.stride}. frame",
            "hidden tubelets are drawn with their true mean and contrast: the network predicts neither",
        ]


def reconstruct(
    export: str | Path,
    video: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    mask_ratio: float | None = None,
    max_windows: int = MAX_WINDOWS,
    device: str = "cpu",
    progress: Callable[[PackProgress], None] | None = None,
) -> ReconstructReport:
    """Write original, masked and filled-in frames of a video side by side.

    The video is cut into windows of as many frames as the network takes, at the stride of training, one after the
    other; each has a tube mask of its own. What is left over at the end, and after `max_windows`, is not shown. In
    the filled-in picture visible tubelets are shown as they are. Predictions are normalised per tubelet and channel,
    so they are drawn with the mean and deviation of the true tubelet, as VideoMAE's visualisation does: structure and
    texture are the network's, brightness and contrast are not.

    Args:
        export: Folder written by `tubelet export`, with decoder.
        video: A video file.
        out: The mp4 to write.
        seed: Of the masks.
        mask_ratio: Share of hidden cells; default: that of training.
        max_windows: Upper limit of windows.
        device: Where to compute.
        progress: Told how far the video is read.

    Raises:
        UserError: unreadable input, no decoder, a video shorter than a clip, or an unwritable output.
    """
    exported = load_export(export)
    if exported.decoder is None:
        raise UserError(
            f"{export} has no decoder, as its run had no masked_frame objective: give the export of a run that had one"
        )
    ratio = mask_ratio or float(exported.provenance.get("mask_ratio") or MASK_RATIO)
    num_shown = visible_cells(exported.geometry.grid.cells, ratio)
    if not 0 < num_shown < exported.geometry.grid.cells:
        raise UserError(
            f"mask ratio is {ratio}; it must hide some of the {exported.geometry.grid.cells} cells of a frame and show "
            "some: use 0.75"
        )
    with open_samples(video, exported.geometry, progress=progress) as samples:
        windows = [(sample, *window) for sample in samples for window in _windows(sample, exported)][:max_windows]
        if not windows:
            longest = max((sample.num_frames for sample in samples), default=0)
            raise UserError(
                f"{video} has {longest} frames; the network takes {exported.geometry.frames}: give a longer video"
            )
        stride, rate = windows[0][2], windows[0][0].rate / windows[0][2]
        shown = _pictures(exported, [(sample, numbers_T) for sample, numbers_T, _ in windows], num_shown, seed, device)
        write_mp4(shown, Path(out), rate=rate)
    num_frames = len(windows) * exported.geometry.frames
    return ReconstructReport(Path(out), len(windows), num_frames, stride, ratio, rate)


def _windows(sample: Sample, exported: Export) -> Iterator[tuple[NDArray[np.int32], int]]:
    """Frame numbers of the windows that fit, and their stride; a short sample gives one at a smaller stride."""
    frames, stride = exported.geometry.frames, exported.geometry.stride
    if sample.num_frames < frames:
        return
    first_T, stride = pick_frames(sample.num_frames, frames, stride, 0.0)
    for start in range(0, sample.num_frames - int(first_T[-1]), frames * stride):
        yield first_T + np.int32(start), stride


@torch.no_grad()
def _pictures(
    exported: Export, windows: list[tuple[Sample, NDArray[np.int32]]], num_shown: int, seed: int, device: str
) -> Iterator[NDArray[np.uint8]]:
    """Side-by-side frames, window after window."""
    assert exported.decoder is not None
    encoder, decoder = exported.encoder.to(device), exported.decoder.to(device)
    grid = exported.geometry.grid
    for number, (sample, numbers_T) in enumerate(windows):
        frames_BCTHW = middle_crops([sample.decode(numbers_T)], exported.geometry.pixels, device)
        uniform = np.random.default_rng((seed, number)).random(grid.cells)
        mask = tube_mask(uniform, slots=grid.slots, cells=grid.cells, num_shown=num_shown)
        visible_BV, masked_BM = (
            torch.as_tensor(positions, device=device)[None] for positions in (mask.visible_V, mask.masked_M)
        )
        yield from side_by_side(fill_in(encoder, decoder, frames_BCTHW, visible_BV, masked_BM))


def side_by_side(pictures: Reconstruction) -> Iterator[NDArray[np.uint8]]:
    """Frames [H, 3W + gaps, 3] of the first clip: original | masked | filled in, on a white ground."""
    views = [to_bytes(view[0]) for view in (pictures.original, pictures.masked, pictures.filled)]
    gap_HG3 = np.full((views[0].shape[1], GAP, 3), 255, np.uint8)
    for original_HW3, masked_HW3, filled_HW3 in zip(*views, strict=True):
        yield np.concatenate([original_HW3, gap_HG3, masked_HW3, gap_HG3, filled_HW3], axis=1)
