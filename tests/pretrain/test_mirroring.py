"""Sending beside training: the newest wins, trouble is told, what is being sent is not deleted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pretrain import mirroring
from pretrain.attempt import Superseded
from pretrain.mirror import MirrorReport, Stopped
from pretrain.mirroring import Mirroring
from pretrain.sections import CheckpointConfig

SETTINGS = CheckpointConfig(mirror="memory", keep=2)


class SlowMirror:
    """Sends when it is allowed to; `trouble` is raised once."""

    def __init__(self, url: str, run_dir: Path, attempt: int) -> None:
        self.sent: list[int] = []
        self.kept: list[Sequence[int]] = []
        self.go_on = threading.Event()
        self.trouble: BaseException | None = None
        assert (url, run_dir, attempt) == ("memory", Path("run"), 3)
        mirrors.append(self)

    def send(self, step: int, should_stop: Callable[[], bool]) -> MirrorReport:
        while not self.go_on.wait(0.01):
            if should_stop():
                raise Stopped("stopped")
        trouble, self.trouble = self.trouble, None
        if trouble is not None:
            raise trouble
        self.sent.append(step)
        return MirrorReport(3, 100, 0.5)

    def steps(self) -> list[int]:
        return sorted(self.sent, reverse=True)

    def keep(self, steps: Sequence[int], should_stop: Callable[[], bool]) -> None:
        assert not should_stop()
        self.kept.append(steps)


mirrors: list[SlowMirror] = []


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> tuple[Mirroring, SlowMirror]:
    mirrors.clear()
    monkeypatch.setattr(mirroring, "Mirror", SlowMirror)
    thread = Mirroring(Path("run"), 3, SETTINGS)
    return thread, mirrors[0]


def wait_for(is_so: Callable[[], Any]) -> None:
    end_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def end(thread: Mirroring) -> None:
    thread.finish()
    wait_for(lambda: thread.is_done)


def test_the_newest_wins_and_what_is_sent_stays(started: tuple[Mirroring, SlowMirror]) -> None:
    thread, mirror = started
    thread.offer(1)
    wait_for(lambda: thread._sending == 1)
    thread.offer(2)
    thread.offer(3)
    assert thread.pinned() == {1, 3}
    mirror.go_on.set()
    end(thread)
    assert mirror.sent == [1, 3]
    assert mirror.kept[-1] == [3, 1]
    assert [(event["event"], event["step"]) for event in thread.events()] == [("mirrored", 1), ("mirrored", 3)]
    assert thread.pinned() == set()


def test_trouble_is_told_and_the_next_one_is_sent(started: tuple[Mirroring, SlowMirror]) -> None:
    thread, mirror = started
    mirror.trouble = OSError("the network is away")
    mirror.go_on.set()
    thread.offer(1)
    wait_for(lambda: thread._events)
    thread.offer(2)
    end(thread)
    events = thread.events()
    assert [event["event"] for event in events] == ["mirror_failed", "mirrored"]
    assert events[0]["reason"] == "the network is away"
    assert mirror.sent == [2]


def test_it_ends_amid_a_send_when_time_is_up(started: tuple[Mirroring, SlowMirror]) -> None:
    thread, mirror = started
    thread.offer(1)
    wait_for(lambda: thread._sending == 1)
    thread.close()
    assert not thread._thread.is_alive()
    assert mirror.sent == []
    assert thread.events() == []


def test_a_newer_attempt_ends_this_one(started: tuple[Mirroring, SlowMirror]) -> None:
    thread, mirror = started
    mirror.trouble = Superseded("attempt 4 is at work")
    mirror.go_on.set()
    thread.offer(1)
    end(thread)
    with pytest.raises(Superseded):
        thread.events()
