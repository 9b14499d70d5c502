"""Packing is killed at random moments, at every step, and goes on: the bytes are those of an uninterrupted packing."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shards import destination
from shards import pack as packing
from shards.errors import UserError
from shards.pack import PackOptions, PackProgress, pack

MakeVideo = Callable[..., Path]
SMALL = PackOptions(short_side=32, max_frames=16, min_frames=8, workers=2, shard_bytes=10_000)
ROOT = Path(__file__).resolve().parents[2]
NUM_KILLS = 20


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def films(make_video: MakeVideo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films") / "src"
    for number in range(3):
        make_video(folder / f"{number}.mp4", 60 + number, width=96, height=64)
    (folder / "broken.mp4").write_text("hello")
    return folder


@pytest.fixture(scope="module")
def whole(films: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of an uninterrupted packing."""
    folder = tmp_path_factory.mktemp("whole") / "data"
    pack(films, folder, SMALL)
    return hashes(folder)


def start(films: Path, dst: Path) -> subprocess.Popen[bytes]:
    """The real command, as the leader of a process group."""
    words = ["pack", films, dst, "--short-side=32", "--max-frames=16", "--min-frames=8", "--workers=2"]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *map(str, words), "--shard-bytes=10000", "--json"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.slow
def test_killed_twenty_times_at_random(films: Path, whole: dict[str, str], tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    start_s = time.monotonic()
    assert start(films, tmp_path / "data").wait(60) == 0
    usual_s = time.monotonic() - start_s
    assert hashes(tmp_path / "data") == whole
    num_kills = number = 0
    while num_kills < NUM_KILLS:
        dst = tmp_path / f"data{number}"
        process = start(films, dst)
        try:
            process.wait(chance.uniform(0.1, 1.1) * usual_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            num_kills += 1
        else:
            assert process.stderr is not None
            assert process.returncode == 0, f"seed {seed}: {process.stderr.read()!r}"
            assert hashes(dst) == whole, f"seed {seed}, {num_kills} kills"
            assert not dst.with_name(f"{dst.name}.partial").exists()
            number += 1
    process = start(films, tmp_path / f"data{number}")
    assert process.wait(60) == 0
    assert hashes(tmp_path / f"data{number}") == whole, f"seed {seed}"


class Killed(BaseException):
    """Stands for a kill: nothing that the code does afterwards may be needed."""


STEPS: list[tuple[Any, str]] = [
    (packing, "write_tars"),
    (packing, "build_manifest"),
    (packing, "rejected_text"),
    (packing, "load_manifest"),
    (destination.Destination, "take"),
]


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=lambda value: value if isinstance(value, str) else "")
def test_killed_at_every_step(
    films: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    is_after: bool,
) -> None:
    original = getattr(owner, name)

    def killed(*arguments: Any, **named: Any) -> Any:
        if is_after:
            made = original(*arguments, **named)
            if name == "write_tars":
                next(made)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            pack(films, tmp_path / "data", SMALL)
    summary = pack(films, tmp_path / "data", SMALL)
    expected = "is packed already" if name == "take" and is_after else "packed 3 of 4 files"
    assert expected in summary.lines()[0]
    assert hashes(tmp_path / "data") == whole
    assert not (tmp_path / "data.partial").exists()


def test_killed_while_it_cleans_up(
    films: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data set is there, the working folder half gone: the same command removes the rest."""
    remove = shutil.rmtree

    def killed(path: Path, **named: Any) -> None:
        remove(path / "staging" if path.name.endswith(".partial") else path, **named)
        if path.name.endswith(".partial"):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            pack(films, tmp_path / "data", SMALL)
    assert (tmp_path / "data.partial").exists()
    for _ in range(2):  # also killed after the very last step
        assert "is packed already" in pack(films, tmp_path / "data", SMALL).lines()[0]
        assert hashes(tmp_path / "data") == whole
        assert not (tmp_path / "data.partial").exists()
    with pytest.raises(UserError, match="exists and is not empty"):
        pack(films, tmp_path / "data", replace(SMALL, seed=1))


def test_tars_that_were_finished_are_not_written_again(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(destination.Destination, "take", _fail)
        with pytest.raises(Killed):
            pack(films, tmp_path / "data", SMALL)
    seen: list[PackProgress] = []
    pack(films, tmp_path / "data", SMALL, seen.append)
    assert seen == []


def test_what_changed_since_the_kill_counts(
    make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        make_video(tmp_path / "src" / f"{number}.mp4", 20, width=32, height=32)
    with monkeypatch.context() as patch:
        patch.setattr(destination.Destination, "take", _fail)
        with pytest.raises(Killed):
            pack(tmp_path / "src", tmp_path / "data", SMALL)
    make_video(tmp_path / "src" / "2.mp4", 20, width=32, height=32)
    assert pack(tmp_path / "src", tmp_path / "data", SMALL).num_files == 3
    pack(tmp_path / "src", tmp_path / "fresh", SMALL)
    assert hashes(tmp_path / "data") == hashes(tmp_path / "fresh")


def test_a_disk_that_fills_up_while_tars_are_written(
    films: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tar"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"No space left on device.*free some space and start again") as caught:
            pack(films, tmp_path / "data", SMALL)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()
    assert pack(films, tmp_path / "data", SMALL).num_reused == 4
    assert hashes(tmp_path / "data") == whole


def _fail(*arguments: Any, **named: Any) -> None:
    raise Killed
