"""How a data set grows under a run: from some draw on, it is the one with a longer manifest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Growth:
    """From draw `first_draw` of a source on, which begins an epoch, the source has this manifest."""

    source: int
    first_draw: int
    manifest_hash: str
    num_samples: int
    """Of the split, selected or not."""
