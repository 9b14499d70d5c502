from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.asyn import get_loop

from shards import loop, retry, storage
from shards.errors import UserError
from shards.retry import bare, persist


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A memory file system under memory://, with 1,000 bytes in memory://box/a."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    filesystem: Any = fsspec.filesystem("memory")
    filesystem.pipe("/box/a", bytes(range(250)) * 4)
    yield filesystem
    filesystem.rm("/box", recursive=True)


def test_a_local_range(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    assert storage.read_range(str(tmp_path / "a"), 3, 4) == b"3456"
    assert storage.read_range(f"file://{tmp_path}/a", 0, 10) == b"0123456789"
    assert storage.read_range(str(tmp_path / "a"), 10, 0) == b""
    with pytest.raises(storage.ShortReadError, match="ends at 10"):
        storage.read_range(str(tmp_path / "a"), 8, 4)
    with pytest.raises(FileNotFoundError):
        storage.read_range(str(tmp_path / "b"), 0, 1)


def test_a_remote_range(remote: Any) -> None:
    assert storage.read_range("memory://box/a", 2, 3) == bytes([2, 3, 4])
    assert storage.read_bytes("memory://box/a") == bytes(range(250)) * 4
    assert storage.size_and_tag("memory://box/a")[0] == 1000
    assert storage.exists("memory://box/a")
    assert not storage.exists("memory://box/b")


def test_faults_are_tried_again_and_counted(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, faults = storage._call, [OSError("503 slow down"), TimeoutError(), OSError("connection reset")]

    def flaky(*arguments: Any, **named: Any) -> Any:
        if faults:
            raise faults.pop(0)
        return real(*arguments, **named)

    monkeypatch.setattr(storage, "_call", flaky)
    before = replace(storage.counters)
    assert storage.read_range("memory://box/a", 0, 2) == b"\x00\x01"
    assert storage.counters.num_retries - before.num_retries == 3
    assert storage.counters.num_reads - before.num_reads == 4
    assert storage.counters.num_bytes - before.num_bytes == 2
    assert storage.counters.num_throttled - before.num_throttled == 1


def test_a_short_body_is_asked_for_again(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, cuts = storage._call, [1, 2]
    monkeypatch.setattr(storage, "_call", lambda *a, **n: real(*a, **n)[: cuts.pop() if cuts else None])
    assert storage.read_range("memory://box/a", 0, 5) == bytes(range(5))
    assert not cuts


def test_the_deadline_ends_it(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **named: Any) -> Any:
        raise OSError("503")

    monkeypatch.setattr(storage, "_call", broken)
    before = storage.counters.num_failures
    start_s = time.monotonic()
    with pytest.raises(OSError, match=r"gave up after 0\.3 s.*503"):
        storage.read_range("memory://box/a", 0, 5, deadline_s=0.3)
    assert time.monotonic() - start_s < 5
    assert storage.counters.num_failures - before == 1


def test_a_cut_object_stays_short(remote: Any) -> None:
    with pytest.raises(storage.ShortReadError):
        storage.read_range("memory://box/a", 995, 10, deadline_s=0.2)


@pytest.mark.parametrize("fault", [FileNotFoundError("gone"), PermissionError("403"), TypeError("a bug of ours")])
def test_what_no_patience_mends_is_raised_at_once(
    remote: Any, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    calls: list[int] = []

    def broken(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        raise fault

    monkeypatch.setattr(storage, "_call", broken)
    with pytest.raises(type(fault)):
        storage.read_range("memory://box/a", 0, 5)
    assert len(calls) == 1


def test_an_unknown_protocol_is_the_users_matter() -> None:
    with pytest.raises(UserError, match="nonsense://x"):
        storage.read_range("nonsense://x", 0, 1)


def test_an_atomic_write_leaves_the_old_file_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    storage.write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            storage.write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    storage.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_urls() -> None:
    assert storage.join("s3://bucket/data/", "a.tar") == "s3://bucket/data/a.tar"
    assert storage.parent("s3://bucket/data/manifest.json") == "s3://bucket/data"
    assert storage.parent("manifest.json") == "."
    assert storage.parent("/manifest.json") == "/"
    assert storage.join("/", "a") == "/a"
    assert storage.local_path("s3://b/a") is None
    assert storage.local_path("file:///b/a") == Path("/b/a")


def test_a_local_file_that_was_written_again(tmp_path: Path) -> None:
    url = str(tmp_path / "a")
    storage.write_bytes(url, b"0123")
    _, tag = storage.size_and_tag(url)
    assert storage.read_range(url, 1, 2, tag=tag) == b"12"
    storage.write_bytes(url, b"4567")
    os.utime(url, ns=(1, 1))
    with pytest.raises(storage.ChangedObjectError, match="written again"):
        storage.read_range(url, 1, 2, tag=tag)


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_write_upload_list_remove(tmp_path: Path, remote: Any, scheme: str) -> None:
    folder = str(tmp_path / "out") if scheme == "local" else "memory://box/out"
    assert storage.list_files(folder) == []
    source = tmp_path / "source"
    source.write_bytes(b"x" * 10)
    storage.upload(source, f"{folder}/deep/b.tar")
    storage.write_bytes(f"{folder}/a.json", b"{}")
    storage.write_bytes(f"{folder}/empty", b"")
    files = storage.list_files(folder)
    assert [(file.name, file.num_bytes) for file in files] == [("a.json", 2), ("deep/b.tar", 10), ("empty", 0)]
    assert storage.read_bytes(f"{folder}/deep/b.tar") == b"x" * 10
    if scheme == "local":
        assert [file.tag for file in files] == [storage.size_and_tag(f"{folder}/{file.name}")[1] for file in files]
    storage.remove(f"{folder}/a.json")
    storage.remove(f"{folder}/a.json")
    assert [file.name for file in storage.list_files(folder)] == ["deep/b.tar", "empty"]


def test_a_failed_local_upload_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 10)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        storage.upload(source, str(tmp_path / "out" / "a"))
    assert list((tmp_path / "out").iterdir()) == []


def test_temporary_files_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".a.tar.1.2.tmp").write_bytes(b"half")
    (tmp_path / "a.tar").write_bytes(b"whole")
    assert [file.name for file in storage.list_files(str(tmp_path))] == ["a.tar"]


def test_no_secret_of_a_url_in_an_error(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **named: Any) -> Any:
        raise OSError("cannot reach https://me:canary@host/a?token=canary&x=1 now")

    monkeypatch.setattr(storage, "_call", broken)
    with pytest.raises(OSError, match=r"memory://box/a: gave up.*https://host/a now") as caught:
        storage.read_range("memory://me:canary@box/a?key=canary", 0, 5, deadline_s=0.05)
    assert "canary" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("secret", ["canary", "c@nary", "can:ary", "@canary@"])
def test_a_password_with_odd_letters_is_left_out(secret: str) -> None:
    told = bare(f"cannot reach 'https://me:{secret}@host/a@b' nor https://host/c@d")
    assert told == "cannot reach 'https://host/a@b' nor https://host/c@d"


def test_an_event_loop_that_is_stuck_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of a request is kept by the loop itself: who waits in a thread must not rely on it alone."""
    go_on, is_stuck = threading.Event(), threading.Event()

    def block() -> None:
        is_stuck.set()
        go_on.wait(60)

    async def answer() -> int:
        return 1

    monkeypatch.setattr(loop, "LATE_S", 0.01)
    get_loop().call_soon_threadsafe(block)
    assert is_stuck.wait(10)
    try:
        with pytest.raises(TimeoutError, match="event loop"):
            loop.on_loop(answer(), 0.01)
        assert not go_on.is_set()
    finally:
        go_on.set()
    assert loop.on_loop(answer(), 30) == 1


def test_who_waits_is_told_why_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.retry.SILENT_S", 0.0)

    def attempt(limit_s: float) -> bytes:
        raise OSError("no route to host")

    with pytest.raises(OSError, match="gave up"):
        persist("s3://user:word@films/a", attempt, 1.0, 0.5)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "does not answer" in line
    assert "no route to host" in line
    assert "word" not in line
