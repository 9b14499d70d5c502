"""Which tokens the encoder sees: pure functions of uniform numbers. numpy only.

Legend: S slots  A cells of one slot  N = S * A tokens  V visible  M masked, V + M = N  m slots hidden as a whole
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError


@dataclass(frozen=True)
class Mask:
    """The tokens of one clip, told apart. Positions are int64, sorted, disjoint, and together all N.

    `whole_M` is 1 where a masked token belongs to a slot that is hidden as a whole, else 0 (int64).
    """

    visible_V: NDArray[np.int64]
    masked_M: NDArray[np.int64]
    whole_M: NDArray[np.int64]


def visible_cells(cells: int, mask_ratio: float) -> int:
    """Cells that a tube mask leaves visible in every slot: A - int(ratio * A), as in VideoMAE (20 of 196 at 0.9)."""
    return cells - int(mask_ratio * cells)


def visible_counts(slots: int, cells: int, mask_ratio: float) -> dict[int, int]:
    """Every exact number m of whole slots to hide -> cells that each other slot then shows.

    Exact: the clip shows as many tokens as with m = 0, so that clips of different m stand in one tensor.
    {0: 20, 3: 32, 4: 40, 6: 80, 7: 160} for 16 frames of 224 pixels at ratio 0.9.
    """
    num_visible = slots * visible_cells(cells, mask_ratio)
    shown = {m: divmod(num_visible, slots - m) for m in range(slots)}
    return {m: count for m, (count, rest) in shown.items() if rest == 0 and 0 < count <= cells}


def allowed_counts(
    slots: int, cells: int, mask_ratio: float, num_frames_masked: Sequence[int] | None
) -> tuple[int, ...]:
    """The values from which m is drawn, sorted: the ones asked for, or all exact ones up to half of the slots.

    Raises UserError for a ratio that hides nothing and for a value that is not exact, naming the nearest that is.
    """
    section = "objective.masked_frame"
    if visible_cells(cells, mask_ratio) == cells:
        raise UserError(
            f"{section}.mask_ratio is {mask_ratio}; it must hide at least one of the {cells} cells of a slot: "
            f"use at least {np.ceil(1000 / cells) / 1000:g}"
        )
    exact = visible_counts(slots, cells, mask_ratio)
    if num_frames_masked is None:
        return tuple(m for m in exact if m <= slots / 2)
    if not num_frames_masked:
        raise UserError(f"{section}.num_frames_masked is empty; it must name at least one value: use [0]")
    for m in num_frames_masked:
        if m not in exact:
            nearest = min(exact, key=lambda value: (abs(value - m), value))
            raise UserError(
                f"{section}.num_frames_masked is {m}; it must leave as many visible tokens as 0 does "
                f"(of {slots} slots: {', '.join(map(str, exact))}): use {nearest}"
            )
    return tuple(sorted(set(num_frames_masked)))


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
