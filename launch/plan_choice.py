"""Which stage, which micro batch: every option with what fits, and the one that costs the least time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from launch.plan_gpus import GB, Gpu
from pretrain.config import Config
from pretrain.memory import Memory, fullest_states, memory_of
from pretrain.network import Network
from shards.errors import UserError

PLENTY = 8
"""Clips per micro batch from which on a GPU is busy: fewer are accepted only if the alternatives cost more."""
STEP_OVERHEAD_CLIPS = 2
"""What starting a micro batch is taken to cost, in clips: decides between few large and many small ones."""
SPLITS = (*((stage, False) for stage in range(4)), *((stage, True) for stage in range(1, 4)))
"""(stage, offload): all there are, in the order of the table."""
PREFERENCE = (
    (False, ((1, False), (2, False), (3, False))),
    (True, ((1, False), (2, False), (3, False))),
    (False, ((1, True), (2, True), (3, True))),
    (True, ((1, True), (2, True), (3, True))),
)
"""(recomputed activations, (stage, offload)) from the cheapest on. Stage 1 sends least, 2 and 3 after every micro
batch; recomputing costs a third more time, offload waits for the host at every update. Stage 0 is never cheaper than 1.
"""


@dataclass(frozen=True)
class Option:
    """One way to split a run over its ranks."""

    stage: int
    offload: bool
    recompute: bool
    max_micro_batch: int
    """0: not even the smallest fits."""
    memory: Memory
    """At the largest micro batch that fits, or at the smallest one if none does."""

    @property
    def name(self) -> str:
        """For a table."""
        return f"{self.stage}{' offload' if self.offload else ''}"

    def to_json(self) -> dict[str, Any]:
        """For a machine, in bytes."""
        facts = {"stage": self.stage, "offload": self.offload, "activation_checkpointing": self.recompute}
        return {
            **facts,
            "max_micro_batch": self.max_micro_batch,
            **asdict(self.memory),
            "total": self.memory.total,
        }


@dataclass(frozen=True)
class Choice:
    """The option that is recommended."""

    option: Option
    micro_batch: int
    num_micro_steps: int
    num_fillers: int
    """Clips of weight 0 that make up the last micro batches of a step."""
    rows: tuple[Option, ...]
    """Stages 0 to 3, each with and without offload, at the recommended micro batch: what the table shows."""

    def to_json(self) -> dict[str, Any]:
        """For a machine."""
        return {
            "stage": self.option.stage,
            "offload": self.option.offload,
            "activation_checkpointing": self.option.recompute,
            "micro_batch": self.micro_batch,
            "num_micro_steps": self.num_micro_steps,
            "num_fillers": self.num_fillers,
            "memory_bytes": self.option.memory.total,
        }


def check_ranks(config: Config, world_size: int) -> None:
    """Raise UserError where a rank would have no clip."""
    if world_size > config.train.global_batch:
        raise UserError(
            f"train.global_batch is {config.train.global_batch}; it must be at least the number of ranks, and "
            f"--nodes x --gpus are {world_size}: take {config.train.global_batch} GPUs or fewer, or raise it"
        )
    share = -(-config.train.global_batch // world_size)
    if share < config.data.clips_per_video:
        raise UserError(
            f"data.clips_per_video is {config.data.clips_per_video}; a rank must have all clips of a video, and "
            f"{world_size} ranks have {share} each: take fewer GPUs, or raise train.global_batch"
        )


def options_of(network: Network, config: Config, *, world_size: int, max_pixels: int, gpu: Gpu) -> Iterator[Option]:
    """Every stage with and without offload and recomputed activations, with the largest micro batch that fits."""
    clips = config.data.clips_per_video
    share = max(1, -(-config.train.global_batch // world_size) // clips) * clips
    for stage, offload in SPLITS:
        memory_at = _memory_by_micro_batch(network, config, stage, offload, world_size, max_pixels)
        for recompute in (False, True):
            largest = 0
            # A whole share at once needs no sums of gradients, and may fit where a little less does not.
            if memory_at(share, recompute).total <= gpu.memory_bytes:
                largest = share
            else:
                above = share
                while above - largest > clips:
                    middle = (largest + above) // (2 * clips) * clips
                    fits = memory_at(middle, recompute).total <= gpu.memory_bytes
                    largest, above = (middle, above) if fits else (largest, middle)
            yield Option(stage, offload, recompute, largest, memory_at(max(clips, largest), recompute))


def _memory_by_micro_batch(
    network: Network, config: Config, stage: int, offload: bool, world_size: int, max_pixels: int
) -> Callable[[int, bool], Memory]:
    """(micro batch, recomputed activations) -> memory of the fullest rank."""
    states = {
        accumulates: fullest_states(
            network, config, stage=stage, offload=offload, world_size=world_size, accumulates=accumulates
        )
        for accumulates in (False, True)
    }

    def memory_at(micro_batch: int, recompute: bool) -> Memory:
        return memory_of(
            network,
            config,
            states[config.train.global_batch > micro_batch * world_size],
            stage=stage,
            micro_batch=micro_batch,
            recompute=recompute,
            max_pixels=max_pixels,
            world_size=world_size,
        )

    return memory_at


def choose(
    network: Network, config: Config, options: Sequence[Option], *, world_size: int, max_pixels: int, gpu: Gpu
) -> Choice:
    """The first option by `PREFERENCE` that runs a decent micro batch, else the one with the largest.

    Raises UserError where nothing fits.
    """
    found = {(option.recompute, option.stage, option.offload): option for option in options}
    ordered = [found[recompute, *split] for recompute, splits in PREFERENCE for split in splits]
    share = -(-config.train.global_batch // world_size)
    best = max(ordered, key=lambda option: option.max_micro_batch)
    if best.max_micro_batch == 0:
        least = min(ordered, key=lambda option: option.memory.total)
        raise UserError(
            f"model.size is {config.model.size} with data.frames={config.data.frames} and data.size="
            f"{config.data.size}; it must fit a {gpu.name} of {gpu.memory_bytes / GB:.0f} GB, and even a micro batch "
            f"of {config.data.clips_per_video} at stage {least.name}, activations recomputed, needs "
            f"{least.memory.total / GB:.0f} GB: take more GPUs, cards with more memory, shorter or smaller clips, or a "
            "smaller model"
        )
    enough = min(share, PLENTY)
    option = next((option for option in ordered if option.max_micro_batch >= enough), best)
    micro_batch = _best_micro_batch(option.max_micro_batch, share, config.data.clips_per_video)
    num_micro_steps = -(-config.train.global_batch // (micro_batch * world_size))

    def at_this_size(other: Option) -> Option:
        split = other.stage, other.offload
        memory_at = _memory_by_micro_batch(network, config, *split, world_size, max_pixels)
        return replace(other, memory=memory_at(micro_batch, other.recompute))

    return Choice(
        option=at_this_size(option),
        micro_batch=micro_batch,
        num_micro_steps=num_micro_steps,
        num_fillers=num_micro_steps * micro_batch * world_size - config.train.global_batch,
        rows=tuple(at_this_size(other) for other in options if other.recompute == option.recompute),
    )


def _best_micro_batch(largest: int, share: int, clips_per_video: int) -> int:
    """Of those that fit, the one whose micro batches cover a rank's share with the least work."""

    def cost(micro_batch: int) -> tuple[int, int]:
        return -(-share // micro_batch) * (micro_batch + STEP_OVERHEAD_CLIPS), -micro_batch

    return min(range(clips_per_video, largest + 1, clips_per_video), key=cost)


def round_down(number: int) -> int:
    """To two figures: 1,373 becomes 1,300."""
    unit = max(1, 10 ** (len(str(number)) - 2))
    return number // unit * unit
