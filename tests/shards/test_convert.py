from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards import convert
from shards.convert import Converter, Job, Outcome, converters, run_job
from shards.encode import Encoding
from shards.errors import UserError
from shards.probe import Limits

MakeVideo = Callable[..., Path]
ENCODING = Encoding(short_side=48, max_frames=64, min_frames=4)


def job(path: Path, folder: Path, preset: str = "train", **limits: Any) -> Job:
    folder.mkdir(exist_ok=True)
    return Job(str(path), str(folder), preset, ENCODING, Limits(**limits))


def unlimited() -> None:
    pass


def misbehave(action: str) -> list[str]:
    """A child that does `action` when the path holds the word bad, and else what the real one does."""
    code = (
        "import os, signal, sys, time\n"
        "from shards import convert\n"
        "real = convert.run_job\n"
        "def run_job(job, renew):\n"
        "    if 'bad' in job.path:\n"
        f"        {action}\n"
        "    return real(job, renew)\n"
        "convert.run_job = run_job\n"
        "convert.main()\n"
    )
    return [sys.executable, "-c", code]


def test_json_round_trips(tmp_path: Path, clips: Path) -> None:
    asked = job(clips / "sintel_320x180_h264.mp4", tmp_path / "out")
    assert Job.from_json(asked.to_json()) == asked
    outcome = run_job(asked, unlimited)
    assert len(outcome.pieces) == 3
    assert Outcome.from_json(outcome.to_json()) == outcome


def test_a_child_converts_several_files(make_video: MakeVideo, clips: Path, tmp_path: Path) -> None:
    good = make_video(tmp_path / "a.mp4", 32)
    (tmp_path / "b.mp4").write_text("hello")
    child = Converter()
    try:
        first = child.convert(job(good, tmp_path / "1"))
        second = child.convert(job(tmp_path / "b.mp4", tmp_path / "2"))
        third = child.convert(job(clips / "bbb_320x180_vp9.webm", tmp_path / "3"))
    finally:
        child.close()
    assert [piece.num_frames for piece in first.pieces] == [32]
    assert Path(first.pieces[0].file).stat().st_size > 100
    assert second.reason == "format"
    assert len(third.pieces) == 3
    for number in "123":
        assert (tmp_path / number / "outcome.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "reason", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crash", "SIGSEGV"),
        ("os._exit(7)", "crash", "exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "crash", "SIGKILL"),
        ("bytearray(1 << 40)", "crash", "exit code 1"),
        ("[None for _ in iter(int, 1)]", "cpu_limit", "1 CPU seconds"),
    ],
)
def test_a_death_rejects_one_file_only(
    make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, reason: str, words: str
) -> None:
    good = make_video(tmp_path / "a.mp4", 16)
    monkeypatch.setattr(convert, "COMMAND", misbehave(action))
    child = Converter()
    try:
        assert child.convert(job(good, tmp_path / "1")).reason == ""
        outcome = child.convert(job(tmp_path / "bad.mp4", tmp_path / "2", stall_cpu_s=1, memory_bytes=1 << 30))
        assert child.convert(job(good, tmp_path / "3")).reason == ""
    finally:
        child.close()
    assert (outcome.reason, outcome.pieces) == (reason, ())
    assert words in outcome.detail


def test_a_film_larger_than_the_memory_allowed(make_video: MakeVideo, tmp_path: Path) -> None:
    large = make_video(tmp_path / "a.mp4", 6, width=1920, height=1088, options={"crf": "40"})
    assert len(run_job(job(large, tmp_path / "0"), unlimited).pieces) == 1
    child = Converter()
    try:
        outcome = child.convert(job(large, tmp_path / "1", memory_bytes=8 << 20))
    finally:
        child.close()
    # FFmpeg often calls a failed allocation invalid data; what counts is that the limit held and the file is named.
    assert outcome.reason in ("memory", "damaged", "error", "crash")
    assert outcome.detail


def test_frames_renew_the_cpu_limit(clips: Path, tmp_path: Path) -> None:
    # Work that takes some CPU seconds in all, but never one without a frame, is left in peace.
    child = Converter()
    try:
        for number in range(4):
            asked = job(clips / "city_320x180_h264.mp4", tmp_path / str(number), stall_cpu_s=1)
            assert child.convert(asked).reason == ""
    finally:
        child.close()


def test_a_full_disk_is_no_fault_of_the_film(make_video: MakeVideo, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 16)
    asked = Job(str(path), "/proc/no_such_folder", "train", ENCODING, Limits())
    child = Converter()
    try:
        with pytest.raises(UserError, match="cannot be written"):
            child.convert(asked)
    finally:
        child.close()


def test_closing_ends_a_busy_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "COMMAND", misbehave("time.sleep(600)"))
    child = Converter()
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(child.convert(job(tmp_path / "bad", tmp_path / "1"))))
    thread.start()
    deadline_s = time.monotonic() + 30
    while child._child is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    child.close()
    thread.join(30)
    assert not thread.is_alive()
    assert outcomes[0].reason == "crash"


def test_a_child_ends_with_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orphan must not go on: its pipe closes when the parent dies."""
    monkeypatch.setattr(convert, "COMMAND", misbehave("time.sleep(600)"))
    child = Converter()
    process = child._start()
    assert process.stdin is not None
    process.stdin.write(job(tmp_path / "bad", tmp_path / "1").to_json() + "\n")
    process.stdin.flush()
    time.sleep(0.2)
    assert process.poll() is None
    process.stdin.close()  # what the death of the parent does
    assert process.wait(30) == 0


def test_several_children_share_the_work(make_video: MakeVideo, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 16)
    with converters(2) as submit:
        futures = [submit(job(path, tmp_path / str(number))) for number in range(5)]
        assert all(len(future.result(60).pieces) == 1 for future in futures)


def test_what_a_library_prints_does_not_spoil_the_answers(
    make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "COMMAND", misbehave("os.write(1, b'noise\\n'); print('more noise', flush=True)"))
    path = make_video(tmp_path / "bad.mp4", 16)
    child = Converter()
    try:
        assert len(child.convert(job(path, tmp_path / "1")).pieces) == 1
    finally:
        child.close()


# The preset that copies


def test_copy_keeps_the_file(clips: Path, tmp_path: Path) -> None:
    outcome = run_job(job(clips / "bbb_320x180_vp9.webm", tmp_path / "1", "copy"), unlimited)
    (piece,) = outcome.pieces
    assert piece.file == str(clips / "bbb_320x180_vp9.webm")
    assert (piece.num_frames, piece.width, piece.height, piece.grid) == (132, 320, 180, 0)
    assert piece.rate == pytest.approx(25)
    assert piece.motion > 0.5


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"rotation": 90}, "rotated"),
        ({"codec": "ffv1", "pixel_format": "yuv444p", "width": 65}, "yuv444p"),
        ({"codec": "ffv1", "pixel_format": "yuv420p", "width": 65, "height": 49}, "odd"),
        ({"pixel_aspect": __import__("fractions").Fraction(4, 3)}, "not square"),
        ({"tags": {"colorspace": 9}}, "neither BT.601 nor BT.709"),
    ],
)
def test_copy_refuses_what_needs_a_change(
    make_video: MakeVideo, tmp_path: Path, how: dict[str, Any], words: str
) -> None:
    path = make_video(tmp_path / ("a.mkv" if how.get("codec") else "a.mp4"), 16, **how)
    outcome = run_job(job(path, tmp_path / "1", "copy"), unlimited)
    assert outcome.reason == "copy"
    assert words in outcome.detail
    assert "--preset train" in outcome.detail


def test_copy_keeps_full_range(make_video: MakeVideo, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 16, pixel_format="yuvj420p")
    (piece,) = run_job(job(path, tmp_path / "1", "copy"), unlimited).pieces
    assert piece.full_range


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert run_job(job(tmp_path / "gone.mp4", tmp_path / "1"), unlimited).reason == "missing"
    (tmp_path / "folder.mp4").mkdir()
    assert run_job(job(tmp_path / "folder.mp4", tmp_path / "1"), unlimited).reason == "missing"


def test_an_unforeseen_error_is_a_rejection_with_its_name(
    make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("strange")

    monkeypatch.setattr(convert, "probe", broken)
    outcome = run_job(job(make_video(tmp_path / "a.mp4", 16), tmp_path / "1"), unlimited)
    assert outcome == Outcome(reason="error", detail="KeyError: 'strange'")


@pytest.mark.parametrize("module", ["convert", "manifest", "verify", "storage", "pack"])
def test_importing_it_does_not_import_torch(module: str) -> None:
    heavy = ("torch", "webdataset", "s3fs")
    code = f"import sys, shards.{module}; sys.exit(any(name in sys.modules for name in {heavy}))"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_address_space_is_limited_on_linux_only(
    make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On macOS the call fails; the child must convert all the same."""
    film = make_video(tmp_path / "a.mp4", 16)
    code = (
        "import resource, sys\n"
        "real = resource.setrlimit\n"
        "def setrlimit(what, limits):\n"
        "    if what == resource.RLIMIT_AS:\n"
        "        raise ValueError('current limit exceeds maximum limit')\n"
        "    real(what, limits)\n"
        "resource.setrlimit = setrlimit\n"
        "from shards import convert\n"
        "sys.platform = {platform!r}\n"
        "convert.main()\n"
    )
    for platform, reason in (("darwin", ""), ("linux", "crash")):
        monkeypatch.setattr(convert, "COMMAND", [sys.executable, "-c", code.format(platform=platform)])
        with converters(1) as submit:
            assert submit(job(film, tmp_path / platform)).result().reason == reason
