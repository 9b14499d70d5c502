"""When a step too many has failed, and what counts as a spike."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from pretrain.failures import FailureLadder, RollBack
from pretrain.sections import FailureConfig


def test_skips_far_apart_never_roll_back() -> None:
    ladder = FailureLadder(FailureConfig(max_skips=3, skip_window_steps=10))
    assert [ladder.skipped(step) for step in range(0, 100, 5)] == [None] * 20


def test_the_third_skip_within_the_window_rolls_back_before_the_first() -> None:
    ladder = FailureLadder(FailureConfig(max_skips=3, skip_window_steps=10))
    assert ladder.skipped(1) is None
    assert ladder.skipped(20) is None
    assert ladder.skipped(23) is None
    verdict = ladder.skipped(29)
    assert verdict is not None
    assert (verdict.first, verdict.stop) == (20, 30)


@given(st.sets(st.integers(0, 200), max_size=40), st.integers(1, 5), st.integers(1, 50))
def test_it_rolls_back_exactly_when_the_window_is_full(steps: set[int], max_skips: int, window: int) -> None:
    ladder = FailureLadder(FailureConfig(max_skips=max_skips, skip_window_steps=window))
    for step in sorted(steps):
        recent = [s for s in steps if step - window < s <= step]
        verdict = ladder.skipped(step)
        assert (verdict is not None) == (len(recent) >= max_skips)
        if verdict is not None:
            assert (verdict.first, verdict.stop) == (min(recent), step + 1)


def losses(num: int) -> list[float]:
    draw = random.Random(0)
    return [1.0 + 0.01 * draw.gauss(0, 1) for _ in range(num)]


def test_a_spike_rolls_back_with_the_step_before_it() -> None:
    ladder = FailureLadder(FailureConfig(spike_sigma=6, spike_window_steps=32))
    assert [ladder.applied(step, loss) for step, loss in enumerate(losses(100))] == [None] * 100
    verdict = ladder.applied(100, 1.5)
    assert isinstance(verdict, RollBack)
    assert (verdict.first, verdict.stop) == (99, 101)
    assert "sigma above its mean" in verdict.reason


def test_no_spike_before_the_window_is_full_and_none_downwards() -> None:
    ladder = FailureLadder(FailureConfig(spike_sigma=6, spike_window_steps=32))
    assert ladder.applied(0, 1e9) is None
    for step, loss in enumerate(losses(64), start=1):
        assert ladder.applied(step, loss) is None
    assert ladder.applied(65, 0.0) is None


def test_a_loss_that_stands_still_is_no_reason() -> None:
    ladder = FailureLadder(FailureConfig(spike_sigma=6, spike_window_steps=8))
    assert [ladder.applied(step, 2.0) for step in range(50)] == [None] * 50
    assert ladder.applied(50, 2.000001) is None


def test_without_sigma_nothing_is_a_spike() -> None:
    ladder = FailureLadder(FailureConfig(spike_window_steps=8))
    assert all(ladder.applied(step, 1.0 if step < 20 else 1e9) is None for step in range(40))


def test_skips_of_earlier_attempts_count() -> None:
    ladder = FailureLadder(FailureConfig(max_skips=3, skip_window_steps=10), [95, 3, 98])
    verdict = ladder.skipped(101)
    assert verdict is not None
    assert (verdict.first, verdict.stop) == (95, 102)
