"""Tars of videos made by others: found, read once, indexed in place; what cannot be used is said."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import storage
from shards.errors import UserError
from shards.foreign import IndexOptions, IndexProgress, IndexSummary, index_foreign
from shards.foreignset import is_held_out
from shards.layout import LEVEL_DECODE, LEVEL_HEADER, LEVEL_PACKETS, MATRIX_BT709, Manifest, Records
from shards.manifest import load_manifest
from shards.reader import open_split
from shards.tarlist import list_tars

ROOT = Path(__file__).resolve().parents[2]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> dict[str, bytes]:
    """Four small videos by name, in four containers."""
    folder = tmp_path_factory.mktemp("videos")
    made = {
        "a.mp4": make_video(folder / "a.mp4", 20),
        "b.mkv": make_video(folder / "b.mkv", 24, rate=12, width=96, height=64),
        "c.webm": make_video(folder / "c.webm", 18, codec="libvpx"),
        "d.ts": make_video(folder / "d.ts", 30),
    }
    return {name: path.read_bytes() for name, path in made.items()}


@pytest.fixture
def tars(tmp_path: Path, videos: dict[str, bytes]) -> Path:
    """Two tars with all that a sample may consist of, and things that are no samples."""
    folder = tmp_path / "tars"
    long_name = "deep/" * 40 + "long é"
    write_tar(
        folder / "x-000.tar",
        [
            ("s/000.json", json.dumps({"label": "dog", "source": "film 1"}).encode()),
            ("s/000.mp4", videos["a.mp4"]),
            ("s/000.txt", b"a caption"),
            ("001.clip.MKV", videos["b.mkv"]),
            ("001.left.mp4", videos["a.mp4"]),
            ("001.cls", b"7\n"),
            ("001.json", b'{"label": "cat", "group": 12}'),
            ("picture.jpg", b"x"),
            ("broken.mp4", videos["a.mp4"][:2000]),
            ("readme", b"hello"),
            (".hidden.mp4", videos["a.mp4"]),
        ],
    )
    write_tar(
        folder / "x-001.tar",
        [
            ("./000.webm", videos["c.webm"]),
            ("./000.json", b"no json"),
            (f"{long_name}.ts", videos["d.ts"]),
            ("./000.webm", videos["a.mp4"]),
        ],
    )
    return folder


def index(url: Path | str, **options: Any) -> IndexSummary:
    return index_foreign(str(url), IndexOptions(**{"workers": 2, **options}))


def rows_of(folder: Path, split: str = "train") -> Records:
    return open_split(str(folder), split).records


def reasons(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    return {row["path"]: row["reason"] for row in rows}


# ------------------------------------------------------------------------------------------------ what is found


@pytest.mark.parametrize(
    ("probe", "level"), [("header", LEVEL_HEADER), ("packets", LEVEL_PACKETS), ("decode", LEVEL_DECODE)]
)
def test_every_video_is_found_with_its_facts(probe: str, level: int, tars: Path, videos: dict[str, bytes]) -> None:
    summary = index(tars, probe=probe)
    reader = open_split(str(tars), "train")
    names = ["a.mp4", "b.mkv", "c.webm", "d.ts"]
    assert [reader.read(n) for n in range(4)] == [videos[name] for name in names]
    records = reader.records
    assert [int(value) for value in records["num_frames"]] == [20, 24, 18, 30]
    assert records["rate"] == pytest.approx([25, 12, 25, 25], rel=0.01)
    assert [(int(r["width"]), int(r["height"])) for r in records] == [(64, 48), (96, 64), (64, 48), (64, 48)]
    assert set(records["level"]) == {level}
    assert set(records["grid"]) == {0}
    assert (records["motion"] > 0).all() == (probe == "decode")
    assert [int(value) for value in records["checksum"]] == [zlib.crc32(videos[name]) for name in names]
    assert [reader.label_name(n) for n in range(4)] == ["dog", "7", None, None]
    groups = ["film 1", "12", "000", "deep/" * 40 + "long é"]
    assert [int(value) for value in records["group"]] == [zlib.crc32(group.encode()) for group in groups]
    assert reasons(tars) == {
        "x-000.tar/001": "second_video",
        "x-000.tar/picture": "no_video",
        "x-000.tar/broken": "unreadable",
        "x-001.tar/000": "duplicate",
    }
    assert summary.rejected == {"second_video": 1, "no_video": 1, "unreadable": 1, "duplicate": 1}
    assert (summary.num_ignored, summary.num_unread, summary.num_tars) == (2, 1, 2)
    assert not (tars / "staging").exists()
    shards = load_manifest(str(tars)).splits["train"].shards
    assert [(shard.name, shard.num_samples, shard.tag) for shard in shards] == [
        ("x-000.tar", 2, ""),
        ("x-001.tar", 2, ""),
    ]
    assert {shard.num_bytes for shard in shards} == {path.stat().st_size for path in tars.glob("*.tar")}


def test_tars_elsewhere_are_named_by_url(tars: Path, tmp_path: Path, videos: dict[str, bytes]) -> None:
    """The folder of the index can then be moved; patterns keep their order."""
    index(f"{tars}/x-{{001,000}}.tar", to=tmp_path / "index")
    (tmp_path / "index").rename(tmp_path / "moved")
    reader = open_split(str(tmp_path / "moved"), "train")
    assert [shard.name for shard in reader.split.shards] == [f"file://{tars}/x-{n}.tar" for n in ("001", "000")]
    assert reader.read(0) == videos["c.webm"]


def test_remote_tars_have_a_tag_and_are_read_where_they_are(
    tars: Path, tmp_path: Path, videos: dict[str, bytes]
) -> None:
    import fsspec

    memory: Any = fsspec.filesystem("memory")
    bucket = f"/bucket-{tmp_path.name}-{random.getrandbits(32)}"
    for path in tars.glob("*.tar"):
        memory.pipe_file(f"{bucket}/{path.name}", path.read_bytes())
    with pytest.raises(UserError, match=r"--to data/NAME"):
        index(f"memory:/{bucket}")
    index(f"memory:/{bucket}", to=tmp_path / "index")
    here, there = rows_of(tmp_path / "index"), index(tars, to=tmp_path / "other")
    assert here.tobytes() == rows_of(there.folder).tobytes()
    reader = open_split(str(tmp_path / "index"), "train")
    assert [shard.name for shard in reader.split.shards] == [f"memory:/{bucket}/x-{n}.tar" for n in ("000", "001")]
    assert reader.read(3) == videos["d.ts"]


def test_held_out_groups_are_whole_and_depend_on_nothing_else(tmp_path: Path, videos: dict[str, bytes]) -> None:
    members = [(f"{n:03d}.mp4", videos["a.mp4"]) for n in range(12)]
    members += [(f"{n:03d}.json", json.dumps({"group": f"film {n // 3}"}).encode()) for n in range(12)]
    write_tar(tmp_path / "t" / "a.tar", members)
    index(tmp_path / "t", val_fraction=0.5, probe="header")
    train, val = rows_of(tmp_path / "t"), rows_of(tmp_path / "t", "val")
    assert len(train) + len(val) == 12
    assert len(train)
    assert len(val)
    assert not set(train["group"].tolist()) & set(val["group"].tolist())
    assert is_held_out(val["group"], 0.5).all()
    assert not is_held_out(train["group"], 0.5).any()


def test_the_held_out_share_is_the_share_asked_for() -> None:
    groups = np.array([zlib.crc32(f"group {n}".encode()) for n in range(20_000)], np.uint32)
    assert is_held_out(groups, 0.1).mean() == pytest.approx(0.1, abs=0.01)
    assert not (is_held_out(groups, 0.1) & ~is_held_out(groups, 0.3)).any()


def test_what_decoding_at_training_would_show_wrongly_is_refused(
    tmp_path: Path, make_video: Callable[..., Path]
) -> None:
    made = {
        "hdr": make_video(tmp_path / "hdr.mp4", 8, tags={"color_trc": 16, "color_primaries": 9, "colorspace": 9}),
        "rotated": make_video(tmp_path / "rotated.mp4", 8, rotation=90),
        "short": make_video(tmp_path / "short.mp4", 1),
        "hd709": make_video(tmp_path / "hd709.mp4", 8, tags={"colorspace": 1, "color_range": 2}),
        "odd": make_video(tmp_path / "odd.mp4", 8, width=63, height=47, pixel_format="yuv444p"),
    }
    for probe in ("packets", "decode"):
        folder = tmp_path / probe
        write_tar(folder / "a.tar", [(f"{name}.mp4", path.read_bytes()) for name, path in made.items()])
        index(folder, probe=probe)
        found = {path.rpartition("/")[2]: reason for path, reason in reasons(folder).items()}
        assert found == {"hdr": "hdr", "rotated": "rotated", "short": "too_short"}
        records = rows_of(folder)
        assert [(int(r["matrix"]), int(r["full_range"])) for r in records] == [(MATRIX_BT709, 1), (0, 0)]
        assert [int(value) for value in records["width"]] == [64, 63]


def test_an_mp4_that_was_cut_off_behind_its_header_is_refused(tmp_path: Path, make_video: Callable[..., Path]) -> None:
    path = make_video(tmp_path / "a.mp4", 40, container_options={"movflags": "faststart"})
    data = path.read_bytes()
    for probe in ("packets", "decode"):
        write_tar(tmp_path / probe / "a.tar", [("cut.mp4", data[: len(data) // 2]), ("whole.mp4", data)])
        summary = index(tmp_path / probe, probe=probe)
        assert sum(summary.rejected.values()) == 1
        assert next(iter(reasons(tmp_path / probe))) == "a.tar/cut"


def test_links_have_no_bytes_of_their_own(tmp_path: Path, videos: dict[str, bytes]) -> None:
    path = write_tar(tmp_path / "t" / "a.tar", [("a.mp4", videos["a.mp4"])])
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("b.mp4")
        info.type, info.linkname = tarfile.LNKTYPE, "a.mp4"
        tar.addfile(info)
    assert index(tmp_path / "t").rejected == {"link": 1}


# ------------------------------------------------------------------------------------------------ growing


def test_an_index_grows_at_its_end(tars: Path, tmp_path: Path, videos: dict[str, bytes]) -> None:
    index(tars)
    before, first = rows_of(tars).tobytes(), load_manifest(str(tars))
    write_tar(tars / "a-new.tar", [("n.mp4", videos["a.mp4"]), ("n.cls", b"3"), ("bad.mp4", b"x")])
    summary = index(tars)
    after, second = rows_of(tars), load_manifest(str(tars))
    assert after.tobytes()[: len(before)] == before
    assert [shard.name for shard in second.splits["train"].shards] == ["x-000.tar", "x-001.tar", "a-new.tar"]
    assert second.labels == (*first.labels, "3")
    assert int(after[-1]["label"]) == 2
    assert [version.hash for version in second.history] == [first.hash]
    assert second.history[0].num_samples == {"train": 4}
    assert (summary.num_known, summary.rejected["format"], len(reasons(tars))) == (2, 1, 5)
    again = index(tars)
    assert again.manifest.hash == second.hash
    assert again.rejected == summary.rejected


def test_growing_that_died_before_its_manifest_is_done_again(
    tars: Path, videos: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    index(tars)
    old = load_manifest(str(tars))
    write_tar(tars / "y.tar", [("n.mp4", videos["a.mp4"]), ("bad.mp4", b"x")])

    real = storage.write_atomic

    def die(path: Path, data: bytes) -> None:
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomic", die)
        with pytest.raises(KeyboardInterrupt):
            index(tars)
    assert load_manifest(str(tars)) == old
    assert len(open_split(str(tars), "train")) == 4
    index(tars)
    assert len(open_split(str(tars), "train")) == 5
    assert sorted(reasons(tars).values()) == ["duplicate", "format", "no_video", "second_video", "unreadable"]


def test_indexed_tars_must_stay_as_they_are(tars: Path, videos: dict[str, bytes], tmp_path: Path) -> None:
    index(tars)
    with pytest.raises(UserError, match=r"lists .*x-001.tar .*may only grow"):
        index(tars / "x-000.tar")
    write_tar(tars / "x-001.tar", [("other.mp4", videos["a.mp4"])])
    with pytest.raises(UserError, match=r"x-001.tar is not the tar that was indexed"):
        index(tars)


# ------------------------------------------------------------------------------------------------ mistakes


def test_broken_tars_are_named_and_the_others_are_kept(tars: Path, videos: dict[str, bytes]) -> None:
    whole = (tars / "x-001.tar").read_bytes()
    (tars / "x-001.tar").write_bytes(whole[: len(whole) // 2 // 512 * 512])
    (tars / "x-002.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 3 tars cannot be indexed: .*x-001.tar .*cut off.*x-002.tar .*cut off"):
        index(tars)
    assert not (tars / "manifest.json").exists()
    (tars / "x-002.tar").unlink()
    (tars / "x-001.tar").write_bytes(whole)
    assert index(tars).num_reused == 1


def test_mistakes_are_named(tars: Path, tmp_path: Path, packed: tuple[Path, Any], videos: dict[str, bytes]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "gz").mkdir()
    (tmp_path / "parted" / "parts").mkdir(parents=True)
    (tmp_path / "gz" / "a.tar.gz").write_bytes(b"x")
    write_tar(tmp_path / "no" / "a.tar", [("a.jpg", b"x"), ("b.mp4", b"y")])
    mistakes: list[tuple[str, dict[str, Any], str]] = [
        (str(tmp_path / "nowhere"), {}, "does not exist"),
        (str(tmp_path / "empty"), {}, "holds no .tar file"),
        (str(tmp_path / "parted"), {}, "--merge joins them"),
        (str(tmp_path / "gz"), {}, "a.tar.gz: compressed tars must be unpacked"),
        (f"{tars}/x-{{000..003}}.tar", {}, "x-002.tar, .*x-003.tar cannot be found"),
        (f"{tars}/x-{{000,000}}.tar", {}, "x-000.tar more than once"),
        (f"{tars}/x-{{000..", {}, "does not close"),
        (str(tars), {"split": "a b"}, "--split is 'a b'"),
        (str(tars), {"split": "val", "val_fraction": 0.5}, "--split is val"),
        (str(tars), {"to": tars / "x-000.tar"}, "is a file"),
        (str(packed[0]), {}, "is a packed data set already"),
        (str(tmp_path / "no"), {}, r"no usable video \(format 1, no_video 1\)"),
        ("https://me:secret@host/a.tar", {}, "https://host/a.tar was given with a user name"),
        ("s3://bucket/a.tar?token=secret", {}, "s3://bucket/a.tar was given"),
    ]
    for url, options, text in mistakes:
        with pytest.raises(UserError, match=text) as caught:
            index(url, **options)
        assert "secret" not in str(caught.value)
    assert not (packed[0] / "staging").exists()


def test_one_process_at_a_time(tars: Path) -> None:
    import fcntl

    (tars / "staging").mkdir()
    with (tars / "staging" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being indexed by another process"):
            index(tars)


def test_a_tar_that_changes_while_it_is_read_is_refused(
    tars: Path, videos: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list_tars(str(tars))
    monkeypatch.setattr("shards.foreign.list_tars", lambda _: found)
    path = tars / "x-000.tar"
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r"x-000.tar was changed while it was read"):
        index(tars)


# ------------------------------------------------------------------------------------------------ kills, memory


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_index(tmp_path: Path, videos: dict[str, bytes]) -> None:
    for number in range(8):
        members = [(f"{number}-{n}.mp4", videos["a.mp4"]) for n in range(12)]
        write_tar(tmp_path / "tars" / f"{number}.tar", members)
    index(tmp_path / "tars", to=tmp_path / "whole")
    code = "import sys; from pathlib import Path; from shards.foreign import *; "
    code += "index_foreign(sys.argv[1], IndexOptions(to=Path(sys.argv[2]), workers=2))"
    command = [sys.executable, "-c", code, str(tmp_path / "tars"), str(tmp_path / "killed")]
    for num_staged in (1, 3, 6):
        child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        while sum(path.suffix == "" for path in (tmp_path / "killed" / "staging").glob("?" * 24)) < num_staged:
            assert child.poll() is None
            time.sleep(0.005)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert index(tmp_path / "tars", to=tmp_path / "killed").num_reused >= 6
    for name in ("train.index", "manifest.json", "rejected.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "whole"))


def test_progress_rises_to_the_end(tars: Path) -> None:
    seen: list[IndexProgress] = []
    index_foreign(str(tars), IndexOptions(workers=1), seen.append)
    assert [progress.num_done for progress in seen] == [0, 1, 2]
    assert (seen[-1].num_total, seen[-1].num_samples, seen[-1].num_rejected) == (2, 4, 4)


def test_the_manifest_is_one_that_others_read(tars: Path) -> None:
    manifest = index(tars).manifest
    assert Manifest.from_json(storage.read_bytes(str(tars / "manifest.json")), "") == manifest
    assert manifest.preset == "index"
