"""The configuration of a run: typed, frozen, strict, and complete before any process starts.

YAML has one section per component (`sections.py`); a component is handed its own section and nothing else. Unknown
keys are errors that name the nearest key. `load_config` collects every problem and reports them together. No torch is
imported, so that the login node can check a config.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pretrain.rules import problems_of
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
from shards.errors import UserError

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
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"config {file} cannot be read ({reason}); give the path of a YAML file") from error
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"config {file} is not valid YAML: {' '.join(str(error).split())}: mend that line") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(
            f"config {file} holds a {type(loaded).__name__}; it must hold sections (run:, data:, …): "
            "see configs/laptop.yaml"
        )
    return cast(dict[str, Any], loaded)


def parse(raw: Mapping[str, Any]) -> tuple[Config | None, list[str]]:
    """A nested mapping (YAML, or the config stored in a checkpoint) -> the config, or None, and all problems."""
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        return None, [_sentence(raw, item) for item in _meant(cast("list[dict[str, Any]]", error.errors()))]
    return config, list(problems_of(config))


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
