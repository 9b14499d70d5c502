"""Rules between the fields of a config, which no field can see alone: each broken one is a sentence."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pretrain.geometry import allowed_counts
from shards.brace import is_pattern
from shards.errors import UserError

if TYPE_CHECKING:
    from pretrain.config import Config

TUBELET_FRAMES = 2
PATCH_PIXELS = 16
_ASSIGNED = re.compile(
    r"""(?:^|[\s;&|(])([A-Za-z_]\w*)=     # a variable that a line of shell gives a value
    (?!["']?(?:\$\(|`|\$\w|\$\{\w+\}))  # not that of a command or of another variable
    (?!["']{2}|[~/\s;]|$)               # and not an empty one or a path
    """,
    re.VERBOSE,
)
_SECRET = ("_KEY", "APIKEY", "SECRETKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "_PWD", "_PASS", "CREDENTIALS")
"""How the names of variables end that hold a secret."""


def problems_of(config: Config) -> Iterator[str]:
    """What the single fields cannot see: rules between them."""
    if config.data.frames % TUBELET_FRAMES:
        frames = config.data.frames
        yield f"data.frames is {frames}; it must be even (a tubelet is two frames): use {frames + 1}"
    if config.data.size % PATCH_PIXELS:
        nearest = max(PATCH_PIXELS, round(config.data.size / PATCH_PIXELS) * PATCH_PIXELS)
        yield f"data.size is {config.data.size}; it must be a multiple of {PATCH_PIXELS}: use {nearest}"
    if not config.data.crop_scales or not all(0 < scale <= 1 for scale in config.data.crop_scales):
        yield f"data.crop_scales is {list(config.data.crop_scales)}; each must lie in (0, 1]: use [1.0]"
    yield from _data_problems(config)
    if config.objective.masked_frame is None and config.objective.frame_order is None:
        yield "objective is empty; it must name at least one: add objective.masked_frame: {}"
    yield from _mask_problems(config)
    moved = config.objective.frame_order.num_moved if config.objective.frame_order else None
    num_slots = config.data.frames // TUBELET_FRAMES
    if config.objective.frame_order and num_slots < 3:
        yield f"data.frames is {config.data.frames}; objective.frame_order needs three slots of two: use 6 or more"
    if moved is not None and moved > num_slots:
        yield f"objective.frame_order.num_moved is {moved}; a clip has {num_slots} slots: use {num_slots} or less"
    if config.train.global_batch % config.data.clips_per_video:
        yield (
            f"train.global_batch is {config.train.global_batch}; it must be a multiple of data.clips_per_video "
            f"({config.data.clips_per_video}): use {_nearest_batch(config)}"
        )
    clips = config.data.clips_per_video
    if config.train.micro_batch % clips:
        yield (
            f"train.micro_batch is {config.train.micro_batch}; it must be a multiple of data.clips_per_video "
            f"({clips}), so that one rank decides about a video: use {clips}"
        )
    if config.train.micro_batch > config.train.global_batch:
        yield (
            f"train.micro_batch is {config.train.micro_batch}; it must not exceed train.global_batch "
            f"({config.train.global_batch}): lower it to {config.train.global_batch}"
        )
    if config.schedule.warmup_steps >= config.train.steps:
        yield (
            f"schedule.warmup_steps is {config.schedule.warmup_steps}; it must be below train.steps "
            f"({config.train.steps}): use {config.train.steps // 10}"
        )
    if config.schedule.final_lr > config.optim.lr:
        yield f"schedule.final_lr is {config.schedule.final_lr}; it must not exceed optim.lr ({config.optim.lr}): use 0"
    if config.zero.offload and config.zero.stage == 0:
        yield "zero.offload is true; stage 0 has no sharded states to move: use zero.stage=1 or more"
    keep, every = config.checkpoint.keep_every_steps, config.checkpoint.every_steps
    if keep % every:
        yield (
            f"checkpoint.keep_every_steps is {keep}; it must be a multiple of checkpoint.every_steps ({every}): "
            f"use {-(-keep // every) * every}"
        )
    yield from _prologue_problems(config)
    yield from _timeout_problems(config)


def _prologue_problems(config: Config) -> Iterator[str]:
    """The batch script reads it as one line, and the run folder keeps it for everybody who may read it."""
    if "\n" in config.launch.prologue.strip():
        yield "launch.prologue has several lines; it must be one: put them into a FILE, and use: . FILE"
    for name in _ASSIGNED.findall(config.launch.prologue):
        if name.upper().endswith(_SECRET):
            yield (
                f"launch.prologue sets {name}; it must hold no secret, for the run folder keeps it: put the line "
                "into a FILE that only you can read, and use: . FILE"
            )


def _data_problems(config: Config) -> Iterator[str]:
    """How frames are spaced, how sources are mixed, how the order is read."""
    data, cycles = config.data, [0, *(entry.cycle for entry in config.data.mix)]
    if data.rate_hz is not None and "stride" in data.model_fields_set:
        yield f"data.rate_hz is {data.rate_hz:g} and data.stride {data.stride}; one excludes the other: remove one"
    if not data.sources:
        yield "data.shards is an empty list; it must name at least one data set: add {url: FOLDER}"
    if any(one >= other for one, other in itertools.pairwise(cycles)):
        yield f"data.mix has the cycles {cycles[1:]}; they must rise: put them in order"
    is_wrong = any(len(entry.weights) != len(data.sources) for entry in data.mix)
    if is_wrong and not any(is_pattern(source.url) for source in data.sources):  # else it is seen when opened
        yield f"data.mix must give a weight to each of the {len(data.sources)} sources of data.shards: mend it"
    per_step = config.train.global_batch // data.clips_per_video
    if per_step % data.run_length:
        yield (
            f"data.run_length is {data.run_length}; it must divide the videos of a step ({per_step}), so that no "
            f"run is cut: use {math.gcd(per_step, data.run_length)}"
        )


def _mask_problems(config: Config) -> Iterator[str]:
    """Masks must leave the same number of tokens visible in every clip."""
    slots, cells = config.data.frames // TUBELET_FRAMES, (config.data.size // PATCH_PIXELS) ** 2
    if config.objective.masked_frame is not None and slots and cells:
        wanted = config.objective.masked_frame
        try:
            allowed_counts(slots, cells, wanted.mask_ratio, wanted.num_frames_masked)
        except UserError as error:
            yield str(error)


def _nearest_batch(config: Config) -> int:
    clips = config.data.clips_per_video
    return max(clips, round(config.train.global_batch / clips) * clips)


def _timeout_problems(config: Config) -> Iterator[str]:
    """C13: a wait must end before the wait around it does."""
    nested = ("read_attempt_s", "read_deadline_s", "wait_limit_s", "step_limit_s", "collective_timeout_s")
    sections = ("setup_limit_s", "first_step_limit_s", "save_limit_s", "eval_limit_s")
    pairs = [*itertools.pairwise(nested), *((section, "collective_timeout_s") for section in sections)]
    for inner, outer in pairs:
        inner_s, outer_s = getattr(config.limits, inner), getattr(config.limits, outer)
        if inner_s is not None and inner_s >= outer_s:
            yield (
                f"limits.{inner} is {inner_s:g}; it must be below limits.{outer} ({outer_s:g}): "
                "lower the one or raise the other"
            )
    if config.data.decode_deadline_s >= config.limits.wait_limit_s:
        yield (
            f"data.decode_deadline_s is {config.data.decode_deadline_s:g}; it must be below limits.wait_limit_s "
            f"({config.limits.wait_limit_s:g}): lower it"
        )
