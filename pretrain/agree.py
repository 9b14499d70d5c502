"""What ranks tell each other beside gradients: sums for the log, small decisions. Owner of torch.distributed.

Decisions go over a gloo group of their own, which no device waits for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

_dist: Any = torch.distributed  # its signatures are only half typed


class Agreement:
    """A side channel between the ranks for small things. Every method is a collective."""

    def __init__(self, timeout_s: float) -> None:
        self._group = _dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def from_first(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        tensor = torch.tensor([value], dtype=torch.int64)
        _dist.broadcast(tensor, src=0, group=self._group)
        return int(tensor.item())

    def all_true(self, value: bool) -> bool:
        """Whether it is true on every rank."""
        tensor = torch.tensor([int(value)], dtype=torch.int64)
        _dist.all_reduce(tensor, _dist.ReduceOp.MIN, self._group)
        return bool(tensor.item())

    def gather(self, numbers: Mapping[str, float]) -> list[dict[str, float]]:
        """The named numbers of every rank, in the order of ranks; the names may differ between ranks."""
        return [json.loads(text) for text in self.gather_texts(json.dumps(dict(numbers)))]

    def gather_texts(self, own: str) -> list[str]:
        """The text of every rank, in the order of ranks."""
        text = json.dumps(own).encode()
        length = self.start_maxima([len(text)]).result()[0]
        mine = torch.frombuffer(bytearray(text.ljust(length)), dtype=torch.uint8)
        texts = [torch.empty_like(mine) for _ in range(_dist.get_world_size(self._group))]
        _dist.all_gather(texts, mine, group=self._group)
        return [json.loads(bytes(text.numpy())) for text in texts]

    def start_maxima(self, values: Sequence[int]) -> PendingMaxima:
        """Begin to find the largest of each value over all ranks, without waiting for it."""
        tensor = torch.tensor(list(values), dtype=torch.int64)
        return PendingMaxima(tensor, _dist.all_reduce(tensor, _dist.ReduceOp.MAX, self._group, async_op=True))

    def wait_for(self, is_done: Callable[[], bool], limit_s: float, poll_s: float = 0.5) -> bool:
        """Until it is done on every rank, or the limit has passed on one; says which. However long it takes, no single
        collective lasts longer than a moment.
        """
        end_s = time.monotonic() + limit_s
        while not self.all_true(is_done()):
            if not self.all_true(time.monotonic() < end_s):
                return False
            time.sleep(poll_s)
        return True

    def wait(self) -> None:
        """Until every rank is here."""
        _dist.barrier(self._group)


class PendingMaxima:
    """The largest values of all ranks, once they are known."""

    def __init__(self, tensor: Tensor, work: Any) -> None:
        self._tensor, self._work = tensor, work

    def result(self) -> list[int]:
        """Wait for them."""
        self._work.wait()
        return [int(value) for value in self._tensor.numpy()]


def sum_over_ranks(tensor: Tensor) -> None:
    """Replace a tensor on the compute device by its sum over all ranks."""
    _dist.all_reduce(tensor)


def leave_ranks() -> None:
    """Barrier and close: a rank that exits while another still talks to it can abort."""
    _dist.barrier()
    _dist.destroy_process_group()
