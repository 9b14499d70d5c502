from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from shards.errors import UserError
from shards.layout import RECORD_DTYPE, Manifest
from shards.pack import PackSummary
from shards.reader import open_split
from shards.verify import verify

Packed = tuple[Path, PackSummary]
TAR = "train-000000.tar"


@pytest.fixture
def copy(packed: Packed, tmp_path: Path) -> Path:
    shutil.copytree(packed[0], tmp_path / "data")
    return tmp_path / "data"


def said(folder: Path) -> list[str]:
    return [str(problem) for problem in verify(str(folder))]


def test_a_sound_data_set_has_no_problems(packed: Packed) -> None:
    seen: list[str] = []
    assert verify(str(packed[0]), seen.append) == []
    shards = [shard.name for split in packed[1].manifest.splits.values() for shard in split.shards]
    assert sorted(seen) == sorted(shards)


def test_a_flipped_byte_in_a_video_is_found_and_named(copy: Path) -> None:
    reader = open_split(str(copy), "train")
    data = bytearray((copy / TAR).read_bytes())
    data[int(reader.records[1]["offset"]) + 50] ^= 1
    (copy / TAR).write_bytes(data)
    problems = said(copy)
    assert len(problems) == 2
    assert "sha256 differs" in problems[0]
    assert problems[1].startswith(f"{TAR}: train-000000001.mp4: checksum")


def test_a_flipped_byte_in_a_description_is_found(copy: Path) -> None:
    data = bytearray((copy / TAR).read_bytes())
    data[data.index(b'"full_range"') + 2] ^= 1
    (copy / TAR).write_bytes(data)
    assert said(copy) == [f"{TAR}: its bytes are not those that were packed (sha256 differs)"]


def test_a_cut_tar_is_found(copy: Path) -> None:
    (copy / TAR).write_bytes((copy / TAR).read_bytes()[:-512])
    (problem,) = said(copy)
    assert problem.startswith(f"{TAR}: cut off")


def test_a_longer_tar_is_found(copy: Path) -> None:
    with (copy / TAR).open("ab") as file:
        file.write(bytes(512))
    assert said(copy)[0].startswith(f"{TAR}: longer")


def test_a_missing_tar_is_found_and_the_others_are_checked(copy: Path) -> None:
    (copy / TAR).unlink()
    (copy / "val-000000.tar").write_bytes(b"x")
    problems = said(copy)
    assert problems[0].startswith(f"{TAR}: cannot be read")
    assert problems[1].startswith("val-000000.tar: cut off")


def test_a_tar_written_again_with_other_members_is_found(copy: Path) -> None:
    size = (copy / TAR).stat().st_size
    with tarfile.open(copy / TAR, "w") as tar:
        for name in ("a.mp4", "a.json"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"1234"))
    with (copy / TAR).open("ab") as file:
        file.write(bytes(size - file.tell()))
    problems = said(copy)
    assert any("sha256 differs" in problem for problem in problems)
    assert any("a.mp4 is not in the index" in problem for problem in problems)
    assert any("sample 0 has no member at byte" in problem for problem in problems)


def test_bytes_that_are_no_tar_are_found(copy: Path) -> None:
    (copy / TAR).write_bytes(b"\x01" * (copy / TAR).stat().st_size)
    assert any("is no readable tar" in problem for problem in said(copy))


def test_a_changed_index_is_found(copy: Path) -> None:
    data = bytearray((copy / "val.index").read_bytes())
    data[0] ^= 1
    (copy / "val.index").write_bytes(data)
    (problem,) = said(copy)
    assert problem.startswith("val.index: ")


def test_an_index_that_contradicts_its_manifest_is_found(copy: Path) -> None:
    """Even with matching hashes: one row too few, with labels and shards that do not exist."""
    from dataclasses import replace
    from hashlib import sha256

    manifest = Manifest.from_json((copy / "manifest.json").read_text(), "here")
    records = np.fromfile(copy / "train.index", RECORD_DTYPE)[:-1]
    records["label"][0], records["shard"][1] = 99, 99
    records.tofile(copy / "train.index")
    split = replace(manifest.splits["train"], num_samples=6, sha256=sha256(records.tobytes()).hexdigest())
    made = Manifest.make(preset="train", labels=manifest.labels, splits={**manifest.splits, "train": split})
    (copy / "manifest.json").write_text(made.to_json())
    text = "\n".join(said(copy))
    assert "names a tar that the manifest does not have" in text
    assert "names a label that the manifest does not have" in text
    assert "is not in the index" in text


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        verify(str(tmp_path))


def test_a_file_that_is_no_manifest_is_called_so(copy: Path) -> None:
    (copy / "notes.json").write_text("{}")
    for name in (TAR, "train.index", "notes.json"):
        with pytest.raises(UserError, match=rf"{name} is a file that is no manifest\.json; .*give one of the two"):
            verify(str(copy / name))
    assert verify(str(copy / "manifest.json")) == []
    with pytest.raises(UserError, match="does not exist"):
        verify(str(copy / "gone.tar"))
