"""Which tokens the encoder sees: pure functions of uniform numbers. numpy only.

Legend: S slots  A cells of one slot  N = S * A tokens  V visible  M masked, V + M = N  m slots hidden as a whole
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.geometry import visible_counts


@dataclass(frozen=True)
class Mask:
    """The tokens of one clip, told apart. Positions are int64, sorted, disjoint, and together all N.

    `whole_M` is 1 where a masked token belongs to a slot that is hidden as a whole, else 0 (int64).
    """

    visible_V: NDArray[np.int64]
    masked_M: NDArray[np.int64]
    whole_M: NDArray[np.int64]


def num_tube_uniforms(cells: int) -> int:
    """How many uniform numbers `tube_mask` takes."""
    return cells


def tube_mask(uniform: NDArray[np.float64], *, slots: int, cells: int, num_shown: int) -> Mask:
    """A tube mask: the same `num_shown` cells, drawn evenly, in every slot.

    Kept apart from `tube_and_frame_mask` because frame order needs every slot to show its cells.
    """
    shown_SA = np.zeros((slots, cells), dtype=bool)
    shown_SA[:, np.argsort(uniform, kind="stable")[:num_shown]] = True
    return _split(shown_SA)


def num_tube_and_frame_uniforms(cells: int) -> int:
    """How many uniform numbers `tube_and_frame_mask` takes."""
    return cells + 2


def tube_and_frame_mask(
    uniform: NDArray[np.float64], *, slots: int, cells: int, mask_ratio: float, allowed: Sequence[int]
) -> Mask:
    """A tube mask over the slots that are not hidden as a whole.

    m is drawn evenly from `allowed`; the m hidden slots are one contiguous run whose place is drawn evenly. A run,
    because a single hidden slot between two visible ones is filled in by interpolation, and teaches little. The
    visible slots of the clip all show the same cells. `uniform` has `num_tube_and_frame_uniforms(cells)` numbers
    in [0, 1).
    """
    m = allowed[int(uniform[0] * len(allowed))]
    start = int(uniform[1] * (slots - m + 1))
    num_shown = visible_counts(slots, cells, mask_ratio)[m]
    shown_SA = np.zeros((slots, cells), dtype=bool)
    shown_SA[:, np.argsort(uniform[2:], kind="stable")[:num_shown]] = True
    shown_SA[start : start + m] = False
    return _split(shown_SA)


def _split(shown_SA: NDArray[np.bool_]) -> Mask:
    shown_N = shown_SA.reshape(-1)
    masked_M = np.flatnonzero(~shown_N).astype(np.int64)
    whole_SA = np.broadcast_to(np.logical_not(shown_SA).all(axis=1, keepdims=True), shown_SA.shape)
    return Mask(
        visible_V=np.flatnonzero(shown_N).astype(np.int64),
        masked_M=masked_M,
        whole_M=whole_SA.reshape(-1)[masked_M].astype(np.int64),
    )
