"""What users do wrong, and what disks do: one clear line each, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import shards
from shards import storage
from shards.errors import UserError
from shards.pack import PackOptions, PackSummary, pack
from shards.reader import open_split

MakeVideo = Callable[..., Path]
Packed = tuple[Path, PackSummary]
SMALL = PackOptions(short_side=48, max_frames=32, min_frames=8, workers=1)
PACKAGES = Path(shards.__file__).resolve().parent.parent


def refused(src: Path, dst: Path, options: PackOptions = SMALL) -> str:
    """The one line that packing ends with; it leaves nothing at the destination."""
    before = sorted(dst.iterdir()) if dst.is_dir() else dst.exists()
    with pytest.raises(UserError) as caught:
        pack(src, dst, options)
    assert (sorted(dst.iterdir()) if dst.is_dir() else dst.exists()) == before
    line = str(caught.value)
    assert "\n" not in line
    assert ":" in line or ";" in line
    return line


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    line = refused(tmp_path / "src", tmp_path / "out")
    assert line.startswith(f"{tmp_path}/src holds no video file")
    assert not (tmp_path / "out.partial").exists()


def broken_text(path: Path, make_video: MakeVideo, clips: Path) -> None:
    path.write_text("hello\n" * 100)


def broken_playlist(path: Path, make_video: MakeVideo, clips: Path) -> None:
    path.write_text(f"ffconcat version 1.0\nfile '{clips / 'city_320x180_h264.mp4'}'\n")


def broken_cut(path: Path, make_video: MakeVideo, clips: Path) -> None:
    path.write_bytes((clips / "city_320x180_h264.mp4").read_bytes()[:120_000])


def broken_empty(path: Path, make_video: MakeVideo, clips: Path) -> None:
    path.touch()


def broken_sound(path: Path, make_video: MakeVideo, clips: Path) -> None:
    import av

    source = make_video(path.with_name("both.bin.mp4"), 25, with_audio=True)
    with av.open(str(source)) as both, av.open(str(path), "w") as alone:
        stream = alone.add_stream_from_template(both.streams.audio[0])
        for packet in both.demux(audio=0):
            if packet.dts is not None:
                packet.stream = stream
                alone.mux(packet)
    source.unlink()


def broken_one_frame(path: Path, make_video: MakeVideo, clips: Path) -> None:
    make_video(path, 1)


BROKEN = {
    broken_text: "format",
    broken_playlist: "format",
    broken_cut: "damaged",
    broken_empty: "empty",
    broken_sound: "no_video",
    broken_one_frame: "too_short",
}


@pytest.mark.parametrize(("spoil", "reason"), BROKEN.items())
def test_nothing_readable(
    make_video: MakeVideo, clips: Path, tmp_path: Path, spoil: Callable[[Path, MakeVideo, Path], None], reason: str
) -> None:
    (tmp_path / "src").mkdir()
    spoil(tmp_path / "src" / "a.mp4", make_video, clips)
    line = refused(tmp_path / "src", tmp_path / "out")
    assert "holds no usable video: all 1 files were rejected" in line
    assert f"{reason} 1" in line
    assert "for example a.mp4" in line
    assert not (tmp_path / "out.partial").exists()


def test_bad_files_do_not_stop_good_ones(make_video: MakeVideo, clips: Path, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "good" / "a.mp4", 32)
    (tmp_path / "src" / "bad").mkdir()
    for number, spoil in enumerate(BROKEN):
        spoil(tmp_path / "src" / "bad" / f"{number}.mp4", make_video, clips)
    summary = pack(tmp_path / "src", tmp_path / "out", SMALL)
    assert summary.num_samples == 1
    assert summary.rejected == {"format": 2, "damaged": 1, "empty": 1, "no_video": 1, "too_short": 1}
    assert [line for line in summary.lines() if "nothing readable" in line] == [
        "warning: class 'bad' has nothing readable (6 files rejected) and is not among the labels"
    ]


def test_a_file_in_the_way(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)
    (tmp_path / "out").write_text("mine")
    assert "is a file; the destination must be a new folder" in refused(tmp_path / "src", tmp_path / "out")
    assert "cannot be written" in refused(tmp_path / "src", tmp_path / "out" / "deeper")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_unwritable_destination(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)
    assert "cannot be written" in refused(tmp_path / "src", Path("/proc/data"))


def test_a_disk_that_fills_up(make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left on device" in refused(tmp_path / "src", tmp_path / "out")
    assert pack(tmp_path / "src", tmp_path / "out", SMALL).num_reused == 1


@pytest.mark.parametrize("name", ["shards", "shards/data", "pretrain/x/y", "launch/data"])
def test_a_destination_inside_the_code(make_video: MakeVideo, tmp_path: Path, name: str) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)
    line = refused(tmp_path / "src", PACKAGES / name)
    assert f"lies inside the code package {name.partition('/')[0]}/" in line
    assert "data/NAME" in line
    (tmp_path / "link").symlink_to(PACKAGES / "shards")
    assert "inside the code package" in refused(tmp_path / "src", tmp_path / "link" / "data")


def test_a_destination_that_is_not_empty(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    line = refused(tmp_path / "src", tmp_path / "out")
    assert "exists and is not empty; packing never overwrites" in line


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "gone", tmp_path / "out")


def test_a_missing_shard(packed: Packed, tmp_path: Path) -> None:
    shutil.copytree(packed[0], tmp_path / "data")
    (tmp_path / "data" / "val-000000.tar").unlink()
    with pytest.raises(UserError, match=r"val-000000\.tar is missing; .*copy it again or repack"):
        open_split(str(tmp_path / "data"), "val").read(0)


def test_a_truncated_tar(packed: Packed, tmp_path: Path) -> None:
    shutil.copytree(packed[0], tmp_path / "data")
    path = tmp_path / "data" / "val-000000.tar"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"val-000000\.tar has .*cut off or changed since.*copy it again"):
        open_split(str(tmp_path / "data"), "val").read(0)


def test_a_tar_changed_after_indexing(packed: Packed, tmp_path: Path) -> None:
    shutil.copytree(packed[0], tmp_path / "data")
    with (tmp_path / "data" / "val-000000.tar").open("ab") as file:
        file.write(bytes(10240))
    with pytest.raises(UserError, match=r"val-000000\.tar has .*must have the \d+ that were indexed"):
        open_split(str(tmp_path / "data"), "val").read(0)


def test_names_that_are_not_utf8_are_rejected_and_the_rest_is_packed(make_video: MakeVideo, tmp_path: Path) -> None:
    source = tmp_path / "src"
    made = make_video(source / "good" / "a.mp4", 32)
    strange = os.fsencode(source / "good") + b"/caf\xe9.mp4"
    shutil.copy(made, strange)
    os.mkdir(os.fsencode(source) + b"/\xff")
    shutil.copy(made, os.fsencode(source) + b"/\xff/b.mp4")
    for workers in (1, 2):
        summary = pack(source, tmp_path / f"out{workers}", replace(SMALL, workers=workers))
        assert summary.rejected == {"name": 2}
        assert (summary.num_samples, summary.num_reused) == (1, 0)
        "\n".join(summary.lines()).encode()
        rows = [json.loads(line) for line in (tmp_path / f"out{workers}" / "rejected.jsonl").read_text().splitlines()]
        assert [row["path"] for row in rows] == ["good/caf\\udce9.mp4", "\\udcff/b.mp4"]
        assert {row["reason"] for row in rows} == {"name"}
        assert all("rename it" in row["detail"] for row in rows)


def test_a_single_file_whose_name_is_not_utf8(make_video: MakeVideo, tmp_path: Path) -> None:
    made = make_video(tmp_path / "src" / "a.mp4", 32)
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    shutil.copy(made, file)
    with pytest.raises(UserError) as caught:
        pack(file, tmp_path / "out", SMALL)
    assert "(name 1; for example caf\\udce9.mp4: name" in str(caught.value).encode("utf-8", "backslashreplace").decode()


@pytest.mark.parametrize("column", ["path", "label", "group"])
def test_a_list_with_text_that_no_file_can_hold(make_video: MakeVideo, tmp_path: Path, column: str) -> None:
    make_video(tmp_path / "a.mp4", 32)
    make_video(tmp_path / "b.mp4", 32)
    rows = [{"path": "a.mp4", "label": "x"}, {"path": "b.mp4", "label": "x", column: "b\ud800.mp4"}]
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = pack(tmp_path / "films.jsonl", tmp_path / "out", SMALL)
    assert summary.rejected == {"name": 1}
    assert summary.num_samples == 1


def test_a_destination_whose_name_is_not_utf8(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)
    line = refused(tmp_path / "src", Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    line.encode()
    assert "not a name in UTF-8" in line


def test_a_destination_without_a_name(make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("/", ".", "../here", "/.."):
        assert "the destination must be a new folder" in refused(tmp_path / "src", Path(name))


def test_a_link_to_an_empty_folder_is_followed(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    pack(tmp_path / "src", tmp_path / "out", SMALL)
    assert (tmp_path / "disk" / "manifest.json").is_file()
    assert (tmp_path / "out").is_symlink()


def test_a_data_set_that_cannot_be_written_to(make_video: MakeVideo, packed: Packed, tmp_path: Path) -> None:
    """A file stands where the folder of parts must be: a mistake that also the superuser cannot write over."""
    shutil.copytree(packed[0], tmp_path / "data")
    (tmp_path / "data" / "parts").write_text("mine")
    make_video(tmp_path / "src" / "a.mp4", 16)
    before = (tmp_path / "data" / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="cannot be written") as caught:
        pack(tmp_path / "src", tmp_path / "data", SMALL, append=True)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "data" / "manifest.json").read_bytes() == before


def test_a_disk_that_fills_up_while_parts_are_joined(
    make_video: MakeVideo, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(packed[0], tmp_path / "data")
    make_video(tmp_path / "src" / "a.mp4", 16)
    before = (tmp_path / "data" / "manifest.json").read_bytes()

    def full(path: Path, url: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", full)
        with pytest.raises(UserError, match="No space left on device"):
            pack(tmp_path / "src", tmp_path / "data", SMALL, append=True)
    assert (tmp_path / "data" / "manifest.json").read_bytes() == before
    assert pack(tmp_path / "src", tmp_path / "data", SMALL, append=True).manifest.history


def test_a_manifest_of_another_kind_cannot_grow(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", 16)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is no manifest of a packed data set"):
        pack(tmp_path / "src", tmp_path / "data", SMALL, append=True)
