"""What one rank holds, stage by stage: where every byte comes from.

Read off DeepSpeed 0.19.8 as `pretrain.engine` sets it up, and held against the storages of real ranks by
tests/pretrain/test_memory.py (stages 0 to 3, both precisions, 1, 2 and 4 ranks). The plain formulas of ZeRO
(arXiv 1910.02054: 4 W + 12 W/N bytes and so on) leave out what decides here: fp32 sums of gradients, stages that keep
whole gradients between micro steps, and buffers. Arithmetic only, for a login node without torch.

Legend: W parameters  N ranks  e bytes of a parameter in forward and backward (2 in bf16 at stages 1 to 3, else 4)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config import Config
from pretrain.network import BF16_BYTES, FP32_BYTES, Mode, Network, Weight
from pretrain.sections import OptimConfig

PERSISTENT_NUMEL = 100_000
"""Stage 3 keeps parameters of up to this many numbers whole (stage3_param_persistence_threshold)."""
LIVE_NUMEL = 500_000_000 + 50_000_000
"""Stage 3 keeps gathered what is used again within 10^9 numbers (stage3_max_reuse_distance): of the way forward and
back that is the last half billion, and a prefetch bucket (stage3_prefetch_bucket_size)."""
MAX_BUCKET_NUMEL = 200_000_000
"""Numbers in one reduction: buckets are as large as the model, up to this."""
ALLREDUCE_NUMEL = 500_000_000
"""Stage 0, and stage 1 in bf16, flatten gradients in portions of this many numbers (MEMORY_OPT_ALLREDUCE_SIZE)."""
SUB_GROUP_NUMEL = 1_000_000_000
"""Stage 3 updates this many numbers at a time (sub_group_size)."""
RESERVE_BYTES = 4_000_000_000
"""Assumed: CUDA's context and kernels (about 0.5 GB), NCCL's buffers (1 to 2 GB), what the allocator cannot reuse."""


@dataclass(frozen=True)
class States:
    """Bytes of the model states on one rank: what training holds between its steps, and DeepSpeed's buffers."""

    parameters: int
    """What forward and backward use, parts that stage 3 gathers included."""
    gradients: int
    """At most, while micro batches run."""
    gradients_at_update: int
    """While the optimizer updates the first group: by then activations are gone."""
    optimizer: int
    """fp32 master weights and moments."""
    buckets: int
    """Buffers of the reduction, at most."""
    host: int = 0
    """With offload: optimizer states, gradients on their way to them and parameters on their way back, pinned."""


@dataclass(frozen=True)
class Memory:
    """One GPU's memory, by what it is for, in bytes."""

    states: States
    activations: int
    """What autograd keeps of a micro batch, one recomputed block where activations are, and the work of the loss."""
    batch: int
    """The micro batch as it was decoded, as frames and as tubelets."""
    copies: int
    """Host memory: what a save copies the states into, and writes from (`pretrain.saver`)."""
    reserve: int = RESERVE_BYTES

    @property
    def host(self) -> int:
        """Host memory of the rank for what training holds; workers that decode come on top."""
        return self.states.host + self.copies

    @property
    def total(self) -> int:
        """The most that is needed at a time: at the end of a forward pass or during the update."""
        held = self.states.parameters + self.states.optimizer + self.states.buckets + self.batch + self.reserve
        return held + max(self.states.gradients + self.activations, self.states.gradients_at_update)


def arithmetic(precision: str, stage: int) -> Mode:
    """bf16 at stage 0 is autocast over fp32 weights: see `pretrain.engine.deepspeed_config`."""
    if precision == "fp32":
        return "fp32"
    return "bf16" if stage else "autocast"


def moment_bytes(optim: OptimConfig) -> int:
    """Bytes per parameter of what the optimizer remembers beside the master weights, in fp32."""
    if optim.name == "sgd":
        return FP32_BYTES if optim.momentum else 0
    return 2 * FP32_BYTES


def checkpoint_bytes(network: Network, optim: OptimConfig) -> int:
    """A checkpoint, all ranks together: master weights and what the optimizer remembers; the rest is small."""
    return (FP32_BYTES + moment_bytes(optim)) * network.num_parameters


def memory_of(
    network: Network,
    config: Config,
    states: States,
    *,
    stage: int,
    micro_batch: int,
    recompute: bool,
    max_pixels: int,
    world_size: int,
) -> Memory:
    """Memory of a rank with these states. `max_pixels`: width x height of the largest video of the data set."""
    data, mode = config.data, arithmetic(config.train.precision, stage)
    kept = micro_batch * network.kept_bytes(mode, recompute=recompute) + network.cast_bytes(mode)
    again = micro_batch * network.largest_block_bytes(mode) if recompute else 0
    work = micro_batch * network.work_bytes(mode)
    values = 3 * data.frames * data.size**2
    decoded = int(data.frames * max_pixels * (3.0 if data.decoder == "decord" else 1.5))
    # Frames as fp32, and cut into tubelets as fp32 again: the caller still holds the first.
    batch = micro_batch * (decoded + 2 * FP32_BYTES * values)
    copies = -(-checkpoint_bytes(network, config.optim) // world_size)
    return Memory(states, kept + max(again, work), batch, copies)


def memory_of_run(network: Network, config: Config, world_size: int, max_pixels: int) -> Memory:
    """Memory of the fullest rank of a run as its config says."""
    train, stage = config.train, config.zero.stage
    states = fullest_states(
        network,
        config,
        stage=stage,
        offload=config.zero.offload,
        world_size=world_size,
        accumulates=train.global_batch > train.micro_batch * world_size,
    )
    return memory_of(
        network,
        config,
        states,
        stage=stage,
        micro_batch=train.micro_batch,
        recompute=train.activation_checkpointing,
        max_pixels=max_pixels,
        world_size=world_size,
    )


def fullest_states(
    network: Network, config: Config, *, stage: int, offload: bool, world_size: int, accumulates: bool
) -> States:
    """Model states of the rank that holds most. Ranks differ only by parameters that lie across the edge of their
    share; the first eight show by how much.
    """
    mode = arithmetic(config.train.precision, stage)
    found = [
        states_of(
            network.weights,
            stage=stage,
            mode=mode,
            rank=rank,
            world_size=world_size,
            moments=moment_bytes(config.optim),
            accumulates=accumulates,
        )
        for rank in range(min(world_size, 8))
    ]
    fullest = max(found, key=lambda states: states.gradients + states.gradients_at_update)
    return _offloaded(fullest, stage, mode, moment_bytes(config.optim)) if offload else fullest


def states_of(
    weights: Sequence[Weight],
    *,
    stage: int,
    mode: Mode,
    rank: int,
    world_size: int,
    moments: int = 2 * FP32_BYTES,
    accumulates: bool = True,
) -> States:
    """Model states of one rank without offload. `moments`: see `moment_bytes`. `accumulates`: several micro batches
    make up a step.
    """
    value_bytes = BF16_BYTES if mode == "bf16" else FP32_BYTES
    groups = [[w.numel for w in weights if w.is_decayed is decayed] for decayed in (True, False)]
    groups = [group for group in groups if group]
    numel = sum(w.numel for w in weights)
    if stage == 0:
        # Weights are their own masters. All gradients are flattened into one copy to be summed up over ranks.
        flat = FP32_BYTES * min(numel, ALLREDUCE_NUMEL)
        return States(FP32_BYTES * numel, FP32_BYTES * numel, FP32_BYTES * numel, moments * numel, flat)
    bucket = value_bytes * min(numel, MAX_BUCKET_NUMEL)
    if stage == 3:
        return _partitioned(weights, groups, value_bytes, moments, bucket, world_size)
    padded = [_padded(sum(group), world_size) for group in groups]
    share = [whole // world_size for whole in padded]
    states = (FP32_BYTES + moments) * sum(share)
    if mode == "bf16" and stage == 1:
        # BF16_Optimizer: fp32 sums of the whole gradient, beside the bf16 gradients of the last micro batch, and one
        # flat copy of those while they are reduced.
        gradients = FP32_BYTES * sum(padded) + BF16_BYTES * numel
        flat = BF16_BYTES * min(numel, ALLREDUCE_NUMEL)
        return States(BF16_BYTES * sum(padded), gradients, gradients, states, flat)
    if mode == "bf16":
        # Stage 2 adds up its own share in fp32, in one flat tensor that the optimizer takes as it is.
        gradients = FP32_BYTES * sum(share)
        return States(BF16_BYTES * sum(padded), gradients, gradients, states, bucket)
    # fp32: a rank keeps the gradients of its share as whole parameters; the optimizer gets a flat copy, group by group.
    own = FP32_BYTES * sum(_touched(group, part, rank) for group, part in zip(groups, share, strict=True))
    gradients = FP32_BYTES * numel if stage == 1 and accumulates else own
    copy = FP32_BYTES * share[0] if world_size > 1 or len(groups[0]) > 1 else 0
    return States(FP32_BYTES * sum(padded), gradients, own + copy, states, bucket)


def _partitioned(
    weights: Sequence[Weight], groups: list[list[int]], value_bytes: int, moments: int, bucket: int, world_size: int
) -> States:
    """Stage 3 cuts every parameter for itself. Forward and backward work on gathered copies, which mostly stay."""
    shares = [sum(-(-numel // world_size) for numel in group) for group in groups]
    kept_whole = sum(w.numel for w in weights if w.numel <= PERSISTENT_NUMEL)
    others = sum(w.numel for w in weights) - kept_whole
    gathered = kept_whole + min(others, LIVE_NUMEL) if world_size > 1 else 0
    gradients = FP32_BYTES * sum(shares)
    return States(
        parameters=value_bytes * (sum(shares) + gathered),
        gradients=gradients,
        gradients_at_update=gradients + FP32_BYTES * min(shares[0], SUB_GROUP_NUMEL),
        optimizer=(FP32_BYTES + moments) * sum(shares),
        buckets=bucket,
    )


def _offloaded(states: States, stage: int, mode: Mode, moments: int) -> States:
    """With `zero.offload`: the optimizer's states and a copy of its gradients go to the host.

    Stages 1 and 2 still add up on the card and stage 3 on the host (its `grad_partitions_flat_buffer`); stage 1 uses
    the same optimizer as 2. Read in DeepSpeed's source and seen as sums over both places on CPU ranks; not measured
    on a card.
    """
    share = states.optimizer * FP32_BYTES // (FP32_BYTES + moments)
    if stage == 3:
        return States(states.parameters, 0, 0, 0, states.buckets, states.optimizer + 2 * share)
    value_bytes = BF16_BYTES if mode == "bf16" else FP32_BYTES
    numel = states.parameters // value_bytes
    gradients, buckets = states.gradients, states.buckets
    if stage == 1:
        gradients, buckets = FP32_BYTES * numel + share, FP32_BYTES * min(numel, MAX_BUCKET_NUMEL)
    host = states.optimizer + share + share * value_bytes // FP32_BYTES
    return States(states.parameters, gradients, gradients, 0, buckets, host)


def _padded(numel: int, world_size: int) -> int:
    """Flat groups are filled up to a multiple of two per rank (nccl_start_alignment_factor)."""
    return -(-numel // (2 * world_size)) * 2 * world_size


def _touched(group: Sequence[int], share: int, rank: int) -> int:
    """Numbers of the parameters of a group of which at least a part lies in the share of a rank."""
    first, last = rank * share, (rank + 1) * share
    begin = 0
    touched = 0
    for numel in group:
        if begin < last and begin + numel > first:
            touched += numel
        begin += numel
    return touched
