"""Small decisions that all ranks take together, over a gloo group of their own that no device waits for."""

from __future__ import annotations

import torch
import torch.distributed as dist


class Agreement:
    """A side channel between the ranks for single whole numbers. Every method is a collective."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo")

    def from_first(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.broadcast(tensor, src=0, group=self.group)
        return int(tensor.item())

    def all_true(self, value: bool) -> bool:
        """Whether it is true on every rank."""
        tensor = torch.tensor([int(value)], dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, self.group)
        return bool(tensor.item())

    def wait(self) -> None:
        """Until every rank is here."""
        dist.barrier(self.group)
