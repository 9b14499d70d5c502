from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain import checkpoint
from pretrain.checkpoint import BrokenCheckpoint, Checkpoint, Facts, candidates, load_parameters, newest
from pretrain.ledger import LineageHead, Segment
from shards.errors import UserError

SHAPES = {"a.weight": [3, 4], "b.bias": [5]}
VALUES = {name: torch.arange(float(torch.Size(shape).numel())) + 1 for name, shape in SHAPES.items()}


def facts(step: int) -> Facts:
    return Facts(
        step=step, optimizer_steps=step, attempt=1, cursor={"position": step}, config={"model": {"size": "nano"}},
        shapes=SHAPES, versions={}, changes=[],
    )  # fmt: skip


def save(run_dir: Path, step: int, cuts: int = 2) -> Path:
    """A checkpoint whose states are cut into `cuts` even slices, one rank each."""
    staging = checkpoint.staging_folder(run_dir, step, 1)
    for rank in range(cuts):
        slices = []
        for name, values in VALUES.items():
            begin, end = len(values) * rank // cuts, len(values) * (rank + 1) // cuts
            slices += [(name, "fp32", begin, values[begin:end])] if end > begin else []
        checkpoint.write_part(staging, rank, slices, [Segment(f"r{rank}", 1, "x")])
    parts, segments = checkpoint.read_parts(staging, cuts)
    assert len(segments) == cuts
    checkpoint.stage(staging, facts(step), parts, LineageHead("l", "h"))
    return checkpoint.publish(staging, step)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.integers(1, 6), data=st.data())
def test_any_slice_reads_back_whatever_wrote_it(
    tmp_path_factory: pytest.TempPathFactory, cuts: int, data: st.DataObject
) -> None:
    opened = Checkpoint(save(tmp_path_factory.mktemp("run"), 1, cuts))
    for name, values in VALUES.items():
        begin = data.draw(st.integers(0, len(values)))
        end = data.draw(st.integers(begin, len(values)))
        assert torch.equal(opened.read(name, "fp32", begin, end - begin), values[begin:end])


def test_a_gap_between_slices_is_never_committed(tmp_path: Path) -> None:
    staging = checkpoint.staging_folder(tmp_path, 1, 1)
    slices = [("a.weight", "fp32", 0, torch.ones(11)), ("b.bias", "fp32", 0, torch.ones(5))]
    checkpoint.write_part(staging, 0, slices)
    with pytest.raises(AssertionError, match=r"a\.weight fp32: 11 of 12"):
        checkpoint.stage(staging, facts(1), checkpoint.read_parts(staging, 1)[0], LineageHead("l", "h"))
    assert candidates(tmp_path) == []


def test_pointer_names_the_newest_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000004.0001.tmp").mkdir()
    (tmp_path / "checkpoints" / "step-000005.0002.tmp").mkdir()
    checkpoint.keep_newest(tmp_path, 2, step=3, attempt=1)
    (tmp_path / "checkpoints" / "step-000005.0002.tmp").rmdir()  # of a newer attempt: not ours to touch
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000002", "step-000003"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000003\n"
    found = newest(tmp_path)
    assert found is not None
    assert found.facts == facts(3)
    earlier = newest(tmp_path, at_most=2)
    assert earlier is not None
    assert earlier.facts.step == 2
    assert newest(tmp_path, at_most=1) is None


def test_later_ones_were_broken_and_do_not_count(tmp_path: Path) -> None:
    """After a fall-back from step 9 to step 1 the run saves steps 2 and 3: both stay, the broken one goes."""
    for step in (1, 2, 3, 9):
        save(tmp_path, step)
    checkpoint.keep_newest(tmp_path, 2, step=3, attempt=1)
    assert [folder.name for folder in candidates(tmp_path)] == ["step-000003", "step-000002"]


def test_a_slice_in_a_file_without_a_hash_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    manifest["slices"]["b.bias"]["fp32"][0][2] = "../other.safetensors"
    del manifest["sha256"]
    manifest["sha256"] = checkpoint._manifest_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BrokenCheckpoint, match="outside its folder"):
        Checkpoint(folder)


def damage_file(folder: Path) -> None:
    path = folder / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"optimizer_steps": 2', '"optimizer_steps": 3'))


def remove_file(folder: Path) -> None:
    (folder / "rank-00000.safetensors").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def truncate_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [damage_file, damage_manifest, remove_file, remove_manifest, truncate_manifest])
def test_damage_is_seen_and_passed_over(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    found = newest(tmp_path)
    assert found is not None
    assert found.facts.step == 1
    damage_file(tmp_path / "checkpoints" / "step-000001")
    with pytest.raises(UserError, match="none of them is whole"):
        newest(tmp_path)


def test_names_outside_the_folder_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../etc/x"] = manifest["files"].pop("rank-00000.safetensors")
    del manifest["sha256"]
    manifest["sha256"] = checkpoint._manifest_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BrokenCheckpoint, match="outside its folder"):
        Checkpoint(folder)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    """A file in torch's own format, with the right size and hash in the manifest, is refused by its reader."""
    folder = save(tmp_path, 1)
    path = folder / "rank-00000.safetensors"
    torch.save({"x": torch.ones(1)}, path)
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": checkpoint.file_sha256(path)}
    del manifest["sha256"]
    manifest["sha256"] = checkpoint._manifest_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BrokenCheckpoint, match="cannot be read"):
        Checkpoint(folder).read("a.weight", "fp32", 0, 3)


def test_parameters_without_deepspeed(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    for path in (tmp_path, folder):
        tensors, config = load_parameters(path)
        assert config == {"model": {"size": "nano"}}
        assert {name: list(tensor.shape) for name, tensor in tensors.items()} == SHAPES
        assert torch.equal(tensors["a.weight"].flatten(), VALUES["a.weight"])
    with pytest.raises(UserError, match="has no checkpoint"):
        load_parameters(tmp_path / "nothing")


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(2, 4), st.integers(1, 50))
def test_one_checkpoint_of_each_span_stays_for_ever(gaps: list[int], count: int, every_steps: int) -> None:
    """Saves come late and at odd steps; deleting as they come, the first of each span that had one is still there."""
    there: list[int] = []
    saved = list(itertools.accumulate(gaps))
    for step in saved:
        there = checkpoint.kept_steps([*there, step], count, every_steps)
        assert there == sorted(there, reverse=True)
        assert there[0] == step
    firsts = {min(s for s in saved if s // every_steps == span) for span in {s // every_steps for s in saved} - {0}}
    assert set(there) == firsts | set(saved[-count:])


def test_without_a_span_only_the_newest_stay() -> None:
    assert checkpoint.kept_steps([10, 30, 20, 40], 2, 0) == [40, 30]
