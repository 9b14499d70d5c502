"""What progress says, and how long it will still take."""

from __future__ import annotations

import pytest

from launch.progress import Remaining, duration, packing_progress
from shards.staging import PackProgress


def at(
    num_done: int, num_total: int, *, done_bytes: int = 0, total_bytes: int = 0, phase: str = "convert"
) -> PackProgress:
    return PackProgress(phase, num_done, num_total, 5, 1, done_bytes, total_bytes)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_time_left_is_the_rest_at_the_pace_so_far() -> None:
    clock = Clock()
    remaining = Remaining(clock)
    assert remaining.words(at(0, 10)) == "? left"
    clock.now_s += 20
    assert remaining.words(at(4, 10)) == "30 s left"
    assert remaining.words(at(10, 10)) == "done"


def test_what_was_there_before_does_not_make_it_faster() -> None:
    clock = Clock()
    remaining = Remaining(clock)
    assert remaining.words(at(900, 1000)) == "? left"
    clock.now_s += 60
    assert remaining.words(at(910, 1000)) == "9 min left"


def test_bytes_count_where_they_are_known() -> None:
    clock = Clock()
    remaining = Remaining(clock)
    remaining.words(at(0, 10, done_bytes=0, total_bytes=1000))
    clock.now_s += 10
    assert remaining.words(at(9, 10, done_bytes=100, total_bytes=1000)) == "2 min left"


def test_every_phase_has_its_own_pace() -> None:
    clock = Clock()
    remaining = Remaining(clock)
    remaining.words(at(0, 10))
    clock.now_s += 1000
    assert remaining.words(at(0, 10, phase="write")) == "? left"
    clock.now_s += 5
    assert remaining.words(at(5, 10, phase="write")) == "5 s left"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59, "59 s"), (90, "2 min"), (3600, "1 h 00 min"), (9000, "2 h 30 min"), (360_000, "4 days 4 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_plain_lines_say_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.progress.LINE_EVERY_S", 0.0)
    with packing_progress(quiet=False) as report:
        assert report is not None
        report(at(0, 10))
    assert capsys.readouterr().err == "convert 0/10  ? left  5 samples  1 rejected\n"
    with packing_progress(quiet=True) as report:
        assert report is None
