from __future__ import annotations

import io
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pytest

from shards import storage
from shards.errors import SampleError, UserError
from shards.layout import RECORD_DTYPE, group_number
from shards.manifest import build_manifest, load_manifest, sort_labels
from shards.pack import PackSummary
from shards.reader import open_split

Packed = tuple[Path, PackSummary]


@pytest.fixture
def copy(packed: Packed, tmp_path: Path) -> Path:
    """A copy of the packed films that a test may break."""
    shutil.copytree(packed[0], tmp_path / "data")
    return tmp_path / "data"


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def test_every_sample_is_what_its_record_says(packed: Packed) -> None:
    for split in ("train", "val"):
        reader = open_split(str(packed[0]), split)
        assert isinstance(reader.records, np.memmap)
        assert reader.records.dtype == RECORD_DTYPE
        for sample, record in enumerate(reader.records):
            video = reader.read(sample)
            assert (len(video), zlib.crc32(video)) == (record["size"], record["checksum"])
            with av.open(io.BytesIO(video), format="mp4") as container:
                frames = list(container.decode(video=0))
            assert len(frames) == record["num_frames"]
            assert (frames[0].width, frames[0].height) == (record["width"], record["height"])
            assert record["grid"] == 4
            assert 0.1 < record["motion"] < 100
            assert (record["matrix"], record["full_range"], record["level"], record["spare"]) == (0, 0, 0, 0)
            assert record["rate"] in (24.0, 25.0)


def test_labels_and_groups(packed: Packed) -> None:
    train, val = open_split(str(packed[0]), "train"), open_split(str(packed[0]), "val")
    assert {train.label_name(sample) for sample in range(len(train))} == {"bunny", "city"}
    assert {val.label_name(sample) for sample in range(len(val))} == {None}
    assert set(val.records["label"]) == {-1}
    assert set(val.records["group"]) == {group_number("sintel")}


def test_the_manifest_itself_may_be_named(packed: Packed) -> None:
    by_file = open_split(str(packed[0] / "manifest.json"), "train")
    assert by_file.read(0) == open_split(f"{packed[0]}/", "train").read(0)


def test_an_index_made_again_from_the_tars_is_the_same(copy: Path) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    for name in ("manifest.json", "train.index", "val.index"):
        (copy / name).unlink()
    build_manifest(copy, "train")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_reading_from_several_threads(packed: Packed) -> None:
    reader = open_split(str(packed[0]), "train")
    expected = [reader.read(sample) for sample in range(len(reader))]
    fresh = open_split(str(packed[0]), "train")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fresh.read, list(range(len(reader))) * 8)) == expected * 8


def test_a_remote_folder(packed: Packed) -> None:
    filesystem: Any = fsspec.filesystem("memory")
    filesystem.put(f"{packed[0]}/", "/bucket/data/", recursive=True)
    try:
        reader = open_split("memory://bucket/data", "train")
        local = open_split(str(packed[0]), "train")
        for sample in range(len(local)):
            assert reader.read(sample) == local.read(sample)
            assert reader.key(sample) == local.key(sample)
        filesystem.rm("/bucket/data/train-000000.tar")
        with pytest.raises(UserError, match=r"memory://bucket/data/train-000000\.tar is missing"):
            open_split("memory://bucket/data", "train").read(0)
    finally:
        filesystem.rm("/bucket", recursive=True)


def test_numeric_labels_are_sorted_by_value() -> None:
    assert sort_labels({"10", "9", "0"}) == ["0", "9", "10"]
    assert sort_labels({"b", "10", "9"}) == ["10", "9", "b"]


# What is not as it was packed


def test_a_flipped_byte_is_one_bad_sample(copy: Path) -> None:
    reader = open_split(str(copy), "train")
    record = reader.records[1]
    flip(copy / "train-000000.tar", int(record["offset"]) + 100)
    with pytest.raises(SampleError) as caught:
        open_split(str(copy), "train").read(1)
    assert caught.value.reason == "checksum"
    assert "sample 1 in" in str(caught.value)
    assert len(reader.read(0)) == reader.records[0]["size"]


def test_a_cut_tar_is_refused(copy: Path) -> None:
    path = copy / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"train-000000\.tar has \d+ bytes .*; it must have the \d+ that were indexed"):
        open_split(str(copy), "train").read(0)


def test_a_missing_tar_is_refused(copy: Path) -> None:
    (copy / "train-000000.tar").unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar is missing"):
        open_split(str(copy), "train").read(0)


def test_a_tar_that_changes_under_a_run_is_refused(copy: Path) -> None:
    reader = open_split(str(copy), "train")
    reader.read(0)
    flip(copy / "train-000000.tar", int(reader.records[0]["offset"]) + 100)
    with pytest.raises(UserError, match=r"train-000000\.tar was changed while it was in use"):
        reader.read(0)


def test_a_tar_that_is_cut_under_a_run_is_refused(copy: Path) -> None:
    reader = open_split(str(copy), "train")
    last = int(np.flatnonzero(reader.records["shard"] == 0)[-1])
    reader.read(last)
    path = copy / "train-000000.tar"
    path.write_bytes(path.read_bytes()[: int(reader.records[last]["offset"]) + 10])
    with pytest.raises(UserError, match="was changed while it was in use"):
        reader.read(last)


def test_a_tar_that_vanishes_under_a_run_is_refused(copy: Path) -> None:
    reader = open_split(str(copy), "train")
    reader.read(0)
    (copy / "train-000000.tar").unlink()
    with pytest.raises(UserError, match="is missing"):
        reader.read(0)


def test_storage_that_gives_up_is_a_bad_sample(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_split(str(packed[0]), "train")
    reader.read(0)

    def broken(*arguments: Any, **named: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(storage, "read_range", broken)
    with pytest.raises(SampleError) as caught:
        reader.read(0)
    assert caught.value.reason == "io"


@pytest.mark.parametrize("name", ["train.index", "val.index"])
def test_a_changed_index_is_refused(copy: Path, name: str) -> None:
    flip(copy / name, 30)
    with pytest.raises(UserError, match=rf"{name} is not the index its manifest names"):
        open_split(str(copy), name.partition(".")[0])


def test_a_cut_index_is_refused(copy: Path) -> None:
    for size in (0, 10, 48):
        path = copy / "train.index"
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match="is not the index"):
            open_split(str(copy), "train")
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        open_split(str(copy), "train")


def test_no_data_set_there(tmp_path: Path, packed: Packed) -> None:
    with pytest.raises(UserError, match=r"manifest\.json does not exist; a data set is a folder"):
        load_manifest(str(tmp_path))
    with pytest.raises(UserError, match="no split 'test'; it must be one of train, val"):
        open_split(str(packed[0]), "test")
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_manifest(str(tmp_path))
