"""Every file of a checkpoint, damaged in every way; and pickles that do harm, offered to all that open weights."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint
from pretrain.checkpoint import BrokenCheckpoint, Checkpoint, load_parameters, newest
from pretrain.export import model_settings
from pretrain.load import Geometry, load_encoder, load_export, load_state
from pretrain.model.sizes import SIZES
from pretrain.recovery import load_initial
from shards.errors import UserError
from tests.pretrain.saved_run import SavedRun, flip, truncate


@pytest.fixture
def run(tmp_path: Path) -> SavedRun:
    """One start that saved twice."""
    run = SavedRun(tmp_path / "run")
    run.start()
    run.save(100)
    run.save(200)
    return run


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def zero(path: Path) -> None:
    """What some file systems leave after a power cut: the size is right."""
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = [truncate, halve, empty, flip, zero, extend, remove]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"])
def test_every_damage_to_every_file_is_seen(name: str, damage: Callable[[Path], None], run: SavedRun) -> None:
    folders = {step: run.folder / "checkpoints" / f"step-{step:06d}" for step in (100, 200)}
    damage(folders[200] / name)
    found = newest(run.folder)
    assert found is not None
    assert found.facts.step == 100
    is_gone = (name, damage) == ("manifest.json", remove)
    with pytest.raises(UserError, match="has no checkpoint" if is_gone else rf"step-000200 is broken: .*{name}"):
        load_parameters(folders[200])
    assert load_parameters(run.folder)[0]["b.bias"][0] == 1100, "the checkpoint before serves"
    damage(folders[100] / name)
    for load in (newest, load_parameters):
        with pytest.raises(UserError, match=r"none of them is whole:(?s:.*)run\.dir=NEW"):
            load(run.folder)


def test_every_single_bit_of_a_manifest_counts(run: SavedRun) -> None:
    path = run.folder / "checkpoints" / "step-000200" / "manifest.json"
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(BrokenCheckpoint, match=r"manifest\.json"):
            Checkpoint(path.parent)


@pytest.mark.parametrize("text", ["step-000300\n", "", "step-000100\n", "../../../etc\n", "\0", None])
def test_the_pointer_is_for_people(text: str | None, run: SavedRun) -> None:
    """To nothing, to an older one, or gone: what counts is which folders are whole. The next save mends it."""
    pointer = run.folder / "checkpoints" / "latest"
    pointer.unlink() if text is None else pointer.write_text(text)
    found = newest(run.folder)
    assert found is not None
    assert found.facts.step == 200
    run.save(300)
    assert pointer.read_text() == "step-000300\n"


# ------------------------------------------------------------------------------------------ pickles

TOUCHED = "touched"


class Harm:
    """Unpickling this makes a file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / TOUCHED

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self._path,)


def plain_pickle(harm: Harm, path: Path) -> None:
    path.write_bytes(pickle.dumps(harm))


def old_pickle(harm: Harm, path: Path) -> None:
    path.write_bytes(pickle.dumps(harm, protocol=0))


def torch_file(harm: Harm, path: Path) -> None:
    torch.save({"a.weight": harm}, path)


def old_torch_file(harm: Harm, path: Path) -> None:
    torch.save({"a.weight": harm}, path, _use_new_zipfile_serialization=False)


def after_a_header(harm: Harm, path: Path) -> None:
    """A header as safetensors has it, without tensors, and the pickle where the values would be."""
    path.write_bytes((8).to_bytes(8, "little") + b"{}      " + pickle.dumps(harm))


PICKLES = [plain_pickle, old_pickle, torch_file, old_torch_file, after_a_header]


@pytest.mark.parametrize("make", PICKLES)
def test_a_pickle_does_harm_where_it_is_unpickled(make: Callable[[Harm, Path], None], tmp_path: Path) -> None:
    """Else the tests below could not fail."""
    make(Harm(tmp_path), tmp_path / "file")
    if make in (torch_file, old_torch_file):
        torch.load(tmp_path / "file", weights_only=False)
    else:
        data = (tmp_path / "file").read_bytes()
        pickle.loads(data[16:] if make is after_a_header else data)
    assert (tmp_path / TOUCHED).exists()


@pytest.mark.parametrize("make", PICKLES)
def test_no_checkpoint_loader_unpickles(make: Callable[[Harm, Path], None], run: SavedRun, tmp_path: Path) -> None:
    """Size and hash of the file are forged in the manifest, so that its reader is asked."""
    folder = run.folder / "checkpoints" / "step-000200"
    path = folder / "rank-00000.safetensors"
    make(Harm(tmp_path), path)
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": checkpoint.file_sha256(path)}
    del manifest["sha256"]
    manifest["sha256"] = checkpoint._manifest_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = newest(run.folder)
    assert found is not None
    assert found.facts.step == 200
    for load in (
        lambda: found.read("a.weight", "fp32", 0, 3),
        lambda: load_parameters(folder),
        lambda: load_parameters(run.folder),
        lambda: load_initial(torch.nn.Linear(3, 4), run.folder),
    ):
        with pytest.raises((BrokenCheckpoint, UserError), match=r"rank-00000\.safetensors"):
            load()
    assert not (tmp_path / TOUCHED).exists()


@pytest.mark.parametrize("make", PICKLES)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_no_loader_of_exports_unpickles(make: Callable[[Harm, Path], None], name: str, tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    settings = model_settings(Geometry(SIZES["nano"], frames=6, pixels=32, stride=3), "VideoMAEForPreTraining")
    (export / "config.json").write_text(json.dumps(settings))
    make(Harm(tmp_path), export / name)
    for load in (load_state, load_encoder, load_export, lambda path: load_initial(torch.nn.Linear(3, 4), path)):
        with pytest.raises(UserError, match=r"cannot be read|has no \*\.safetensors"):
            load(export)
    assert not (tmp_path / TOUCHED).exists()
