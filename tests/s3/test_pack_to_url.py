"""Packing straight into an object store: tars first, manifest last; killed while it sends, it sends only the rest."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shards import storage
from shards.errors import UserError
from shards.manifest import load_manifest
from shards.merge import merge
from shards.pack import PackOptions, PackProgress, pack
from shards.reader import open_split
from shards.repair import repair
from shards.slice import Slice
from shards.verify import verify
from tests.s3.conftest import Gateway

ROOT = Path(__file__).resolve().parents[2]
SMALL = PackOptions(short_side=64, max_frames=24, min_frames=8, workers=2, shard_bytes=20_000)

pytestmark = pytest.mark.usefixtures("aws")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which packing works."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(url: str) -> list[str]:
    return [file.name for file in storage.list_files(url)]


def test_it_is_the_folder_under_other_names(clips: Path, here: Path) -> None:
    url = "s3://films/whole"
    seen: list[PackProgress] = []
    summary = pack(clips, url, SMALL, seen.append)
    pack(clips, here / "local", SMALL)
    assert os.listdir(here) == ["local"], "the working folder is gone"
    assert verify(url) == []
    local, remote = load_manifest(str(here / "local")), load_manifest(url)
    assert remote == summary.manifest
    assert sorted(names(url)) == sorted(
        [*remote.file_names(), "manifest.json", "content.jsonl", "rejected.jsonl", "packed.json"]
    )
    for split, mine in local.splits.items():
        assert mine.sha256 == remote.splits[split].sha256
        for one, other in zip(mine.shards, remote.splits[split].shards, strict=True):
            assert re.fullmatch(rf"[0-9a-f]{{2}}/{one.name}", other.name)
            assert (one.sha256, one.num_bytes) == (other.sha256, other.num_bytes)
    assert len({shard.name[:2] for split in remote.splits.values() for shard in split.shards}) > 1
    uploads = [progress for progress in seen if progress.phase == "upload"]
    assert (uploads[-1].num_done, uploads[-1].done_bytes) == (uploads[-1].num_total, uploads[-1].total_bytes)
    assert "is packed already" in pack(clips, url, SMALL).lines()[0]
    with pytest.raises(UserError, match="s3://films/whole exists and is not empty; packing never overwrites"):
        pack(clips, url, PackOptions(short_side=48, max_frames=32))
    assert os.listdir(here) == ["local"]


def test_killed_while_it_sends(clips: Path, here: Path, gateway: Gateway) -> None:
    """SIGKILL from outside after two tars: nothing is a data set; then only what is missing is sent."""
    url = "s3://films/killed"
    options = ["--short-side=64", "--max-frames=24", "--min-frames=8", "--workers=2", "--shard-bytes=20000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "pack", str(clips), url, *options, f"--work={here}", "--json"],
        cwd=ROOT,
        env={**os.environ, **gateway.environment()},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    notes = here / "killed.partial" / "uploaded.jsonl"
    deadline_s = time.monotonic() + 60
    while not (notes.exists() and notes.read_text().count('"tag"') >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if storage.exists(f"{url}/manifest.json"):
        pytest.fail("too fast to be killed: give the films more tars")
    with pytest.raises(UserError, match="does not exist"):
        load_manifest(url)
    sent = {row["name"] for row in map(json.loads, notes.read_text().splitlines()) if "tag" in row}
    stored = {file.name: file.tag for file in storage.list_files(url)}
    uploaded: list[str] = []
    upload = storage.upload
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "upload", lambda path, to: (uploaded.append(to), upload(path, to)))
        pack(clips, url, SMALL, work=here)
    assert not {f"{url}/{name}" for name in sent}.intersection(uploaded)
    assert uploaded[-1] == f"{url}/manifest.json"
    assert verify(url) == []
    assert {name: tag for name, tag in ((f.name, f.tag) for f in storage.list_files(url)) if name in sent} == {
        name: tag for name, tag in stored.items() if name in sent
    }
    assert not notes.parent.exists()


def test_what_was_begun_for_one_url_overwrites_no_other(
    clips: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both work in NAME.partial; what the first one sent has the names of what the second URL holds already."""
    theirs, ours = "s3://films/b/same", "s3://films/a/same"
    pack(clips / "bbb_320x180_vp9.webm", theirs, SMALL)
    before = storage.list_files(theirs)
    upload = storage.upload

    def cut(path: Path, url: str) -> None:
        if url.endswith("manifest.json"):
            raise KeyboardInterrupt
        upload(path, url)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", cut)
        with pytest.raises(KeyboardInterrupt):
            pack(clips, ours, SMALL)
    for src in (clips, clips / "city_320x180_h264.mp4"):
        with pytest.raises(UserError, match="s3://films/b/same exists and is not empty"):
            pack(src, theirs, SMALL)
    assert storage.list_files(theirs) == before
    pack(clips, ours, SMALL)
    assert verify(ours) == [], "and what was begun goes on"


def test_a_whole_data_set_is_never_replaced_by_what_was_begun(
    clips: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This packing was interrupted; another one, from elsewhere, was finished at that URL since."""
    url = "s3://films/taken"
    upload = storage.upload

    def cut(path: Path, to: str) -> None:
        if to.endswith("manifest.json"):
            raise KeyboardInterrupt
        upload(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", cut)
        with pytest.raises(KeyboardInterrupt):
            pack(clips, url, SMALL)
    for file in storage.list_files(url):
        storage.remove(f"{url}/{file.name}")
    pack(clips / "bbb_320x180_vp9.webm", url, SMALL, work=here / "elsewhere")
    before = storage.list_files(url)
    with pytest.raises(UserError, match="s3://films/taken exists and is not empty"):
        pack(clips, url, SMALL)
    assert storage.list_files(url) == before


def test_slices_and_more_in_a_store(clips: Path, here: Path) -> None:
    url = "s3://films/slices"
    for number in range(2):
        pack(clips, url, SMALL, share=Slice(number, 2))
    with pytest.raises(UserError, match="does not exist"):
        load_manifest(url)
    before = merge(url).manifest
    assert verify(url) == []
    records = open_split(url, "train").records.tobytes()
    (here / "more").mkdir()
    shutil.copy(clips / "city_320x180_h264.mp4", here / "more" / "again.mp4")
    with pytest.raises(UserError, match=r"nothing new: all 1 files were rejected \(duplicate 1.*nothing was"):
        pack(here / "more", url, SMALL, append=True)
    with (here / "more" / "again.mp4").open("ab") as file:
        file.write(bytes([0, 0, 0, 8]) + b"free")
    after = pack(here / "more", url, SMALL, append=True).manifest
    assert after.history == (before.version(),)
    assert open_split(url, "train").records.tobytes().startswith(records)
    assert verify(url) == []


def test_a_store_is_repaired(clips: Path, here: Path) -> None:
    url = "s3://films/repaired"
    manifest = pack(clips, url, SMALL).manifest
    gone = manifest.splits["train"].shards[0]
    storage.remove(f"{url}/{gone.name}")
    assert any("cannot be read" in str(problem) for problem in verify(url))
    done = repair(url)
    assert done.after.splits["train"].num_samples == manifest.splits["train"].num_samples - gone.num_samples
    assert verify(url) == []


def test_a_store_that_says_no(clips: Path, here: Path, aws: Callable[..., None]) -> None:
    with pytest.raises(UserError, match=r"s3://nobucket/x.*check the URL and the credentials") as caught:
        pack(clips, "s3://nobucket/x", SMALL)
    assert "\n" not in str(caught.value)
    aws(AWS_SECRET_ACCESS_KEY="wrong")
    with pytest.raises(UserError, match="s3://films") as caught:
        pack(clips, "s3://films/denied", SMALL)
    assert "\n" not in str(caught.value)


def test_a_working_folder_is_for_urls(clips: Path, here: Path) -> None:
    with pytest.raises(UserError, match=r"--work is .*; it is for URLs only"):
        pack(clips, here / "data", SMALL, work=here)
