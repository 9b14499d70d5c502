"""The configuration of a run: typed, frozen, strict, and complete before any process starts.

YAML has one section per component (`sections.py`); a component is handed its own section and nothing else. Unknown
keys are errors that name the nearest key. `load_config` collects every problem and reports them together. No torch is
imported, so that the login node can check a config.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pretrain.geometry import allowed_counts
from pretrain.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    FailureConfig,
    LaunchConfig,
    LimitsConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    Section,
    TrackConfig,
    TrainConfig,
    ZeroConfig,
)
from shards.brace import is_pattern
from shards.errors import UserError

TUBELET_FRAMES = 2
PATCH_PIXELS = 16

Change = Literal["free", "recorded", "refused"]


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
    failure: FailureConfig = FailureConfig()
    eval: EvalConfig = EvalConfig()
    track: TrackConfig = TrackConfig()
    launch: LaunchConfig = LaunchConfig()
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
        keep, every = self.checkpoint.keep_every_steps, self.checkpoint.every_steps
        if keep % every:
            yield (
                f"checkpoint.keep_every_steps is {keep}; it must be a multiple of checkpoint.every_steps ({every}): "
                f"use {-(-keep // every) * every}"
            )
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
        nested = ("read_attempt_s", "read_deadline_s", "wait_limit_s", "step_limit_s", "collective_timeout_s")
        sections = ("setup_limit_s", "first_step_limit_s", "save_limit_s", "eval_limit_s")
        pairs = [*itertools.pairwise(nested), *((section, "collective_timeout_s") for section in sections)]
        for inner, outer in pairs:
            inner_s, outer_s = getattr(self.limits, inner), getattr(self.limits, outer)
            if inner_s is not None and inner_s >= outer_s:
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
    "failure.",
    "eval.",
    "track.",
    "launch.",
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
