"""launch/demo.py: the parts that are its own. The whole of it is `make demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import demo
from shards.manifest import load_manifest
from shards.pack import PackOptions, pack

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder; the demo works in the folder it is started in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_film_is_in_both_splits(project: Path) -> None:
    options = PackOptions(short_side=96, max_frames=demo.PIECE_FRAMES)
    cut = pack(ROOT / "configs" / "clips", project / "cut", options, None)
    demo.hold_out(project / "cut", project / "pieces")
    pack(project / "pieces", project / "packed", PackOptions(preset="copy"), None)
    manifest = load_manifest(str(project / "packed"))
    assert manifest.labels == ("bbb", "city", "sintel")
    assert sum(split.num_samples for split in manifest.splits.values()) == cut.num_samples
    for split in ("train", "val"):
        assert {folder.name for folder in (project / "pieces" / split).iterdir()} == set(manifest.labels)


def test_it_starts_afresh_and_says_so(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.start_afresh()
    assert capsys.readouterr().out == ""
    mine = project / "runs" / "mine"
    for folder in (demo.RUN, demo.DATA, demo.DATA.with_name("demo-cut"), mine):
        folder.mkdir(parents=True)
    demo.start_afresh()
    assert "runs/demo" in capsys.readouterr().out
    assert not demo.RUN.exists()
    assert not list(demo.DATA.parent.iterdir())
    assert mine.exists()


def test_only_its_own_folders_are_removed(project: Path) -> None:
    mine = [Path("data/demo-mine"), Path("data/demo-cut-2"), Path("data/demo2"), Path("runs/demo-2")]
    own = [Path("data/demo.partial"), Path("data/demo-cut.partial"), Path("data/demo-pieces")]
    for folder in (*mine, *own):
        folder.mkdir(parents=True)
        (folder / "x").touch()
    demo.start_afresh()
    assert [folder for folder in mine if not (folder / "x").exists()] == []
    assert [folder for folder in own if folder.exists()] == []


def test_what_a_link_names_stays(project: Path) -> None:
    precious = project / "precious"
    precious.mkdir()
    (precious / "film.mp4").touch()
    for link in (demo.DATA, demo.RUN):
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(precious)
    demo.DATA.with_name("demo-cut").symlink_to(project / "gone")
    demo.start_afresh()
    assert (precious / "film.mp4").exists()
    assert not demo.DATA.is_symlink()
    assert not demo.RUN.is_symlink()
    assert not demo.DATA.with_name("demo-cut").is_symlink()


def test_a_row_that_is_still_being_written_is_left_out(project: Path) -> None:
    assert demo.newest_step("train") == 0
    demo.RUN.mkdir(parents=True)
    rows = [json.dumps({"kind": kind, "step": step}) for kind, step in (("train", 10), ("save", 10), ("train", 20))]
    (demo.RUN / "metrics.jsonl").write_text("\n".join(rows) + '\n{"kind": "train", "st')
    assert (demo.newest_step("save"), demo.newest_step("train")) == (10, 20)
