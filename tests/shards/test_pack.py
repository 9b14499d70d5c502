from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.manifest import load_manifest
from shards.pack import PackOptions, PackProgress, PackSummary, pack
from shards.reader import open_split
from shards.tars import shard_ends
from shards.verify import verify

MakeVideo = Callable[..., Path]
SMALL = PackOptions(short_side=48, max_frames=32, min_frames=8, workers=2)
Packed = tuple[Path, PackSummary]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def describe(folder: Path, split: str) -> list[dict[str, Any]]:
    """Every KEY.json of a split, in order."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith(".json")]
            rows += [json.loads(tar.extractfile(member).read()) for member in members]
    return rows


def test_what_lies_in_a_packed_folder(packed: Packed) -> None:
    folder, summary = packed
    manifest = load_manifest(str(folder))
    assert manifest == summary.manifest
    assert manifest.labels == ("bunny", "city")
    names = {path.name for path in folder.iterdir()}
    assert names == {*manifest.file_names(), "manifest.json", "rejected.jsonl", "content.jsonl", "packed.json"}
    assert (folder / "rejected.jsonl").read_text() == ""
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 7, "val": 4}
    assert manifest.splits["train"].num_frames == 190 + 132
    assert manifest.splits["val"].max_frames <= 48
    assert manifest.splits["train"].max_pixels == 114 * 64
    assert len(manifest.splits["train"].shards) > 1
    assert verify(str(folder)) == []


def test_members_of_a_tar(packed: Packed) -> None:
    folder, _ = packed
    with tarfile.open(folder / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:2]] == ["train-000000000.mp4", "train-000000000.json"]
    assert {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in members} == {
        (0, 0, 0, "", "")
    }


def test_descriptions(packed: Packed) -> None:
    rows = describe(packed[0], "train")
    assert {row["source"] for row in rows} == {"bbb_320x180_vp9.webm", "city_320x180_h264.mp4"}
    first = min((row for row in rows if row["label"] == "bunny"), key=lambda row: row["start_s"])
    expected = {"label": "bunny", "split": "train", "group": "bbb", "start_s": 0.0, "rate": 25.0, "num_frames": 44}
    assert expected.items() <= first.items()
    assert (first["width"], first["height"], first["grid"], first["matrix"]) == (114, 64, 4, 0)
    assert first["motion"] > 0.5
    assert all(row["label"] is None for row in describe(packed[0], "val"))


def test_webdataset_reads_it(packed: Packed) -> None:
    import webdataset

    folder, summary = packed
    urls = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    reader = open_split(str(folder), "train")
    assert len(samples) == len(reader) == summary.manifest.splits["train"].num_samples
    for number, sample in enumerate(samples):
        assert {"__key__", "mp4", "json"} <= sample.keys()
        assert sample["__key__"] == reader.key(number)
        assert sample["mp4"] == reader.read(number)
        assert json.loads(sample["json"])["label"] == reader.label_name(number)


def test_the_same_input_gives_the_same_bytes(make_video: MakeVideo, tmp_path: Path) -> None:
    for number in range(4):
        make_video(tmp_path / "src" / f"{number}.mp4", 50 + number)
    made: list[dict[str, str]] = []
    for name, workers in (("a", 1), ("b", 3)):
        pack(
            tmp_path / "src", tmp_path / name, PackOptions(short_side=48, max_frames=32, min_frames=8, workers=workers)
        )
        made.append(hashes(tmp_path / name))
    assert made[0] == made[1]
    other = PackOptions(short_side=48, max_frames=32, min_frames=8, workers=1, seed=1)
    pack(tmp_path / "src", tmp_path / "c", other)
    assert hashes(tmp_path / "c")["train-000000.tar"] != made[0]["train-000000.tar"]


def test_neighbours_are_not_of_one_film(make_video: MakeVideo, tmp_path: Path) -> None:
    for number in range(4):
        make_video(tmp_path / "src" / f"{number}.mp4", 160, width=32, height=32)
    pack(tmp_path / "src", tmp_path / "out", PackOptions(short_side=32, max_frames=16, min_frames=8, workers=2))
    films = [row["source"] for row in describe(tmp_path / "out", "train")]
    assert len(films) == 30
    same = sum(left == right for left, right in pairwise(films))
    assert same < 18  # about a third by chance, 27 unshuffled


def test_class_and_split_folders(make_video: MakeVideo, tmp_path: Path) -> None:
    for name in ("train/run/a", "train/sit/b", "val/run/c"):
        make_video(tmp_path / "src" / f"{name}.mp4", 16)
    summary = pack(tmp_path / "src", tmp_path / "out", SMALL)
    assert summary.manifest.labels == ("run", "sit")
    val = open_split(str(tmp_path / "out"), "val")
    assert (len(val), val.label_name(0)) == (1, "run")
    assert "splits: as given" in summary.lines()


def test_a_few_films_are_split_by_file_and_it_is_said(make_video: MakeVideo, tmp_path: Path) -> None:
    for number in range(3):
        make_video(tmp_path / "src" / f"{number}.mp4", 70)
    summary = pack(tmp_path / "src", tmp_path / "out", SMALL)
    text = "\n".join(summary.lines())
    assert "splits: by source file, fixed by a hash of its name, 10% to val: 2 train, 1 val" in text
    films = {split: {row["source"] for row in describe(tmp_path / "out", split)} for split in ("train", "val")}
    assert (len(films["train"]), len(films["val"])) == (2, 1)
    assert not films["train"] & films["val"]


def test_rejections_are_listed_and_counted(make_video: MakeVideo, clips: Path, tmp_path: Path) -> None:
    source = tmp_path / "src"
    make_video(source / "run" / "a.mp4", 16)
    make_video(source / "run" / "b.mp4", 16)
    (source / "sit").mkdir()
    (source / "sit" / "c.mp4").write_text("hello")
    (source / "run" / "d.mp4").touch()
    (source / "run" / "notes.txt").touch()
    summary = pack(source, tmp_path / "out", SMALL)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(row["path"], row["reason"]) for row in rows] == [("run/d.mp4", "empty"), ("sit/c.mp4", "format")]
    assert summary.rejected == {"empty": 1, "format": 1}
    text = "\n".join(summary.lines())
    assert "packed 2 of 4 files; 1 other files in the folder are no videos" in text
    assert "rejected 2: empty 1, format 1 (rejected.jsonl names each file and why)" in text
    assert "warning: class 'sit' has nothing readable (1 files rejected) and is not among the labels" in text
    assert summary.manifest.labels == ("run",)


def test_a_missing_file_of_a_list_is_rejected(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", 16)
    (tmp_path / "films.csv").write_text("path,label,extra\na.mp4,x,1\ngone.mp4,x,2\n")
    summary = pack(tmp_path / "films.csv", tmp_path / "out", SMALL)
    assert summary.rejected == {"missing": 1}
    assert any("ignored: extra" in line for line in summary.lines())


def test_progress_counts_up(make_video: MakeVideo, tmp_path: Path) -> None:
    for number in range(3):
        make_video(tmp_path / "src" / f"{number}.mp4", 16)
    seen: list[PackProgress] = []
    pack(tmp_path / "src", tmp_path / "out", SMALL, seen.append)
    done = [progress.num_done for progress in seen if progress.phase == "convert"]
    assert done[0] == 0
    assert done == sorted(done)
    assert done[-1] == seen[0].num_total == 3
    assert (seen[-1].phase, seen[-1].num_done, seen[-1].num_total) == ("write", 3, 3)


def test_copy_stores_the_files_themselves(clips: Path, tmp_path: Path) -> None:
    pack(clips, tmp_path / "out", PackOptions(preset="copy", workers=2))
    found: dict[str, bytes] = {}
    for split in ("train", "val"):
        reader = open_split(str(tmp_path / "out"), split)
        for sample, row in enumerate(describe(tmp_path / "out", split)):
            found[row["source"]] = reader.read(sample)
            assert reader.extension(sample) == Path(row["source"]).suffix[1:]
            assert reader.records[sample]["grid"] == 0
    assert found == {path.name: path.read_bytes() for path in clips.iterdir()}
    assert load_manifest(str(tmp_path / "out")).preset == "copy"
    assert verify(str(tmp_path / "out")) == []


def test_an_empty_folder_may_be_the_destination(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)
    (tmp_path / "out").mkdir()
    pack(tmp_path / "src", tmp_path / "out", SMALL)
    assert (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out.partial").exists()


SCRIPT = """
import sys
from pathlib import Path
from shards.pack import PackOptions, pack
def tell(progress):
    print(progress.phase, progress.num_done, flush=True)
options = PackOptions(short_side=48, max_frames=32, min_frames=8, workers=1)
pack(Path(sys.argv[1]), Path(sys.argv[2]), options, tell)
"""


def test_an_interrupted_packing_goes_on(make_video: MakeVideo, tmp_path: Path) -> None:
    source = tmp_path / "src"
    for number in range(6):
        make_video(source / f"{number}.mp4", 60)
    arguments = [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / "out")]
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "convert 2\n":
                process.send_signal(signal.SIGKILL)
                break
        process.wait(30)
    assert not (tmp_path / "out").exists()
    staged = len(list((tmp_path / "out.partial" / "staging").glob("*/outcome.json")))
    assert staged >= 2
    os.utime(source / "5.mp4", (1, 1))  # a file that changed since would be converted again
    summary = pack(source, tmp_path / "out", replace(SMALL, workers=1))
    assert 2 <= summary.num_reused <= staged + 1
    pack(source, tmp_path / "fresh", replace(SMALL, workers=1))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


def test_other_options_do_not_use_staged_samples(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 60)
    with pytest.raises(ZeroDivisionError):
        pack(tmp_path / "src", tmp_path / "out", SMALL, lambda progress: 1 // (progress.phase == "convert"))
    assert (tmp_path / "out.partial").exists()
    summary = pack(tmp_path / "src", tmp_path / "out", PackOptions(short_side=48, max_frames=16, min_frames=8))
    assert summary.num_reused == 0
    assert summary.num_samples == 4


def test_two_packings_to_one_place(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)

    def again(progress: PackProgress) -> None:
        with pytest.raises(UserError, match="being packed by another process"):
            pack(tmp_path / "src", tmp_path / "out", SMALL)

    pack(tmp_path / "src", tmp_path / "out", SMALL, again)


def test_children_are_gone_when_packing_fails(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)

    def fail(progress: PackProgress) -> None:
        if progress.num_done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "src", tmp_path / "out", SMALL, fail)
    deadline_s = time.monotonic() + 10
    while _children() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not _children()


def _children() -> list[str]:
    """Command lines of this process's converting children."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            command = (path.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and "shards.convert" in command:
            found.append(command)
    return found


@given(sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=200), shard_bytes=st.integers(1000, 10**9))
def test_shards_are_balanced(sizes: list[int], shard_bytes: int) -> None:
    ends = shard_ends(sizes, shard_bytes)
    assert ends[-1] == len(sizes)
    assert ends == sorted(set(ends))
    assert len(ends) <= max(1, -(-sum(sizes) // shard_bytes))
    starts = [0, *ends[:-1]]
    for start, end in zip(starts, ends, strict=True):
        assert sum(sizes[start:end]) <= shard_bytes + 2 * max(sizes)


def test_every_bad_option_is_named_at_once(tmp_path: Path) -> None:
    options = PackOptions(preset="fast", short_side=4, max_frames=8, max_rate=0, val_fraction=1.5, stride=0)
    with pytest.raises(UserError) as caught:
        pack(tmp_path, tmp_path / "out", options)
    for name in ("preset", "short_side", "max_frames", "max_rate", "val_fraction", "stride"):
        assert f"pack.{name} is" in str(caught.value)


def test_a_moved_folder_still_opens(packed: Packed, tmp_path: Path) -> None:
    folder, summary = packed
    shutil.copytree(folder, tmp_path / "elsewhere" / "data")
    reader = open_split(str(tmp_path / "elsewhere" / "data"), "train")
    assert reader.manifest.hash == summary.manifest.hash
    assert [len(reader.read(sample)) for sample in range(len(reader))] == reader.records["size"].tolist()


HELD_OUT_NOTHING = "nothing is held out, so training will not evaluate; to hold something out, pack two source files"


def test_it_is_said_when_nothing_is_held_out(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)
    text = "\n".join(pack(tmp_path / "src", tmp_path / "one", SMALL).lines())
    assert HELD_OUT_NOTHING in text
    make_video(tmp_path / "src" / "b.mp4", 16)
    assert HELD_OUT_NOTHING in "\n".join(
        pack(tmp_path / "src", tmp_path / "all", replace(SMALL, val_fraction=0)).lines()
    )
    assert "nothing is held out" not in "\n".join(pack(tmp_path / "src", tmp_path / "two", SMALL).lines())


def test_a_val_split_larger_than_train_is_warned_of(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "train" / "a.mp4", 16)
    make_video(tmp_path / "src" / "val" / "b.mp4", 16)
    assert "warning" not in "\n".join(pack(tmp_path / "src", tmp_path / "even", SMALL).lines())
    make_video(tmp_path / "src" / "val" / "c.mp4", 16)
    text = "\n".join(pack(tmp_path / "src", tmp_path / "odd", SMALL).lines())
    assert "warning: val holds more samples (2) than train (1): give splits" in text


def test_it_works_where_cores_cannot_be_asked_for(
    make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert pack(tmp_path / "src", tmp_path / "out", replace(SMALL, workers=0)).num_samples == 1


def test_duplicates_are_rejected_in_the_order_of_names(make_video: MakeVideo, tmp_path: Path) -> None:
    source = tmp_path / "src"
    make_video(source / "b.mp4", 16)
    for name in ("a.mp4", "sub/c.mp4"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(source / "b.mp4", source / name)
    for workers in (1, 3):
        summary = pack(source, tmp_path / f"out{workers}", replace(SMALL, workers=workers))
        assert summary.rejected == {"duplicate": 2}
        rows = [json.loads(line) for line in (tmp_path / f"out{workers}" / "rejected.jsonl").read_text().splitlines()]
        assert rows == [
            {"path": "b.mp4", "reason": "duplicate", "detail": "has the same bytes as a.mp4"},
            {"path": "sub/c.mp4", "reason": "duplicate", "detail": "has the same bytes as a.mp4"},
        ]


def test_a_twin_of_a_file_that_was_rejected_is_no_duplicate(make_video: MakeVideo, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_text("hello")
    make_video(tmp_path / "c.mp4", 16)
    (tmp_path / "films.csv").write_text("path\na.mp4\nb.mp4\nc.mp4\n")
    assert pack(tmp_path / "films.csv", tmp_path / "out", SMALL).rejected == {"format": 2}


def test_content_names_the_sources_of_every_sample(packed: Packed, clips: Path) -> None:
    rows = [json.loads(line) for line in (packed[0] / "content.jsonl").read_text().splitlines()]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in clips.iterdir()}
    assert {row["source"]: row["sha256"] for row in rows} == hashes
    manifest = load_manifest(str(packed[0]))
    for split in manifest.splits:
        records = open_split(str(packed[0]), split).records
        names = [shard.name for shard in manifest.splits[split].shards]
        places = sorted((names[row["shard"]], int(row["offset"])) for row in records)
        assert sorted(tuple(place) for row in rows if row["split"] == split for place in row["samples"]) == places


def test_a_source_that_changes_while_it_is_copied(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)

    def change(progress: PackProgress) -> None:
        if progress.num_done:
            with (tmp_path / "src" / "a.mp4").open("ab") as file:
                file.write(b"more")

    with pytest.raises(UserError, match=r"a\.mp4 was changed while it was packed; .*start again"):
        pack(tmp_path / "src", tmp_path / "out", replace(SMALL, preset="copy"), change)
    assert not (tmp_path / "out").exists()


def test_packing_for_a_rate(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 60, rate=24)
    pack(tmp_path / "src", tmp_path / "out", replace(SMALL, for_rate=4.0))
    record = open_split(str(tmp_path / "out"), "train").records[0]
    assert record["rate"] / record["grid"] in (4.0, 8.0, 12.0)
