"""The commands `index URL`, `stats` and `forget`: from the command line to the answer."""

from __future__ import annotations

import json
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from launch import cli
from pretrain import checkpoint
from pretrain.checkpoint import Facts
from pretrain.ledger import ROW_DTYPE, Segment, commit_lineage
from shards.errors import UserError
from shards.manifest import load_manifest
from shards.withdraw import withdrawn


def run(*words: object) -> Result:
    result = CliRunner().invoke(cli.app, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def next_command(result: Result) -> list[str]:
    return shlex.split(result.stdout.splitlines()[-1].removeprefix("next: "))


@pytest.fixture
def films(tmp_path: Path, clips: Path) -> Path:
    """The bundled films in a tar made by somebody else."""
    folder = tmp_path / "some tars"
    folder.mkdir()
    with tarfile.open(folder / "films.tar", "w") as tar:
        for path in sorted(clips.iterdir()):
            tar.add(path, path.name)
    return folder


def test_tars_of_others_are_indexed_and_counted(films: Path, tmp_path: Path) -> None:
    result = run("index", films)
    assert "indexed 1 tars" in result.stdout
    assert "train: 3 samples" in result.stdout
    assert next_command(result) == ["tubelet", "stats", str(films)]
    counted = run("stats", films, "--picture", tmp_path / "set.html")
    assert "tars made by others" in counted.stdout
    assert "packets counted 3" in counted.stdout
    assert (tmp_path / "set.html").exists()
    assert next_command(counted) == ["tubelet", "pretrain", "configs/laptop.yaml", f"data.shards={films}"]
    as_json = json.loads(
        run("index", films / "films.tar", "--to", tmp_path / "i", "--probe", "header", "--json").stdout
    )
    assert (as_json["folder"], as_json["num_tars"]) == (str(tmp_path / "i"), 1)
    assert json.loads(run("stats", tmp_path / "i", "--json").stdout)["splits"][0]["num_samples"] == 3


@pytest.fixture
def data(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "data")


def make_run(folder: Path, manifest_hash: str, samples: list[int]) -> Path:
    """A run with a checkpoint of step 5 that consumed these samples in step 3."""
    rows = np.zeros(len(samples), ROW_DTYPE)
    rows["step"], rows["sample"] = 3, samples
    (folder / "ledger").mkdir(parents=True)
    (folder / "ledger" / "a0001-s00000000-r00000.rows").write_bytes(rows.tobytes())
    segment = Segment("a0001-s00000000-r00000.rows", len(rows), "")
    head = commit_lineage(folder / "ledger", 5, 1, [segment], None)
    staging = checkpoint.staging_folder(folder, 5, 1)
    checkpoint.write_part(staging, 0, [("w", "fp32", 0, torch.zeros(1))], [segment])
    config: dict[str, Any] = {"data": {"split": "train"}, "train": {}}
    facts = Facts(5, 5, 1, {"manifest_hash": manifest_hash}, config, {"w": [1]}, {}, [])
    checkpoint.stage(staging, facts, checkpoint.read_parts(staging, 1)[0], head)
    checkpoint.publish(staging, 5)
    return folder


def test_withdrawn_samples_are_written_down_and_traced(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hash_ = load_manifest(str(data)).hash
    make_run(tmp_path / "runs" / "saw", hash_, [0, 2, 2])
    make_run(tmp_path / "runs" / "clean", hash_, [3])
    make_run(tmp_path / "elsewhere" / "other", "x", [2])
    result = run("forget", data, "train-000000002", "train-000000001")
    assert result.exit_code == 0
    assert withdrawn(str(data), "train") == {1, 2}
    text = result.stdout
    assert "2 samples withdrawn" in text
    assert "runs/saw:\n  step-000005: has SEEN 1 of 2, first in step 3 (2 clips)" in text
    assert "runs/clean:\n  step-000005: has seen none of them" in text
    assert "exports" in text
    again = run("forget", data, "train-000000002", "--runs", "runs/clean", "--runs", "elsewhere")
    assert "(1 of them were before)" in again.stdout
    assert "runs/saw" not in again.stdout
    assert "elsewhere/other: was not trained on this data set" in again.stdout
    assert next_command(again) == ["tubelet", "stats", str(data)]
    as_json = json.loads(run("forget", data, "train-000000002", "--json").stdout)
    assert as_json["new"] == []
    assert {row["run"]: row["checkpoints"][0]["num_samples"] for row in as_json["runs"]} == {
        "runs/saw": 1,
        "runs/clean": 0,
    }


def test_nothing_is_written_for_a_mistake(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'train-000009999'"):
        run("forget", data, "train-000000001", "train-000009999")
    with pytest.raises(UserError, match="--runs is nowhere"):
        run("forget", data, "train-000000001", "--runs", "nowhere")
    assert not (data / "withdrawn.jsonl").exists()
    assert "no checkpoint was looked at" in run("forget", data, "train-000000001").stdout
