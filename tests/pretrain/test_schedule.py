from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.schedule import lr_at


def rates(steps: int, *, batch: int = 8, warmup_steps: int = 5) -> list[float]:
    return [
        lr_at(
            step * batch,
            batch=batch,
            warmup=warmup_steps * batch,
            total=steps * batch,
            peak_lr=1e-3,
            final_lr=1e-5,
        )
        for step in range(steps)
    ]


def test_warm_up_rises_evenly_to_the_peak():
    assert rates(20)[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])


def test_cosine_falls_from_the_peak_towards_the_final_rate():
    after = rates(105)[5:]
    assert after[0] == pytest.approx(1e-3)
    assert after[50] == pytest.approx((1e-3 + 1e-5) / 2)  # half-way
    assert all(later < earlier for earlier, later in itertools.pairwise(after))
    assert 1e-5 < after[-1] < 1.1e-5 + 1e-3 * (math.pi / 200) ** 2


def test_without_warm_up_the_first_step_has_the_peak():
    assert rates(10, warmup_steps=0)[0] == pytest.approx(1e-3)


def test_at_and_after_the_end_stands_the_final_rate():
    for position in (800, 900):
        rate = lr_at(position, batch=8, warmup=40, total=800, peak_lr=1e-3, final_lr=1e-5)
        assert rate == pytest.approx(1e-5)


@given(scale=st.integers(1, 1000), step=st.integers(0, 99))
def test_the_unit_of_counting_does_not_matter(scale: int, step: int):
    one = lr_at(step, batch=1, warmup=10, total=100, peak_lr=1.0, final_lr=0.1)
    many = lr_at(step * scale, batch=scale, warmup=10 * scale, total=100 * scale, peak_lr=1.0, final_lr=0.1)
    assert many == pytest.approx(one)


@given(
    position=st.integers(0, 10_000),
    batch=st.integers(1, 500),
    warmup=st.integers(0, 2_000),
    total=st.integers(1, 10_000),
)
def test_rates_stay_between_zero_and_the_peak(position: int, batch: int, warmup: int, total: int):
    assert 0 < lr_at(position, batch=batch, warmup=warmup, total=total, peak_lr=2.0, final_lr=0.5) <= 2.0
