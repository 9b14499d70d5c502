"""From the config to the opened data set of a run: the same for training, audit and replay."""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.sections import DataConfig, LimitsConfig
from shards.cache import SampleCache
from shards.dataset import DataSet, Reading, Recipe
from shards.errors import UserError
from shards.source import SourceSpec, expand_sources, load_manifests, split_pattern


def open_dataset(data: DataConfig, *, seed: int, limits: LimitsConfig | None = None) -> DataSet:
    """The data set that a run with this config draws from. Raises UserError where it cannot be opened."""
    limits = limits or LimitsConfig()
    cache = data.cache
    recipe = Recipe(
        sources=specs(data),
        split=data.split,
        seed=seed,
        run_length=data.run_length,
        where=data.where,
        mix=tuple((entry.cycle, entry.weights) for entry in data.mix),
    )
    reading = Reading(
        attempt_s=limits.read_attempt_s,
        deadline_s=limits.read_deadline_s,
        hedge_s=data.hedge_s,
        cache=None if cache is None else SampleCache(Path(cache.dir), cache.max_bytes),
        node_folder=None if cache is None else Path(cache.dir) / f"index-{os.getuid()}",
    )
    return DataSet(recipe, reading)


def specs(data: DataConfig) -> tuple[SourceSpec, ...]:
    """The sources as the packages below know them."""
    return tuple(SourceSpec(source.url, source.weight) for source in data.sources)


def held_out(data: DataConfig) -> DataConfig | None:
    """The config of the held-out data, one source and all of it; None where `data.shards` holds nothing out.

    Raises `UserError` where `data.eval_shards` is named and has no such split.
    """
    sources = specs(data) if data.eval_shards is None else (SourceSpec(data.eval_shards),)
    for spec in expand_sources(sources):
        folder, _ = split_pattern(spec.url)  # tars to train on are none of those that are held out
        [manifest] = load_manifests([SourceSpec(folder)])
        if data.eval_split in manifest.splits:
            plain = {"where": "", "mix": (), "run_length": 1}
            return data.model_copy(update={"shards": folder, "split": data.eval_split, **plain})
        if data.eval_shards is not None:
            raise UserError(
                f"data.eval_split is {data.eval_split}; {spec.url} has {', '.join(sorted(manifest.splits))}: "
                "name one of these, or set eval.every_steps=0"
            )
    return None


def check_fit(
    data: DataConfig,
    dataset: DataSet,
    *,
    global_batch: int,
    micro_batch: int,
    world_size: int,
    has_cursor: bool,
) -> None:
    """Raise UserError, naming all problems, for settings that do not fit the data or each other.

    `has_cursor`: for training, which can be resumed, unlike an evaluation.
    """
    problems: list[str] = []
    if dataset.num_samples < 1:
        problems.append(f"split {data.split!r} has no samples; it must have one: pack videos into it")
    elif data.short == "reject" and dataset.max_frames < data.frames:
        problems.append(
            f"data.frames is {data.frames}; the longest video of split {data.split!r} has "
            f"{dataset.max_frames}: take fewer frames, pack longer videos, or set data.short to loop"
        )
    whole_videos = {
        "train.global_batch": (global_batch, has_cursor),  # the cursor counts positions
        "train.micro_batch": (micro_batch, world_size > 1),  # one rank decides about a position
    }
    for name, (value, must_be_whole) in whole_videos.items():
        if value < 1 or (must_be_whole and value % data.clips_per_video):
            problems.append(
                f"{name} is {value}; it must be a positive multiple of data.clips_per_video "
                f"({data.clips_per_video}): the clips of a video stay together"
            )
    if has_cursor and world_size > global_batch:
        problems.append(
            f"train.global_batch is {global_batch}; it must be at least the number of ranks, {world_size}: start fewer"
        )
    if problems:
        raise UserError("\n".join(problems))
