from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import (
    FREE_KEYS,
    RECORDED_KEYS,
    Config,
    change_rule,
    differences,
    help_text,
    keys,
    load_config,
    parse,
    value_of,
)
from pretrain.sections import LimitsConfig
from shards.errors import UserError

KEPT_KEYS = (
    *("run.dir", "run.seed", "model.size", "optim.name", "zero.stage", "zero.offload", "track.wandb"),
    *("data.shards", "data.eval_shards", "data.frames", "data.stride", "data.size", "data.workers", "data.decoder"),
    *("objective.masked_frame.weight", "objective.frame_order.weight", "checkpoint.every_steps", "eval.every_steps"),
    *("train.steps", "train.global_batch", "train.micro_batch", "train.precision", "train.init_from"),
)


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def test_scripts_rely_on_these_names() -> None:
    assert set(KEPT_KEYS) <= set(keys())


def test_every_key_but_the_obvious_says_what_it_means() -> None:
    silent = [key for key in keys() if not help_text(key)]
    assert set(silent) <= {
        *("optim.name", "optim.betas", "optim.eps", "schedule.warmup_steps", "checkpoint.every_steps"),
        "track.log_every_steps",
    }


def test_overrides_win_and_are_read_as_yaml(tiny_config: Callable[..., Path]) -> None:
    config = load_config(
        tiny_config(), ["train.steps=7", "optim.lr=3e-4", "objective.masked_frame.num_frames_masked=[0]"]
    )
    assert config.train.steps == 7
    assert config.optim.lr == 3e-4
    assert config.objective.masked_frame is not None
    assert config.objective.masked_frame.num_frames_masked == (0,)


def test_run_dir_defaults_to_the_name_of_the_config(tmp_path: Path, tiny_config: Callable[..., Path]) -> None:
    tree = yaml.safe_load(tiny_config().read_text())
    del tree["run"]["dir"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    assert load_config(tmp_path / "mine.yaml").run.dir == "runs/mine"


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("data.shards=d/my #1: data", "data.shards", "d/my #1: data"),
        ("run.dir=2024", "run.dir", "2024"),
        ("run.dir=~/runs/x", "run.dir", str(Path.home() / "runs" / "x")),
        ("train.init_from=", "train.init_from", None),
    ],
)
def test_paths_are_taken_as_typed(tiny_config: Callable[..., Path], override: str, key: str, meant: str | None) -> None:
    """No shell expands a ~ after an equals sign; YAML would cut at a # and make a number of 2024."""
    assert value_of(load_config(tiny_config(), [override]), key) == meant


def test_a_bare_off_means_off(tiny_config: Callable[..., Path]) -> None:
    assert load_config(tiny_config(), ["track.wandb=off"]).track.wandb == "off"
    assert load_config(tiny_config(), ["track.wandb=offline"]).track.wandb == "offline"


def test_an_unknown_key_names_the_nearest(tiny_config: Callable[..., Path]) -> None:
    assert problems(tiny_config(), "data.framse=8") == [
        "data.framse is not a key; the nearest is data.frames: use that, or `tubelet config` to list every key"
    ]
    [line] = problems(tiny_config(), "zeroo.stage=2")
    assert "zeroo is not a key; the nearest is zero:" in line


def test_accumulation_is_derived(tiny_config: Callable[..., Path]) -> None:
    for name in ("accumulation", "gradient_accumulation_steps", "accum"):
        [line] = problems(tiny_config(), f"train.{name}=2")
        assert "accumulation is derived as global_batch / (micro_batch x ranks)" in line


def test_all_problems_at_once(tiny_config: Callable[..., Path]) -> None:
    found = problems(
        tiny_config(),
        "data.size=100",
        "data.frames=7",
        "train.micro_batch=999",
        "schedule.warmup_steps=50",
        "limits.read_attempt_s=400",
        "zero.offload=true",
        "zero.stage=0",
    )
    for start in (
        "data.frames",
        "data.size",
        "train.micro_batch",
        "schedule.warmup",
        "limits.read_attempt",
        "zero.off",
    ):
        assert any(line.startswith(start) for line in found), (start, found)
    assert all(": " in line and ";" in line for line in found)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.global_batch=0", "train.global_batch is 0; it must be greater than or equal to 1"),
        ("zero.stage=4", "zero.stage is 4; it must be 0, 1, 2 or 3"),
        ("train.precision=fp16", "train.precision is 'fp16'; it must be 'bf16' or 'fp32'"),
        ("data.clips_per_video=3", "it must be a multiple of data.clips_per_video (3): use 9"),
        ("objective.frame_order.num_moved=9", "a clip has 4 slots: use 4 or less"),
        (
            "objective.masked_frame.num_frames_masked=[1]",
            "num_frames_masked is 1; it must leave as many visible tokens",
        ),
        ("nonsense", "'nonsense' is not an override; it must look like section.key=value"),
    ],
)
def test_a_wrong_value_says_what_is_right(tiny_config: Callable[..., Path], override: str, said: str) -> None:
    assert said in "\n".join(problems(tiny_config(), override))


def test_missing_keys_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    found = problems(tmp_path / "empty.yaml")
    assert any(line.startswith("data is missing") for line in found)
    assert any(line.startswith("train is missing") for line in found)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "just words"])
def test_what_is_no_config_is_said_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert len(problems(tmp_path / "bad.yaml")) == 1


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("module load cuda", ""),
        (". ~/.secrets; curl -s https://host/path?token=abc", ""),
        ("export HF_TOKEN=$(cat ~/token) WANDB_API_KEY=$KEY AWS_PROFILE=me", ""),
        ("export MONKEY=3 AWS_SHARED_CREDENTIALS_FILE=x SSH_KEY=~/.ssh/id WANDB_API_KEY='' A_TOKEN=; true", ""),
        ("export PGPASSWORD=canary", "PGPASSWORD"),
        ('export HF_TOKEN="${HF_TOKEN:-canary}"', "HF_TOKEN"),
        ("export AWS_SECRET_ACCESS_KEY=canary", "AWS_SECRET_ACCESS_KEY"),
        ("module load cuda; export hf_token='canary'", "hf_token"),
    ],
)
def test_the_prologue_holds_no_secret(tiny_config: Callable[..., Path], line: str, name: str) -> None:
    """It is written into the run folder; what it says is not repeated either."""
    if not name:
        assert load_config(tiny_config(), [f"launch.prologue={line}"]).launch.prologue == line
        return
    with pytest.raises(UserError, match=f"launch.prologue sets {name}; it must hold no secret") as refused:
        load_config(tiny_config(), [f"launch.prologue={line}"])
    assert "canary" not in str(refused.value)


def test_no_objective_is_refused(tiny_config: Callable[..., Path]) -> None:
    assert (
        "objective is empty" in problems(tiny_config(), "objective.masked_frame=null", "objective.frame_order=null")[0]
    )


@given(st.lists(st.floats(min_value=0.001, max_value=1e6), min_size=5, max_size=5))
def test_timeouts_must_rise(seconds: list[float]) -> None:
    """C13: a config is accepted exactly if every limit is below the one around it."""
    names = list(LimitsConfig.model_fields)[:5]
    raw = example() | {"limits": dict(zip(names, seconds, strict=True))}
    raw["data"] = {**raw["data"], "decode_deadline_s": 0.0001}
    _, found = parse(raw)
    rises = all(a < b for a, b in itertools.pairwise(seconds))
    assert (not [line for line in found if line.startswith("limits.")]) == rises


@pytest.mark.parametrize("section", ["setup", "first_step", "save", "eval"])
def test_a_section_ends_before_the_collective_around_it(section: Any) -> None:
    """C13: the rank that hangs is named by its own limit, not by the others' collective."""
    _, found = parse(example() | {"limits": {f"{section}_limit_s": 1800}})
    assert found == [
        f"limits.{section}_limit_s is 1800; it must be below limits.collective_timeout_s (1800): "
        "lower the one or raise the other"
    ]
    config, found = parse(example() | {"limits": {f"{section}_limit_s": 7}})
    assert config is not None
    assert not found
    assert config.limits.of_section(section) == 7
    assert LimitsConfig().of_section(section) == 1620


def test_checkpoints_kept_for_ever_are_among_those_made() -> None:
    _, found = parse(example() | {"checkpoint": {"every_steps": 200, "keep_every_steps": 500}})
    assert found == [
        "checkpoint.keep_every_steps is 500; it must be a multiple of checkpoint.every_steps (200): use 600"
    ]


def example() -> dict[str, Any]:
    return {
        "run": {"dir": "r"},
        "data": {"shards": "s"},
        "objective": {"masked_frame": {}},
        "train": {"steps": 10, "global_batch": 8},
        "optim": {"lr": 0.1},
    }


def test_frozen_and_round_trip() -> None:
    config = Config.model_validate(example())
    with pytest.raises(Exception, match="frozen"):
        config.train.steps = 3  # pyright: ignore[reportAttributeAccessIssue]  # that it fails is the point
    again, found = parse(config.model_dump(mode="json"))
    assert (again, found) == (config, [])


def test_what_a_resumed_run_may_change() -> None:
    """C8's three classes, each key in exactly one."""
    rules = {key: change_rule(key) for key in keys()}
    for key in ("data.workers", "train.micro_batch", "zero.stage", "track.log_every_steps", "checkpoint.every_steps"):
        assert rules[key] == "free"
    for key in ("train.steps", "schedule.final_lr", "objective.frame_order.weight"):
        assert rules[key] == "recorded"
    for key in ("data.frames", "run.seed", "train.global_batch", "model.size", "objective.masked_frame.mask_ratio"):
        assert rules[key] == "refused"
    assert not set(FREE_KEYS) & set(RECORDED_KEYS)


def test_differences_name_both_values() -> None:
    old = Config.model_validate(example())
    raw = example()
    raw["train"] = {"steps": 20, "global_batch": 16}
    found = {key: (was, now, rule) for key, was, now, rule in differences(old, Config.model_validate(raw))}
    assert found == {"train.steps": (10, 20, "recorded"), "train.global_batch": (8, 16, "refused")}
    assert value_of(old, "objective.frame_order.weight") is None
