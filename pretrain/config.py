"""The configuration of a run: typed, frozen, strict, and complete before any process starts.

YAML has one section per component; a component is handed its own section and nothing else. Unknown keys are errors
that name the nearest key. `load_config` collects every problem and reports them together. No torch is imported, so
that the login node can check a config.
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pretrain.geometry import allowed_counts
from shards.brace import is_pattern
from shards.errors import UserError

TUBELET_FRAMES = 2
PATCH_PIXELS = 16

Change = Literal["free", "recorded", "refused"]


class Section(BaseModel):
    """One section of the YAML file. Frozen; unknown keys are refused; field docstrings are the help texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path or URL. No shell expands a ~ that follows an equals sign, so this does."""


class RunConfig(Section):
    """Where the run lives and what makes its randomness."""

    dir: LocalPath
    """Run folder: a POSIX path that all nodes see. Default: runs/NAME-OF-THE-CONFIG."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of order, crops, masks and initial weights."""


class SourceConfig(Section):
    """One of several data sets that are mixed."""

    url: LocalPath
    weight: float | None = Field(default=None, gt=0)


class MixConfig(Section):
    """Other weights from some cycle of 4,096 positions on."""

    cycle: int = Field(ge=1)
    weights: tuple[float, ...]


class CacheConfig(Section):
    """Samples kept on the disk of each node, shared by its ranks. Never changes which samples come, or their order."""

    dir: LocalPath
    """A folder on a disk of the node."""
    max_bytes: int = Field(gt=0)
    """The longest unused samples go when it is full."""


class DataConfig(Section):
    """Which videos, which frames of them, and how they reach the model."""

    shards: LocalPath | tuple[SourceConfig, ...]
    """Packed data: a folder, a manifest URL, a brace pattern of folders or indexed tars, or a list of {url, weight}
    to mix (weight: share of the positions; all without one: by size)."""
    split: str = "train"
    """Split of `data.shards` to train on."""
    eval_shards: LocalPath | None = None
    """Packed data set for the held-out loss. Default: `data.shards`, of several the first that holds something out."""
    eval_split: str = "val"
    """Split that is held out from training."""
    frames: int = Field(default=16, ge=2)
    """Frames of a clip (even: a tubelet is two frames)."""
    stride: int = Field(default=4, ge=1)
    """Take every n-th frame; drops to the largest that fits where a video is too short (counted)."""
    rate_hz: float | None = Field(default=None, gt=0)
    """Take frames this many times per second, whatever the rate of the source. Excludes data.stride."""
    size: int = Field(default=224, ge=16)
    """Height and width of a clip in pixels (a multiple of 16)."""
    clips_per_video: int = Field(default=1, ge=1)
    """Clips drawn from each video that is read; the global batch counts clips."""
    run_length: int = Field(default=1, ge=1)
    """Neighbours in a tar that follow each other in the order, so that one read fetches them all. Packing has shuffled
    them. Raise it where requests are slow or cost money; train.micro_batch x accumulation should be a multiple."""
    where: str = ""
    """Train on the samples for which this holds, like: duration_s >= 2 and short_side >= 128 and motion > 1."""
    mix: tuple[MixConfig, ...] = ()
    """Other weights for the sources of data.shards later in the run: a list of {cycle, weights}."""
    short: Literal["reject", "loop"] = "reject"
    """A video with fewer frames than `data.frames`: replaced and counted, or played again from its start."""
    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """Sides of the random crop as shares of the short side (VideoMAE's multi-scale crop)."""
    flip: bool = False
    """Mirror half of the clips. VideoMAE does not: left and right matter in some data sets."""
    decoder: Literal["pyav", "decord"] = "pyav"
    """Library that decodes. PyAV skips frames nobody needs and cannot hang for ever."""
    workers: int = Field(default=2, ge=0)
    """Decoder processes per rank. 0 decodes in the training process: for debugging."""
    prefetch_steps: int = Field(default=2, ge=1)
    """Global batches that may be under way ahead of training."""
    cache: CacheConfig | None = None
    hedge_s: float = Field(default=2.0, ge=0)
    """A read from object storage that is late by this much gets a second one beside it; 0 never."""
    decode_deadline_s: float = Field(default=30.0, gt=0)
    """A decoder that needs longer is killed and its clip replaced."""
    bad_sample_limit: float = Field(default=0.01, ge=0, le=1)
    """Share of the data set that may prove unusable before the run stops and names the samples."""

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """`shards` as a list, one entry where it is one data set."""
        return (SourceConfig(url=self.shards),) if isinstance(self.shards, str) else self.shards


class MaskedFrameConfig(Section):
    """Reconstruct hidden tubes and hidden whole frames."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of this loss in the sum."""
    mask_ratio: float = Field(default=0.9, gt=0, lt=1)
    """Share of the cells of a frame that a tube mask hides; the number of visible tokens follows from it."""
    num_frames_masked: tuple[int, ...] | None = None
    """Whole time slots (two frames) hidden per clip, one value drawn per clip. Default: every value up to half of
    the slots that keeps the number of visible tokens exact. [0] is VideoMAE."""


class FrameOrderConfig(Section):
    """Say which time slot each shuffled slot came from."""

    weight: float = Field(default=0.1, gt=0)
    """Weight of this loss in the sum."""
    mask_ratio: float = Field(default=0.9, gt=0, lt=1)
    """Share of the cells of a frame hidden in the second encoder pass."""
    num_moved: int | None = Field(default=None, ge=2)
    """Slots put out of place. Default: all of them."""
    min_motion: float = Field(default=1.0, ge=0)
    """Slots that differ less from a neighbour (mean grey levels of 255) are not asked about (counted)."""


class ObjectiveConfig(Section):
    """What is learned. At least one; all of them in one forward pass per micro batch."""

    masked_frame: MaskedFrameConfig | None = None
    frame_order: FrameOrderConfig | None = None


class ModelConfig(Section):
    """The video Transformer."""

    size: Literal["nano", "tiny", "small", "base", "large", "huge", "giant"] = "base"
    """Width, depth and decoder of the VideoMAE family (pretrain/model/sizes.py)."""


class TrainConfig(Section):
    """Length, batch and arithmetic of training."""

    steps: int = Field(ge=1)
    """Global batches in the whole run."""
    global_batch: int = Field(ge=1)
    """Clips per optimizer step over all ranks. Never changes within a run."""
    micro_batch: int = Field(default=8, ge=1)
    """Clips per rank and forward pass. Accumulation follows from it: global / (micro x ranks)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the forward and backward pass. Master weights, moments and gradient sums are always fp32."""
    init_from: LocalPath | None = None
    """Run folder, checkpoint or export whose weights a new run starts from (not its position or optimizer)."""
    deterministic: bool | None = None
    """Bit-identical resume. Default: on for CPU, off for GPUs (costs speed there)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Largest norm of the whole gradient; 0 does not clip (VideoMAE)."""


class ZeroConfig(Section):
    """How DeepSpeed shards states over ranks."""

    stage: Literal[0, 1, 2, 3] = 1
    """0 shards nothing, 1 optimizer states, 2 also gradients, 3 also parameters."""
    offload: bool = False
    """Keep optimizer states in CPU memory (stages 1 to 3)."""


class OptimConfig(Section):
    """The optimizer: torch's own."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(gt=0)
    """Learning rate after warm-up, for the global batch as it is (VideoMAE: 1.5e-4 x batch / 256)."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    """Not applied to biases, norms, tokens."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd."""


class ScheduleConfig(Section):
    """Learning rate over the run: linear warm-up, then cosine. Both count positions, so the batch may change."""

    warmup_steps: int = Field(default=0, ge=0)
    final_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the last step."""


class CheckpointConfig(Section):
    """When states are saved and how many saves are kept."""

    every_steps: int = Field(default=200, ge=1)
    keep: int = Field(default=2, ge=2)
    """Newest checkpoints kept. At least 2: should the newest prove broken, the one before it serves."""


class EvalConfig(Section):
    """Held-out loss with fixed masks. Moves no cursor."""

    every_steps: int = Field(default=0, ge=0)
    """0 never evaluates."""
    num_clips: int = Field(default=64, ge=1)
    """Clips of the held-out split, the same ones every time; several of a video where it has fewer videos."""


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class TrackConfig(Section):
    """What is written down. metrics.jsonl always."""

    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(_off)] = "off"
    """Fed from metrics.jsonl. online without a key falls back to offline and prints the line that syncs."""
    project: str = "tubelet"
    """wandb project."""
    log_every_steps: int = Field(default=10, ge=1)


class LimitsConfig(Section):
    """How long each kind of waiting may last, in seconds. They must rise in this order."""

    read_attempt_s: float = Field(default=30.0, gt=0)
    """One request to storage."""
    read_deadline_s: float = Field(default=300.0, gt=0)
    """All attempts at one sample."""
    wait_limit_s: float = Field(default=600.0, gt=0)
    """The training loop waiting for a batch."""
    step_limit_s: float = Field(default=900.0, gt=0)
    """One optimizer step."""
    collective_timeout_s: float = Field(default=1800.0, gt=0)
    """One collective between ranks."""


class Config(Section):
    """A whole run."""

    run: RunConfig
    data: DataConfig
    objective: ObjectiveConfig
    model: ModelConfig = ModelConfig()
    train: TrainConfig
    zero: ZeroConfig = ZeroConfig()
    optim: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    track: TrackConfig = TrackConfig()
    limits: LimitsConfig = LimitsConfig()

    def problems(self) -> Iterator[str]:
        """What the single fields cannot see: rules between them."""
        if self.data.frames % TUBELET_FRAMES:
            frames = self.data.frames
            yield f"data.frames is {frames}; it must be even (a tubelet is two frames): use {frames + 1}"
        if self.data.size % PATCH_PIXELS:
            nearest = max(PATCH_PIXELS, round(self.data.size / PATCH_PIXELS) * PATCH_PIXELS)
            yield f"data.size is {self.data.size}; it must be a multiple of {PATCH_PIXELS}: use {nearest}"
        if not self.data.crop_scales or not all(0 < scale <= 1 for scale in self.data.crop_scales):
            yield f"data.crop_scales is {list(self.data.crop_scales)}; each must lie in (0, 1]: use [1.0]"
        yield from self._data_problems()
        if self.objective.masked_frame is None and self.objective.frame_order is None:
            yield "objective is empty; it must name at least one: add objective.masked_frame: {}"
        yield from self._mask_problems()
        moved = self.objective.frame_order.num_moved if self.objective.frame_order else None
        num_slots = self.data.frames // TUBELET_FRAMES
        if self.objective.frame_order and num_slots < 3:
            yield f"data.frames is {self.data.frames}; objective.frame_order needs three slots of two: use 6 or more"
        if moved is not None and moved > num_slots:
            yield f"objective.frame_order.num_moved is {moved}; a clip has {num_slots} slots: use {num_slots} or less"
        if self.train.global_batch % self.data.clips_per_video:
            yield (
                f"train.global_batch is {self.train.global_batch}; it must be a multiple of data.clips_per_video "
                f"({self.data.clips_per_video}): use {self._nearest_batch()}"
            )
        clips = self.data.clips_per_video
        if self.train.micro_batch % clips:
            yield (
                f"train.micro_batch is {self.train.micro_batch}; it must be a multiple of data.clips_per_video "
                f"({clips}), so that one rank decides about a video: use {clips}"
            )
        if self.train.micro_batch > self.train.global_batch:
            yield (
                f"train.micro_batch is {self.train.micro_batch}; it must not exceed train.global_batch "
                f"({self.train.global_batch}): lower it to {self.train.global_batch}"
            )
        if self.schedule.warmup_steps >= self.train.steps:
            yield (
                f"schedule.warmup_steps is {self.schedule.warmup_steps}; it must be below train.steps "
                f"({self.train.steps}): use {self.train.steps // 10}"
            )
        if self.schedule.final_lr > self.optim.lr:
            yield f"schedule.final_lr is {self.schedule.final_lr}; it must not exceed optim.lr ({self.optim.lr}): use 0"
        if self.zero.offload and self.zero.stage == 0:
            yield "zero.offload is true; stage 0 has no sharded states to move: use zero.stage=1 or more"
        yield from self._timeout_problems()

    def _data_problems(self) -> Iterator[str]:
        """How frames are spaced, how sources are mixed, how the order is read."""
        data, cycles = self.data, [0, *(entry.cycle for entry in self.data.mix)]
        if data.rate_hz is not None and "stride" in data.model_fields_set:
            yield f"data.rate_hz is {data.rate_hz:g} and data.stride {data.stride}; one excludes the other: remove one"
        if not data.sources:
            yield "data.shards is an empty list; it must name at least one data set: add {url: FOLDER}"
        if any(one >= other for one, other in itertools.pairwise(cycles)):
            yield f"data.mix has the cycles {cycles[1:]}; they must rise: put them in order"
        is_wrong = any(len(entry.weights) != len(data.sources) for entry in data.mix)
        if is_wrong and not any(is_pattern(source.url) for source in data.sources):  # else it is seen when opened
            yield f"data.mix must give a weight to each of the {len(data.sources)} sources of data.shards: mend it"
        per_step = self.train.global_batch // data.clips_per_video
        if per_step % data.run_length:
            yield (
                f"data.run_length is {data.run_length}; it must divide the videos of a step ({per_step}), so that no "
                f"run is cut: use {math.gcd(per_step, data.run_length)}"
            )

    def _mask_problems(self) -> Iterator[str]:
        """Masks must leave the same number of tokens visible in every clip."""
        slots, cells = self.data.frames // TUBELET_FRAMES, (self.data.size // PATCH_PIXELS) ** 2
        if self.objective.masked_frame is not None and slots and cells:
            wanted = self.objective.masked_frame
            try:
                allowed_counts(slots, cells, wanted.mask_ratio, wanted.num_frames_masked)
            except UserError as error:
                yield str(error)

    def _nearest_batch(self) -> int:
        clips = self.data.clips_per_video
        return max(clips, round(self.train.global_batch / clips) * clips)

    def _timeout_problems(self) -> Iterator[str]:
        """C13: a wait must end before the wait around it does."""
        order = list(LimitsConfig.model_fields)
        for inner, outer in itertools.pairwise(order):
            inner_s, outer_s = getattr(self.limits, inner), getattr(self.limits, outer)
            if inner_s >= outer_s:
                yield (
                    f"limits.{inner} is {inner_s:g}; it must be below limits.{outer} ({outer_s:g}): "
                    "lower the one or raise the other"
                )
        if self.data.decode_deadline_s >= self.limits.wait_limit_s:
            yield (
                f"data.decode_deadline_s is {self.data.decode_deadline_s:g}; it must be below limits.wait_limit_s "
                f"({self.limits.wait_limit_s:g}): lower it"
            )


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read YAML, apply `section.key=value` overrides, validate. Raises `UserError` listing every problem found.

    Without a file the overrides must say everything that has no default, `run.dir` included.
    """
    raw = {} if path is None else _read_yaml(Path(path))
    problems = [problem for text in overrides for problem in _apply(raw, text)]
    run = raw.setdefault("run", {})
    if path is not None and isinstance(run, dict):
        cast(dict[str, Any], run).setdefault("dir", f"runs/{Path(path).stem}")
    config, found = parse(raw)
    problems += found
    if problems or config is None:
        raise UserError("\n".join(problems))
    return config


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"config {file} cannot be read ({reason}); give the path of a YAML file") from error
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"config {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"config {file} holds a {type(loaded).__name__}; it must hold sections (run:, data:, …)")
    return cast(dict[str, Any], loaded)


def parse(raw: Mapping[str, Any]) -> tuple[Config | None, list[str]]:
    """A nested mapping (YAML, or the config stored in a checkpoint) -> the config, or None, and all problems."""
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        return None, [_sentence(raw, item) for item in _meant(cast("list[dict[str, Any]]", error.errors()))]
    return config, list(config.problems())


def _meant(errors: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Errors by key. Where text or a list may stand, pydantic tells what is wrong with either: keep one of the two."""
    for item in errors:
        item["loc"] = tuple(part for part in item["loc"] if not (isinstance(part, str) and "[" in part))
    for item in errors:
        others = [other["loc"][: len(item["loc"])] for other in errors if other is not item]
        if item["type"] != "string_type" or item["loc"] not in others:
            yield item


def _apply(raw: dict[str, Any], override: str) -> Iterator[str]:
    """Write one `section.key=value` into the tree; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        yield f"{override!r} is not an override; it must look like section.key=value: for example train.steps=100"
        return
    try:
        is_text = _is_text(key) and text not in ("", "null") and not text.startswith("[")  # a list of sources
        value = text if is_text else yaml.safe_load(text or "null")
    except yaml.YAMLError:
        value = text
    node = raw
    *parents, last = key.split(".")
    for name in parents:
        child = node.get(name)
        if not isinstance(child, dict):
            child = node[name] = {}
        node = cast(dict[str, Any], child)
    node[last] = value


def _is_text(key: str) -> bool:
    """Whether the value of a key is free text, such as a path: then a `#`, a `: ` or a number in it is meant."""
    section: type[BaseModel] = Config
    annotation: Any = None
    for name in key.split("."):
        field = section.model_fields.get(name)
        if field is None:
            return False
        annotation = field.annotation
        section = _section_of(annotation) or section
    kinds = (annotation, *getattr(annotation, "__args__", ()))
    return any(kind is str or str in getattr(kind, "__args__", ()) for kind in kinds)


def _sentence(raw: Mapping[str, Any], item: dict[str, Any]) -> str:
    """One pydantic error as `section.key is VALUE; it must RULE: do REMEDY`."""
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        if "accum" in location[-1]:
            return (
                f"{key} is set; accumulation is derived as global_batch / (micro_batch x ranks): "
                "set train.global_batch and train.micro_batch instead"
            )
        return f"{key} is not a key; the nearest is {_nearest(key)}: use that, or `tubelet config` to list every key"
    if item["type"] == "missing":
        return f"{key} is missing; it has no default: set it in the YAML file or as {key}=VALUE"
    value = item.get("input")
    rule = str(item["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{key} is {value!r}; it must be {rule}: {help_text(key) or 'see `tubelet config`'}"


def _nearest(key: str) -> str:
    """Among the keys and sections of the same depth, the one spelt most like it."""
    depth = key.count(".") + 1
    names = {".".join(name.split(".")[:depth]) for name in keys() if name.count(".") + 1 >= depth}
    return difflib.get_close_matches(key, sorted(names) or list(keys()), n=1, cutoff=0.0)[0]


def keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key as `section.key`, in the order of the file."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from keys(inner, f"{prefix}{name}.")


def help_text(key: str) -> str:
    """The docstring of a key in one line, or an empty string where there is none."""
    section: type[BaseModel] = Config
    description: str | None = None
    for name in key.split("."):
        field = section.model_fields.get(name)
        if field is None:
            return ""
        description = field.description
        section = _section_of(field.annotation) or section
    return " ".join((description or "").split())


def _section_of(annotation: Any) -> type[Section] | None:
    """The section class behind `Section` or `Section | None`; a list of sections is a value."""
    if get_origin(annotation) is tuple:
        return None
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def value_of(config: Config, key: str) -> Any:
    """Value of `section.key`; None where a parent section is absent."""
    node: Any = config
    for name in key.split("."):
        node = getattr(node, name) if node is not None else None
    return node


# C8: what a resumed run may change. A key not named here is refused: it would make another run of it.
FREE_KEYS = (
    "run.dir",
    "data.shards",  # the manifest hash in the cursor decides whether it is the same data
    "data.eval_shards",
    "data.eval_split",
    "data.workers",
    "data.prefetch_steps",
    "data.cache",
    "data.hedge_s",
    "data.decode_deadline_s",
    "data.bad_sample_limit",
    "train.micro_batch",
    "train.init_from",  # only read when a run starts
    "train.deterministic",
    "train.activation_checkpointing",
    "zero.",
    "checkpoint.",
    "eval.",
    "track.",
    "limits.",
)
RECORDED_KEYS = (
    "train.steps",
    "data.mix",  # the cursor refuses to change what has begun
    "schedule.",
    "optim.lr",
    "objective.masked_frame.weight",
    "objective.frame_order.weight",
)


def change_rule(key: str) -> Change:
    """What a resumed run may do with a key: change it freely, change it with --change, or not at all."""
    if key.startswith(FREE_KEYS):
        return "free"
    return "recorded" if key.startswith(RECORDED_KEYS) else "refused"


def differences(saved: Config, wanted: Config) -> Iterator[tuple[str, Any, Any, Change]]:
    """Keys whose values differ: (key, saved value, wanted value, what C8 says)."""
    for key in keys():
        old, new = value_of(saved, key), value_of(wanted, key)
        if old != new:
            yield key, old, new, change_rule(key)
