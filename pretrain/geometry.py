"""How many tokens a mask may leave visible: arithmetic that the config checks and the masks rely on. No numpy.

Legend: S slots  A cells of one slot  m slots hidden as a whole
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from shards.errors import UserError


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
            f"use at least {math.ceil(1000 / cells) / 1000:g}"
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
