"""From the config to the data: which folder and split is held out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.data.source import held_out, open_dataset
from pretrain.sections import DataConfig
from shards.layout import MANIFEST_NAME, Manifest

Data = Callable[..., DataConfig]


@pytest.fixture
def two(packed: Path, tmp_path: Path) -> Path:
    """Folders a and b of the same samples; only b holds something out (what it trains on)."""
    for name in ("a", "b"):
        shutil.copytree(packed, tmp_path / name)
    path = tmp_path / "b" / MANIFEST_NAME
    found = Manifest.from_json(path.read_text(), "b")
    splits = {**found.splits, "val": found.splits["train"]}
    path.write_text(Manifest.make(preset=found.preset, labels=found.labels, splits=splits).to_json())
    return tmp_path


def test_of_a_pattern_of_folders_the_first_that_holds_something_out(data: Data, two: Path) -> None:
    found = held_out(data(shards=f"{two}/{{a,b}}"))
    assert found is not None
    assert found.shards == f"{two}/b"
    assert open_dataset(found, seed=1).num_samples
    assert held_out(data(shards=f"{two}/{{a,a}}")) is None


def test_what_is_held_out_is_not_among_the_tars_to_train_on(data: Data, two: Path) -> None:
    found = held_out(data(shards=f"{two}/b/train-{{000000..000001}}.tar"))
    assert found is not None
    assert found.shards == f"{two}/b"
