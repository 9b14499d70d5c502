"""A rank whose loader is wrong on purpose: `mutant.py KIND CONFIG …`. The audit must say so."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from pretrain.train import main
from shards.dataset import DataSet
from shards.reader import SplitReader

kind = sys.argv[1]
right = DataSet.places

FIRST = 4
"""Position that the mutants touch first."""


def wrong(self: DataSet, positions_K: Any) -> Any:
    epoch_K, sample_K = right(self, positions_K)
    if kind == "repeats":  # one sample twice, another never
        sample_K = np.where(positions_K == FIRST, right(self, positions_K - 1)[1], sample_K)
    elif kind == "swaps":  # two neighbours change places
        swapped_K = np.where(positions_K == FIRST, FIRST + 1, np.where(positions_K == FIRST + 1, FIRST, positions_K))
        epoch_K, sample_K = right(self, swapped_K)
    elif kind == "drops":  # everything after it comes one place early
        epoch_K, sample_K = right(self, np.where(positions_K >= FIRST, positions_K + 1, positions_K))
    return epoch_K, sample_K


DataSet.places = wrong
if kind == "delivers other bytes":
    original_init = SplitReader.__init__

    def open_wrongly(self: SplitReader, *arguments: Any, **named: Any) -> None:
        """Samples 0 and 1 are read from each other's place, so their checksums are right for what is read."""
        original_init(self, *arguments, **named)
        records = np.array(self.records)
        records[[0, 1]] = records[[1, 0]]
        self.records = records

    SplitReader.__init__ = open_wrongly
main(sys.argv[2:])
