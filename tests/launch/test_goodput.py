from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.goodput import PARTS, Started, goodput

T = 1.79e9


def row(attempt: int, at: float, kind: str, step: int, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "attempt": attempt, "time": T + at, "step": step, **values}


def train(attempt: int, at: float, step: int, step_s: float = 2.0, wait: float = 0.25) -> dict[str, Any]:
    return row(attempt, at, "train", step, step_s=step_s, data_wait_fraction=wait)


FIRST = [
    row(1, 20, "start", 0, setup_s=25.0),  # the process began 5 s before it took its number
    train(1, 40, 10),
    row(1, 45, "eval", 10, loss=1.0),
    row(1, 46, "save", 10, seconds=1.0, write_s=3.0),
    train(1, 66, 20),
]
"""Killed after step 20 with a checkpoint of step 10."""
SECOND = [
    row(2, 110, "start", 10, setup_s=10.0),
    train(2, 130, 20),
    train(2, 150, 30),
    row(2, 153, "save", 30, seconds=3.0),
]
STARTS = [
    Started(1, T + 0),
    Started(2, T + 100, T + 155, "finished", 30),
]


def test_every_second_is_in_one_part() -> None:
    result = goodput(STARTS, FIRST + SECOND)
    first, second = result.attempts
    assert first.seconds == pytest.approx(
        {
            "start_up": 25, "productive": 15, "data_wait": 5, "redone": 20, "saving": 1, "evaluating": 5,
            "down": 0, "unknown": 0,
        }
    )  # fmt: skip
    # a row was due at latest 20 s after the last one; what came then, nobody knows
    assert second.seconds == pytest.approx(
        {
            "start_up": 10, "productive": 30, "data_wait": 10, "redone": 0, "saving": 3, "evaluating": 0,
            "down": 14, "unknown": 20 + 2,
        }
    )  # fmt: skip
    assert result.wall_s == pytest.approx(160)
    assert result.ettr == pytest.approx(45 / 160)


def test_advice_follows_young_and_daly() -> None:
    result = goodput(STARTS, FIRST + SECOND)
    assert result.num_failures == 1
    assert result.time_between_failures_s == pytest.approx(160 - 14)
    assert result.save_s == 2.0
    assert result.interval_s == pytest.approx(math.sqrt(2 * 2.0 * 146))
    assert result.interval_steps == round(math.sqrt(2 * 2.0 * 146) / 2.0)
    slow = [*FIRST, row(2, 153, "save", 30, seconds=3.0, write_s=500.0)]
    assert goodput(STARTS, slow).interval_s == 500.0  # one write at a time


def test_without_a_failure_there_is_no_advice() -> None:
    result = goodput([Started(2, T + 100, T + 155, "finished", 30)], SECOND)
    assert (result.num_failures, result.time_between_failures_s, result.interval_s) == (0, None, None)


def test_the_newest_start_without_an_outcome_may_be_at_work() -> None:
    assert goodput([Started(1, T)], FIRST).num_failures == 0
    assert goodput([Started(1, T), Started(2, T + 100)], FIRST + SECOND).num_failures == 1


def test_a_range_that_is_stepped_over_takes_no_time() -> None:
    rows = [row(1, 0, "start", 0, setup_s=0.0), train(1, 20, 10), train(1, 30, 110, step_s=2.0, wait=0.0)]
    assert goodput([Started(1, T)], rows).seconds["productive"] == pytest.approx(15 + 10)


def test_steps_after_the_last_row_count_where_a_save_tells_of_them() -> None:
    rows = [row(1, 0, "start", 0, setup_s=0.0), train(1, 20, 10, wait=0.0), row(1, 29, "save", 14, seconds=1.0)]
    result = goodput([Started(1, T, T + 30, "stopped", 14)], rows)
    assert result.seconds["productive"] == pytest.approx(28)
    assert result.seconds["unknown"] == pytest.approx(1)


def test_what_is_missing_leaves_the_rest() -> None:
    assert goodput([], []).ettr is None
    assert goodput([], []).seconds == dict.fromkeys(PARTS, 0)
    died_early = goodput([Started(1, T, T + 12, "failed", 0)], [])  # no metrics at all: it never got to a step
    assert died_early.seconds == {**dict.fromkeys(PARTS, 0), "start_up": 12}
    no_files = goodput([Started(1), Started(2)], FIRST + SECOND)  # attempts/ was not copied
    assert no_files.seconds["productive"] == pytest.approx(45)
    bare = [row(1, 1, "start", 0), row(1, 3, "train", 1, step_s=None), train(1, 5, 2, wait=0.0)]
    parts = goodput([Started(1, T, T + 9, "failed")], bare).seconds
    assert (parts["start_up"], parts["productive"], parts["unknown"]) == pytest.approx((1, 2, 6))


def test_measured_evaluation_is_believed() -> None:
    rows = [row(1, 0, "start", 0, setup_s=0.0), row(1, 50, "eval", 0, seconds=4.0)]
    assert goodput([Started(1, T, T + 50, "failed")], rows).seconds["evaluating"] == 4.0


@given(
    st.lists(
        st.tuples(
            st.integers(1, 4),
            st.floats(0, 1000),
            st.sampled_from(["start", "train", "eval", "save", "event"]),
            st.integers(0, 50),
            st.one_of(st.none(), st.floats(0, 1e6)),
        ),
        max_size=30,
    ),
    st.lists(st.tuples(st.one_of(st.none(), st.floats(0, 1000)), st.one_of(st.none(), st.floats(0, 1000))), max_size=4),
)
def test_parts_are_never_negative_and_add_up(
    rows: list[tuple[int, float, str, int, float | None]], times: list[tuple[float | None, float | None]]
) -> None:
    told = [
        row(n, at, kind, step, step_s=value, seconds=value, setup_s=value, data_wait_fraction=value)
        for n, at, kind, step, value in rows
    ]
    started = [
        Started(
            n, None if begun is None else T + begun, None if ended is None else T + ended, "failed" if ended else ""
        )
        for n, (begun, ended) in enumerate(times, start=1)
    ]
    result = goodput(started, told)
    for attempt in result.attempts:
        assert set(attempt.seconds) == set(PARTS)
        assert min(attempt.seconds.values()) >= 0
    assert result.wall_s >= 0
    assert result.ettr is None or 0 <= result.ettr <= 1
