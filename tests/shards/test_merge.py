"""Slices and appended parts become one data set, whose samples never change their numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import staging, storage
from shards.errors import UserError
from shards.layout import Manifest, Version
from shards.manifest import load_manifest
from shards.merge import merge
from shards.pack import PackOptions, pack
from shards.reader import open_split
from shards.slice import Slice, missing_slices
from shards.sources import Source
from shards.splits import choose_splits, leaking
from shards.verify import verify

MakeVideo = Callable[..., Path]
SMALL = PackOptions(short_side=32, max_frames=16, min_frames=8, workers=2, val_fraction=0.3)
NUM_SLICES = 3


@pytest.fixture(scope="session")
def films(make_video: MakeVideo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine small films of two classes, one of which is there twice, and one file that is none."""
    folder = tmp_path_factory.mktemp("films") / "src"
    for number in range(9):
        make_video(folder / "ab"[number % 2] / f"{number}.mp4", 20 + number, width=32, height=32)
    shutil.copy(folder / "a" / "0.mp4", folder / "b" / "0again.mp4")
    (folder / "b" / "broken.mp4").write_text("hello")
    return folder


@pytest.fixture(scope="session")
def slices(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The films in three slices, not joined. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("slices") / "data"
    for number in range(NUM_SLICES):
        pack(films, folder, SMALL, share=Slice(number, NUM_SLICES))
    return folder


@pytest.fixture(scope="session")
def joined(slices: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joined") / "data"
    shutil.copytree(slices, folder)
    merge(str(folder))
    return folder


@pytest.fixture
def copy(joined: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(joined, tmp_path / "data"))


def samples(folder: Path) -> dict[str, dict[str, tuple[bytes, str | None]]]:
    """Split -> key -> (bytes, label)"""
    found: dict[str, dict[str, tuple[bytes, str | None]]] = {}
    for split in load_manifest(str(folder)).splits:
        reader = open_split(str(folder), split)
        rows = {reader.key(n): (reader.read(n), reader.label_name(n)) for n in range(len(reader))}
        assert len(rows) == len(reader), "keys are unique over parts"
        found[split] = rows
    return found


def rejected(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


# Slices


def test_slices_hold_what_one_packing_holds(films: Path, joined: Path, tmp_path: Path) -> None:
    pack(films, tmp_path / "one", SMALL)
    one, many = samples(tmp_path / "one"), samples(joined)
    assert one.keys() == many.keys() == {"train", "val"}
    for split in one:
        assert sorted(one[split].values()) == sorted(many[split].values())
    assert load_manifest(str(joined)).labels == load_manifest(str(tmp_path / "one")).labels == ("a", "b")
    assert verify(str(joined)) == []


def test_a_file_that_is_there_twice_is_left_out_over_slices(joined: Path) -> None:
    rows = {row["path"]: row for row in rejected(joined)}
    assert rows["b/broken.mp4"]["reason"] == "format"
    again = rows["b/0again.mp4"]
    assert (again["reason"], len(again["samples"])) == ("duplicate", 2)
    assert again["detail"].startswith("has the same bytes as a/0.mp4 in 000")
    listed = sum(split.num_samples for split in load_manifest(str(joined)).splits.values())
    packed = sum(
        split.num_samples
        for part in (joined / "parts").glob("*/manifest.json")
        for split in load_manifest(str(part)).splits.values()
    )
    assert packed - listed == 2


def test_it_is_said_when_the_joined_slices_hold_nothing_out(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 20, width=32, height=32)
    options = replace(SMALL, val_fraction=0.0)
    assert "nothing is held out" not in "\n".join(
        pack(tmp_path / "src", tmp_path / "data", options, share=Slice(0, 1)).lines()
    )
    assert "nothing is held out, so training will not evaluate" in "\n".join(merge(str(tmp_path / "data")).lines())


def test_a_slice_that_is_done_says_so(films: Path, slices: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in slices.rglob("*")}
    summary = pack(films, slices, SMALL, share=Slice(1, NUM_SLICES))
    assert summary.lines()[0].startswith("slice 1/3 is packed already")
    assert {path: path.stat().st_mtime_ns for path in slices.rglob("*")} == before


def test_joining_again_changes_nothing(copy: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    summary = merge(str(copy))
    assert summary.parts == ()
    assert summary.lines()[0] == "nothing new to join"
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_missing_slices_are_named(slices: Path, tmp_path: Path) -> None:
    shutil.copytree(slices, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "parts" / "0001-of-0003")
    with pytest.raises(UserError, match="lacks the slices 1/3; all must be packed before they are joined: pack them"):
        merge(str(tmp_path / "data"))
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert missing_slices(["0000-of-0003", "more-x"]) == [Slice(1, 3), Slice(2, 3)]
    with pytest.raises(UserError, match="slices of 2 and of 3"):
        missing_slices(["0000-of-0003", "0001-of-0002"])


def test_nothing_to_join(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no packed part"):
        merge(str(tmp_path))


def test_more_slices_than_files(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)
    for number in range(3):
        pack(tmp_path / "src", tmp_path / "data", SMALL, share=Slice(number, 3))
    assert sum(split.num_samples for split in merge(str(tmp_path / "data")).manifest.splits.values()) == 1


@pytest.mark.parametrize(
    ("options", "count", "words"),
    [
        (replace(SMALL, short_side=48), 3, r"slice 0/3 differs .* in short_side \(32 there, 48 here\)"),
        (SMALL, 4, r"slice 0/4 differs .* in slices \(3 there, 4 here\)"),
    ],
)
def test_slices_must_agree(films: Path, slices: Path, options: PackOptions, count: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        pack(films, slices, options, share=Slice(0, count))


def test_slices_must_see_the_same_files(films: Path, slices: Path, tmp_path: Path) -> None:
    shutil.copytree(films, tmp_path / "src")
    (tmp_path / "src" / "new.mp4").touch()
    with pytest.raises(UserError, match=r"in files \(11 there, 12 here\)"):
        pack(tmp_path / "src", slices, SMALL, share=Slice(0, 3))
    (tmp_path / "src" / "new.mp4").rename(tmp_path / "src" / "x.mp4")
    (tmp_path / "src" / "b" / "broken.mp4").unlink()
    with pytest.raises(UserError, match="in the list of files; all must be packed alike"):
        pack(tmp_path / "src", slices, SMALL, share=Slice(0, 3))


def test_slices_do_not_go_where_something_is(films: Path, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(UserError, match="exists and is not empty; slices begin a data set"):
        pack(films, tmp_path / "notes", SMALL, share=Slice(0, 3))
    with pytest.raises(UserError, match="exists and is not empty"):
        pack(films, copy, SMALL)


def test_slices_begin_at_the_same_moment(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another slice writes the plan just after this one has looked for it."""
    folder, plan = tmp_path / "data", "parts/plan.json"
    pack(films, folder, SMALL, share=Slice(0, 3))
    exists = storage.exists
    seen: list[str] = []

    def not_yet(url: str) -> bool:
        seen.append(url)
        return exists(url) and not (url.endswith(plan) and sum(other.endswith(plan) for other in seen) == 1)

    monkeypatch.setattr(storage, "exists", not_yet)
    pack(films, folder, SMALL, share=Slice(1, 3))
    assert {path.name for path in (folder / "parts").iterdir()} == {"plan.json", "0000-of-0003", "0001-of-0003"}


def test_a_damaged_plan_is_made_again_once_it_is_removed(films: Path, slices: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(slices, folder)
    plan = folder / "parts" / "plan.json"
    text = plan.read_text()
    plan.write_text(text[:50])
    with pytest.raises(UserError, match=r"is damaged .*; remove it"):
        pack(films, folder, SMALL, share=Slice(0, 3))
    plan.unlink()
    assert pack(films, folder, SMALL, share=Slice(0, 3)).is_old
    assert plan.read_text() == text


# Growing


@pytest.fixture
def more(make_video: MakeVideo, films: Path, tmp_path: Path) -> Path:
    """Two new films, one of a new class, and one that is in the data set under another name."""
    make_video(tmp_path / "more" / "0" / "new.mp4", 30, width=32, height=32)
    make_video(tmp_path / "more" / "b" / "new.mp4", 31, width=32, height=32)
    shutil.copy(films / "a" / "0.mp4", tmp_path / "more" / "b" / "old.mp4")
    return tmp_path / "more"


def test_what_was_there_stays_the_beginning(copy: Path, more: Path) -> None:
    before, rows = load_manifest(str(copy)), {}
    for split in before.splits:
        rows[split] = open_split(str(copy), split).records.tobytes()
    files = {path: path.read_bytes() for path in copy.rglob("*.index")}
    summary = pack(more, copy, SMALL, append=True)
    after = load_manifest(str(copy))
    assert after == summary.manifest
    assert after.history == (Version(before.hash, {name: split.num_samples for name, split in before.splits.items()}),)
    assert after.labels == ("a", "b", "0"), "numbers of labels stay"
    assert sum(split.num_samples for split in after.splits.values()) == 4 + sum(
        split.num_samples for split in before.splits.values()
    )
    for split, old in before.splits.items():
        assert open_split(str(copy), split).records.tobytes().startswith(rows[split])
        assert after.splits[split].shards[: len(old.shards)] == old.shards
    assert {path: path.read_bytes() for path in files} == files, "an index in use is not touched"
    assert summary.rejected == {"duplicate": 1}
    assert "has the same bytes as a/0.mp4" in rejected(copy)[-1]["detail"]
    assert verify(str(copy)) == []


def test_an_open_reader_of_the_older_manifest_goes_on(copy: Path, more: Path) -> None:
    old = load_manifest(str(copy))
    text = (copy / "manifest.json").read_text()
    reader = open_split(str(copy), "train")
    expected = [reader.read(number) for number in range(len(reader))]
    pack(more, copy, SMALL, append=True)
    assert [reader.read(number) for number in range(len(reader))] == expected
    (copy / "manifest.json").write_text(text)
    late = open_split(str(copy), "train")
    assert late.manifest.hash == old.hash
    assert [late.read(number) for number in range(len(late))] == expected


def test_a_lost_manifest_is_not_made_from_the_parts_alone(films: Path, more: Path, tmp_path: Path) -> None:
    """What was packed in one go lies beside the parts: it would be left out without a word."""
    pack(films, tmp_path / "data", SMALL)
    pack(more, tmp_path / "data", SMALL, append=True)
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing; .* put it back"):
        merge(str(tmp_path / "data"))


def test_what_is_known_is_not_converted_again(
    copy: Path, more: Path, make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(more, copy, SMALL, append=True)
    again = Path(shutil.copytree(more, tmp_path / "again"))
    make_video(again / "new.mp4", 40, width=32, height=32)
    asked: list[str] = []
    plain = staging.convert_all

    def convert_all(sources: Any, *rest: Any) -> Any:
        asked.extend(source.name for source in sources)
        return plain(sources, *rest)

    monkeypatch.setattr("shards.pack.convert_all", convert_all)
    summary = pack(again, copy, SMALL, append=True)
    assert asked == ["new.mp4"]
    assert summary.rejected == {"duplicate": 3}


def test_adding_the_same_again_adds_nothing(copy: Path, more: Path) -> None:
    first = pack(more, copy, SMALL, append=True)
    again = pack(more, copy, SMALL, append=True)
    assert again.manifest == first.manifest
    assert "packed already" in again.lines()[0]
    other = replace(SMALL, short_side=48)
    with pytest.raises(UserError, match=r"holds nothing new: all 3 files were rejected \(duplicate 3;"):
        pack(more, copy, other, append=True)
    assert load_manifest(str(copy)) == first.manifest


def test_a_data_set_grows_more_than_once(make_video: MakeVideo, copy: Path, more: Path, tmp_path: Path) -> None:
    counts = [load_manifest(str(copy)).version()]
    counts.append(pack(more, copy, SMALL, append=True).manifest.version())
    make_video(tmp_path / "third" / "c.mp4", 17, width=32, height=32)
    last = pack(tmp_path / "third", copy, SMALL, append=True).manifest
    assert last.history == tuple(counts)
    assert len(samples(copy)["train"]) == last.splits["train"].num_samples
    assert verify(str(copy)) == []


def test_a_data_set_packed_in_one_go_may_grow(films: Path, more: Path, tmp_path: Path) -> None:
    before = pack(films, tmp_path / "data", SMALL).manifest
    after = pack(more, tmp_path / "data", SMALL, append=True).manifest
    assert after.history == (before.version(),)
    assert after.splits["train"].shards[0] == before.splits["train"].shards[0]
    assert {row["path"] for row in rejected(tmp_path / "data")} == {"b/0again.mp4", "b/broken.mp4", "b/old.mp4"}
    assert verify(str(tmp_path / "data")) == []


def test_a_group_stays_in_its_split(make_video: MakeVideo, tmp_path: Path) -> None:
    """Whatever its hash says, and whatever the user gives: held-out data must not leak."""
    for name in ("first", "second"):
        for film in "abc":
            make_video(tmp_path / name / f"{film}.mp4", 16, width=32, height=32)
    (tmp_path / "first.csv").write_text("path,split,group\nfirst/a.mp4,train,x\nfirst/b.mp4,val,y\n")
    pack(tmp_path / "first.csv", tmp_path / "data", SMALL)
    (tmp_path / "second.csv").write_text("path,split,group\nsecond/a.mp4,,x\nsecond/b.mp4,,y\nsecond/c.mp4,val,x\n")
    for val_fraction in (0.0, 0.9):
        shutil.copytree(tmp_path / "data", tmp_path / f"data{val_fraction}")
        options = replace(SMALL, val_fraction=val_fraction)
        summary = pack(tmp_path / "second.csv", tmp_path / f"data{val_fraction}", options, append=True)
        assert {name: split.num_samples for name, split in summary.manifest.splits.items()} == {"train": 2, "val": 2}
        assert summary.rejected == {"leak": 1}
        assert (
            "given to val, but its group 'x' is in train already"
            in rejected(tmp_path / f"data{val_fraction}")[0]["detail"]
        )


def test_settled_groups_decide() -> None:
    def source(name: str, group: str, split: str | None = None) -> Source:
        return Source(Path(name), name, None, split, group)

    settled = {"x": ("train",), "y": ("val",)}
    sources = [
        source("1", "x"),
        source("2", "y"),
        source("3", "z"),
        source("4", "x", "train"),
        source("5", "y", "test"),
    ]
    for val_fraction in (0.0, 0.9999):
        rule = choose_splits(sources, val_fraction, settled)
        assert [rule.split_of[name] for name in "124"] == ["train", "val", "train"]
    assert choose_splits([source("3", "z")], 0.0, settled).split_of == {"3": "train"}
    assert leaking(sources, settled) == {"5": "given to test, but its group 'y' is in val already"}


def test_only_what_is_a_data_set_can_grow(films: Path, tmp_path: Path) -> None:
    for name in ("new", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="holds no data set; --append adds to one that is there"):
            pack(films, tmp_path / name, SMALL, append=True)
    assert list((tmp_path / "empty").iterdir()) == []
    with pytest.raises(UserError, match="--append does not go with --slice 0/2"):
        pack(films, tmp_path / "new", SMALL, append=True, share=Slice(0, 2))


def test_a_kill_before_the_manifest_leaves_the_older_data_set(
    copy: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the list of rejections and the new index may lie there: nothing counts but the manifest."""
    from shards import storage

    old = load_manifest(str(copy))
    write = storage.write_bytes

    def killed(url: str, data: bytes, **limits: float) -> None:
        if url.endswith("manifest.json"):
            raise KeyboardInterrupt
        write(url, data, **limits)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            pack(more, copy, SMALL, append=True)
    assert load_manifest(str(copy)) == old
    assert verify(str(copy)) == []
    after = pack(more, copy, SMALL, append=True).manifest
    assert after.history == (old.version(),)
    assert sum(split.num_samples for split in after.splits.values()) == 4 + sum(
        split.num_samples for split in old.splits.values()
    )
    assert len([row for row in rejected(copy) if row["path"] == "b/old.mp4"]) == 1


def test_a_damaged_part_is_refused(slices: Path, tmp_path: Path) -> None:
    shutil.copytree(slices, tmp_path / "data")
    index = next((tmp_path / "data" / "parts").glob("*/train.index"))
    data = np.fromfile(index, np.uint8)
    data[5] ^= 1
    data.tofile(index)
    with pytest.raises(UserError, match=r"train\.index is not the index its manifest names"):
        merge(str(tmp_path / "data"))
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_presets_may_differ(clips: Path, copy: Path) -> None:
    after = pack(clips, copy, replace(SMALL, preset="copy", max_frames=32), append=True).manifest
    assert (after.preset, isinstance(after, Manifest)) == ("mixed", True)
    assert verify(str(copy)) == []


@pytest.mark.parametrize("text", ["3", "3/3", "-1/3", "1/0", "a/b", "1/2/3", "", "1 /3", "0.5/2"])
def test_a_malformed_slice(text: str) -> None:
    with pytest.raises(UserError, match=r"it must be I/N, counted from 0"):
        Slice.parse(text)


def test_a_slice() -> None:
    assert Slice.parse("3/16") == Slice(3, 16)
    assert (str(Slice(3, 16)), Slice(3, 16).part) == ("3/16", "0003-of-0016")
