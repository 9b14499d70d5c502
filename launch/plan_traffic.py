"""What each rank sends in one step, by stage: the collectives that DeepSpeed 0.19.8 was seen to call on gloo ranks
(tests/pretrain/test_memory.py counts their bytes), times what a ring needs for each.

    all-reduce of n bytes       2 n (N-1)/N sent by each of N ranks
    all-gather, reduce-scatter    n (N-1)/N
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.memory import LIVE_NUMEL, PERSISTENT_NUMEL
from pretrain.network import BF16_BYTES, FP32_BYTES, Mode, Network


@dataclass(frozen=True)
class Traffic:
    """Bytes that go into the collectives of one step, by kind."""

    all_reduce: int = 0
    """Gradients, at stages 0 to 2."""
    reduce_scatter: int = 0
    """Gradients, at stage 3."""
    all_gather: int = 0
    """Parameters: after the update, and at stage 3 before they are used."""

    def sent(self, world_size: int) -> float:
        """Bytes that one rank sends in a step."""
        return (2 * self.all_reduce + self.reduce_scatter + self.all_gather) * (world_size - 1) / world_size


def traffic_of(network: Network, *, stage: int, mode: Mode, num_micro_steps: int) -> Traffic:
    """The collectives of one step. Stages 2 and 3 reduce after every micro batch, 0 and 1 once."""
    numel = network.num_parameters
    value_bytes = BF16_BYTES if mode == "bf16" else FP32_BYTES
    if stage == 0:
        return Traffic(all_reduce=FP32_BYTES * numel)
    if stage < 3:
        return Traffic(
            all_reduce=value_bytes * numel * (1 if stage == 1 else num_micro_steps), all_gather=value_bytes * numel
        )
    kept_whole = sum(w.numel for w in network.weights if w.numel <= PERSISTENT_NUMEL)
    others = numel - kept_whole
    # What stays gathered from forward to backward pass is fetched once per micro batch, the rest twice.
    fetched = others + max(0, others - LIVE_NUMEL)
    return Traffic(
        reduce_scatter=value_bytes * numel * num_micro_steps,
        all_gather=value_bytes * (kept_whole + fetched * num_micro_steps),
    )
