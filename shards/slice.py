"""Slices: the shares of one packing that the tasks of a job array make, each a part of the data set of its own.

DST/parts/0003-of-0016/        slice 3/16, a packed folder
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from shards.errors import UserError

SLICE_PART = re.compile(r"(\d{4,})-of-(\d{4,})")


@dataclass(frozen=True)
class Slice:
    """One of `count` shares of the files, counted from 0 as Slurm's arrays are."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Slice:
        """Read I/N, as in 3/16. Raises UserError for anything else."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None or not int(found[1]) < int(found[2]):
            raise UserError(
                f"--slice is {text!r}; it must be I/N, counted from 0 (of 16 slices 0/16 to 15/16): give one of these"
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def part(self) -> str:
        """Name of its folder below parts/."""
        return f"{self.number:04d}-of-{self.count:04d}"


def is_slice(part: str) -> bool:
    """Whether a folder below parts/ is a slice; the others were appended."""
    return SLICE_PART.fullmatch(part) is not None


def missing_slices(parts: Iterable[str]) -> list[Slice]:
    """Those that these parts lack. Raises UserError for slices of two packings."""
    found = [match for part in parts if (match := SLICE_PART.fullmatch(part))]
    counts = sorted({int(match[2]) for match in found})
    if len(counts) > 1:
        raise UserError(
            f"parts/ holds slices of {' and of '.join(map(str, counts))}; all must be of one number: remove the others"
        )
    numbers = {int(match[1]) for match in found}
    return [Slice(number, count) for count in counts for number in range(count) if number not in numbers]
