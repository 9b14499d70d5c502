"""A damaged data set becomes usable again: what is good stays, what is not is named, nothing else changes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.content import read_content
from shards.errors import UserError
from shards.layout import MANIFEST_NAME
from shards.manifest import load_manifest
from shards.pack import PackOptions, PackSummary, pack
from shards.reader import SplitReader, open_split
from shards.rejected import Rejection, read_rejected
from shards.repair import repair
from shards.verify import verify
from shards.withdraw import Withdrawal, withdrawn

Packed = tuple[Path, PackSummary]
TAR = "train-000000.tar"


@pytest.fixture
def copy(packed: Packed, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed[0], tmp_path / "data"))


def videos(reader: SplitReader) -> list[tuple[bytes, str | None]]:
    return [(reader.read(number), reader.label_name(number)) for number in range(len(reader))]


def flip(folder: Path, row: int) -> int:
    """Damage one sample; returns its offset."""
    offset = int(open_split(str(folder), "train").records[row]["offset"])
    data = bytearray((folder / TAR).read_bytes())
    data[offset + 50] ^= 1
    (folder / TAR).write_bytes(data)
    return offset


def test_a_sound_data_set_is_left_alone(copy: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.iterdir()}
    done = repair(str(copy))
    assert done.lines() == ["nothing to repair"]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.iterdir()} == before


def test_a_damaged_sample_leaves_the_index(copy: Path, packed: Packed) -> None:
    expected = videos(open_split(str(packed[0]), "train"))
    offset = flip(copy, 1)
    tars = {path: path.read_bytes() for path in copy.glob("*.tar")}
    old = load_manifest(str(copy))
    done = repair(str(copy))
    assert videos(open_split(str(copy), "train")) == expected[:1] + expected[2:]
    assert verify(str(copy)) == []
    assert {path: path.read_bytes() for path in copy.glob("*.tar")} == tars
    assert (copy / "manifest.json.before-repair").read_text() == old.to_json()
    assert load_manifest(str(copy)).hash == done.after.hash != old.hash
    (row,) = read_rejected(str(copy))
    assert (row.reason, row.samples, row.path) == ("lost", ((TAR, offset),), _source(packed[0], TAR, offset))
    text = "\n".join(done.lines())
    assert "train: 6 of 7 samples are left" in text
    assert "runs that began on it are refused from now on" in text
    assert repair(str(copy)).lines() == ["nothing to repair"]


def _source(folder: Path, tar: str, offset: int) -> str:
    rows = [json.loads(line) for line in (folder / "content.jsonl").read_text().splitlines()]
    return next(row["source"] for row in rows if [tar, offset] in row["samples"])


def test_a_cut_tar_keeps_its_beginning(copy: Path, packed: Packed) -> None:
    reader = open_split(str(packed[0]), "train")
    last = int(np.flatnonzero(reader.records["shard"] == 0)[-1])
    expected = videos(reader)
    with (copy / TAR).open("r+b") as file:
        file.truncate(int(reader.records[last]["offset"]) + 10)
    repair(str(copy))
    assert videos(open_split(str(copy), "train")) == expected[:last] + expected[last + 1 :]
    assert verify(str(copy)) == []


def test_a_missing_tar_leaves_the_manifest(copy: Path, packed: Packed) -> None:
    reader = open_split(str(packed[0]), "train")
    expected = [video for video, row in zip(videos(reader), reader.records, strict=True) if row["shard"] != 0]
    (copy / TAR).unlink()
    done = repair(str(copy))
    assert TAR not in done.after.file_names()
    assert videos(open_split(str(copy), "train")) == expected
    assert verify(str(copy)) == []
    assert len(read_rejected(str(copy))) == 7 - len(expected)


def test_a_split_that_is_gone(copy: Path) -> None:
    for path in copy.glob("val-*.tar"):
        path.unlink()
    done = repair(str(copy))
    assert set(done.after.splits) == {"train"}
    assert "  val: 0 of 4 samples are left" in done.lines()
    assert verify(str(copy)) == []


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x" * 480)])
def test_a_lost_index_is_made_again(copy: Path, packed: Packed, spoil: Callable[[Path], None]) -> None:
    """The very same data set: runs go on."""
    before = (copy / "train.index").read_bytes()
    spoil(copy / "train.index")
    done = repair(str(copy))
    assert done.rebuilt == ("train",)
    assert done.lines() == ["the index of train was made again from the tars", "every sample is as it was packed"]
    assert (copy / "train.index").read_bytes() == before
    assert load_manifest(str(copy)) == packed[1].manifest
    assert not (copy / "manifest.json.before-repair").exists()


def test_a_lost_index_and_a_damaged_tar(copy: Path, packed: Packed) -> None:
    """Without its row nothing proves a sample of that tar; the other tars stay."""
    reader = open_split(str(packed[0]), "train")
    expected = [video for video, row in zip(videos(reader), reader.records, strict=True) if row["shard"] != 0]
    flip(copy, 1)
    (copy / "train.index").unlink()
    repair(str(copy))
    assert videos(open_split(str(copy), "train")) == expected
    assert verify(str(copy)) == []
    assert len(read_rejected(str(copy))) == 7 - len(expected)


def test_withdrawn_samples_stay_withdrawn(copy: Path) -> None:
    keys = [open_split(str(copy), "train").key(number) for number in range(7)]
    rows = [Withdrawal("train", number, keys[number], "2026-01-01T00:00:00Z") for number in (0, 1, 4)]
    (copy / "withdrawn.jsonl").write_text("".join(f"{row.to_json()}\n" for row in rows))
    flip(copy, 1)
    repair(str(copy))
    reader = open_split(str(copy), "train")
    numbers = withdrawn(str(copy), "train")
    assert numbers == {0, 3}
    assert {reader.key(number) for number in numbers} == {keys[0], keys[4]}


@pytest.mark.parametrize("has_index", [True, False])
def test_what_was_withdrawn_does_not_come_back(clips: Path, copy: Path, has_index: bool) -> None:
    """Lost files may be packed again, but not one that somebody asked to have removed."""
    reader = open_split(str(copy), "train")
    source = _source(copy, TAR, int(reader.records[0]["offset"]))
    rows = [row for row in read_content(str(copy)) or () if row.split == "train"]
    tars = [shard.name for shard in reader.split.shards]
    places = {(tars[row["shard"]], int(row["offset"])): number for number, row in enumerate(reader.records)}
    gone = [places[place] for row in rows if row.source == source for place in row.samples]
    text = "".join(f"{Withdrawal('train', n, reader.key(n), '2026-01-01T00:00:00Z').to_json()}\n" for n in gone)
    (copy / "withdrawn.jsonl").write_text(text)
    (copy / TAR).unlink()
    if not has_index:
        (copy / "train.index").unlink()
    done = repair(str(copy))
    assert {row.reason for row in done.lost if row.path == source} == {"withdrawn"}
    options = PackOptions(short_side=96, max_frames=64, min_frames=8, workers=2)
    if has_index:
        pack(clips, copy, options, append=True)
        (part,) = copy.glob("parts/*/content.jsonl")
        packed_again = {row.source for row in read_content(str(part.parent)) or ()}
        assert packed_again, "others that were lost come again"
        assert source not in packed_again
    assert verify(str(copy)) == []


def test_a_repaired_data_set_with_a_damaged_description_loses_its_index(copy: Path) -> None:
    data = (copy / TAR).read_bytes()
    (copy / TAR).write_bytes(re.sub(rb'\{"(?=[a-z_]+": )', b"{{", data, count=1))
    (copy / repair(str(copy)).after.splits["train"].index).unlink()
    assert any("is damaged" in row.detail for row in repair(str(copy)).lost)
    assert verify(str(copy)) == []


def test_a_repaired_data_set_loses_its_index(copy: Path) -> None:
    """The tar that is cut is as the manifest says since then, but no tar that can be read to its end."""
    keep = int(open_split(str(copy), "train").records[2]["offset"])
    (copy / TAR).write_bytes((copy / TAR).read_bytes()[: keep + 100])
    repair(str(copy))
    (copy / repair(str(copy)).after.splits["train"].index).unlink()
    done = repair(str(copy))
    assert TAR not in done.after.file_names()
    assert any("is cut off" in row.detail for row in done.lost)
    assert verify(str(copy)) == []


def test_nothing_left(copy: Path) -> None:
    for path in copy.glob("*.tar"):
        path.unlink()
    manifest = (copy / MANIFEST_NAME).read_bytes()
    with pytest.raises(UserError, match=r"no usable sample left; .*nothing was changed"):
        repair(str(copy))
    assert (copy / MANIFEST_NAME).read_bytes() == manifest


def test_lost_files_may_be_packed_again(clips: Path, copy: Path) -> None:
    for path in copy.glob("val-*.tar"):
        path.unlink()
    repair(str(copy))
    assert {row.path for row in read_rejected(str(copy))} == {"sintel_320x180_h264.mp4"}
    before = load_manifest(str(copy))
    summary = pack(clips, copy, PackOptions(short_side=64, max_frames=48, workers=2), append=True)
    assert summary.rejected == {"duplicate": 2}, "the other two are there still"
    assert load_manifest(str(copy)).history == (before.version(),)
    assert verify(str(copy)) == []


def test_a_kill_before_the_manifest_changes_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shards import storage

    flip(copy, 1)
    write = storage.write_bytes

    def killed(url: str, data: bytes, **limits: float) -> None:
        if url.endswith(MANIFEST_NAME):
            raise KeyboardInterrupt
        write(url, data, **limits)

    old = load_manifest(str(copy))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            repair(str(copy))
    assert load_manifest(str(copy)) == old
    repair(str(copy))
    assert verify(str(copy)) == []
    assert len(read_rejected(str(copy))) == 1


def test_a_damaged_list_of_rejections_is_named(copy: Path) -> None:
    (copy / "rejected.jsonl").write_text('{"path": "a", "reason": "x", "detail": ""}\n{"path"\n')
    with pytest.raises(UserError, match=r"rejected\.jsonl line 2 is '\{\"path\"'; it must be a JSON row"):
        repair(str(copy))
    row = Rejection("a", "b", "c", "p", (("t", 1),))
    (copy / "rejected.jsonl").write_text(row.to_json() + "\n")
    assert read_rejected(str(copy)) == [row]
