"""A micro batch in the making: one row per clip, filled by several threads at once, then a ClipBatch.

Legend: B clips of a micro batch, T frames, N bytes per frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.batch import ClipBatch
from pretrain.data.clip import ClipPlan
from pretrain.data.decode import Frames
from shards.order import FILLER

BLACK_2X2 = np.array([16, 16, 16, 16, 128, 128], dtype=np.uint8)
"""A black I420 frame of 2x2 pixels: what filler clips show."""


@dataclass(frozen=True)
class Video:
    """One position of a micro batch, and the rows of the batch that its clips fill."""

    position: int
    epoch: int
    wanted: int
    rows: tuple[int, ...]
    draws: tuple[int, ...]


@dataclass
class Rows:
    """The rows of one micro batch; each thread fills rows of its own."""

    planes_BTN: NDArray[np.uint8]
    facts_B: NDArray[np.void]
    """All else that a ClipBatch says of a clip, one structured row each."""
    too_large: dict[int, NDArray[np.uint8]] = field(default_factory=dict[int, NDArray[np.uint8]])
    """Row -> frames [T, N] that it cannot hold: a substitute may be larger than what the order named."""

    @staticmethod
    def make(num_rows: int, frames: int, frame_bytes: int) -> Rows:
        """Rows that are filler clips until they are filled."""
        fields = [
            ("height", "i4"),
            ("width", "i4"),
            ("crop", "f4", (4,)),
            ("flip", "?"),
            ("color", "u1"),
            ("frame_numbers", "i4", (frames,)),
            ("position", "i8"),
            ("epoch", "i8"),
            ("draw", "i8"),
            ("wanted", "i8"),
            ("sample", "i8"),
            ("checksum", "i8"),
            ("weight", "f4"),
        ]
        facts_B = np.zeros(num_rows, dtype=fields)
        facts_B["height"] = facts_B["width"] = 2
        facts_B["crop"] = (0, 0, 2, 2)
        facts_B["position"] = facts_B["wanted"] = facts_B["sample"] = FILLER
        return Rows(np.empty((num_rows, frames, max(frame_bytes, BLACK_2X2.size)), dtype=np.uint8), facts_B)

    def fill(
        self,
        video: Video,
        plans: Sequence[ClipPlan],
        frames: Frames,
        index_CT: NDArray[Any],
        sample: int,
        checksum: int,
    ) -> None:
        """Copy the clips of a decoded video: clip c shows frames `index_CT[c]` of those in `frames`."""
        frames_UN = frames.planes_TN
        for row, draw, plan, index_T in zip(video.rows, video.draws, plans, index_CT, strict=True):
            clip_TN = frames_UN if len(index_T) == len(frames_UN) else frames_UN[index_T]
            self.too_large.pop(row, None)
            if frames_UN.shape[1] <= self.planes_BTN.shape[2]:
                _put(self.planes_BTN[row], clip_TN)
            else:
                self.too_large[row] = clip_TN.copy()
            values = {
                "height": frames.height,
                "width": frames.width,
                "crop": plan.crop,
                "flip": plan.flip,
                "color": frames.color,
                "frame_numbers": plan.frame_numbers_T,
                "position": video.position,
                "epoch": video.epoch,
                "draw": draw,
                "wanted": video.wanted,
                "sample": sample,
                "checksum": checksum,
                "weight": 1.0,
            }
            facts_1 = self.facts_B[row : row + 1]
            for name, value in values.items():
                facts_1[name] = value

    def to_batch(self, step: int, micro_step: int) -> ClipBatch:
        """The finished batch: rows that no video filled are black, all rows as long as the longest."""
        largest = max((clip_TN.shape[1] for clip_TN in self.too_large.values()), default=0)
        if largest:
            self.planes_BTN = np.pad(self.planes_BTN, ((0, 0), (0, 0), (0, largest - self.planes_BTN.shape[2])))
        for row, clip_TN in self.too_large.items():
            _put(self.planes_BTN[row], clip_TN)
        for row in np.flatnonzero(self.facts_B["sample"] == FILLER):
            _put(self.planes_BTN[row], np.tile(BLACK_2X2, (self.planes_BTN.shape[1], 1)))

        def column(name: str) -> torch.Tensor:
            return _tensor(self.facts_B[name].copy())

        return ClipBatch(
            step=step,
            micro_step=micro_step,
            planes_BTN=_tensor(self.planes_BTN),
            height_B=column("height"),
            width_B=column("width"),
            crop_B4=column("crop"),
            flip_B=column("flip"),
            color_B=column("color"),
            frame_numbers_BT=column("frame_numbers"),
            position_B=column("position"),
            epoch_B=column("epoch"),
            draw_B=column("draw"),
            wanted_B=column("wanted"),
            sample_B=column("sample"),
            checksum_B=column("checksum"),
            weight_B=column("weight"),
        )


def _put(row_TN: NDArray[np.uint8], frames_TN: NDArray[np.uint8]) -> None:
    """Copy the frames of a clip into its row; the padding is zero, so that batches are equal byte for byte."""
    num_bytes = frames_TN.shape[1]
    row_TN[:, :num_bytes] = frames_TN
    row_TN[:, num_bytes:] = 0


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]  # its argument is untyped in torch
