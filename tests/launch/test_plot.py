from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.bars import Bar, bars_card, stacked
from launch.plot import MAX_POINTS, Curve, duration, nice_ticks, number, percent, plot, step_ticks, thinned

FINITE = st.floats(-1e12, 1e12, allow_nan=False)


@given(FINITE, FINITE)
def test_ticks_are_few_rising_and_enclose(one: float, two: float) -> None:
    low, high = sorted((one, two))
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    slack = 1e-9 * max(1.0, abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack


@given(st.integers(0, 10**7), st.integers(1, 10**7))
def test_step_ticks_are_whole_steps_inside(first: int, length: int) -> None:
    ticks = step_ticks(first, first + length)
    assert len(ticks) >= 2
    assert all(first <= tick <= first + length and tick == int(tick) for tick in ticks)


@given(st.lists(FINITE, min_size=1, max_size=1000))
def test_thinning_keeps_ends_range_and_means(values: list[float]) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    thin = thinned(points)
    assert len(thin) <= MAX_POINTS
    assert min(bottom for *_, bottom, _ in thin) == min(values)
    assert max(top for *_, top in thin) == max(values)
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert all(bottom - slack <= mean <= top + slack for _, mean, bottom, top in thin)


@given(st.lists(FINITE, min_size=1, max_size=600))
def test_chart_is_well_formed_and_stays_inside(values: list[float]) -> None:
    curve = Curve('a "name" <b>', [(float(step), value) for step, value in enumerate(values)])
    svg = ElementTree.fromstring(plot([curve], title='"<title>"'))
    (line,) = [path for path in svg.iter("path") if path.get("class") == "line"]
    numbers = [float(part) for place in line.attrib["d"][1:].split("L") for part in place.split(" ")]
    assert all(math.isfinite(value) and -1 <= value <= 461 for value in numbers)


def test_chart_of_zeros_stands_on_the_ground() -> None:
    svg = plot([Curve("none", [(1, 0.0), (2, 0.0)])], from_zero=True)
    assert ">1</text>" in svg
    assert ">-" not in svg


def test_bars_fill_their_row() -> None:
    bars = [Bar("a <b>", (1.0, 0.0, 3.0), "4 s"), Bar("c", (0.0, 2.0, 0.0))]
    for are_shares, widths in ((False, [83.5, 250.5, 167.0]), (True, [83.5, 250.5, 334.0])):
        svg = ElementTree.fromstring(
            stacked(bars, ["c0", "c1", "c2"], ["x", "y", ""], title="t", are_shares=are_shares)
        )
        assert [float(box.attrib["width"]) for box in svg.iter("rect")] == widths
    card = bars_card("<t>", bars, ["x", "", "<z>"], ["c0", "c1", "c2"])
    assert card.count("<span") == 2
    assert "&lt;z&gt;" in card
    assert "a &lt;b&gt;" in card


@pytest.mark.parametrize(
    ("value", "text"), [(1.5, "1.5 s"), (119, "119 s"), (150, "2.5 min"), (9000, "2.5 h"), (216_000, "2.5 days")]
)
def test_durations_are_in_the_unit_that_fits(value: float, text: str) -> None:
    assert duration(value) == text.replace(" ", "\N{NO-BREAK SPACE}")


def test_chart_without_points_is_nothing() -> None:
    assert plot([Curve("empty", [])]) == ""
    assert plot([]) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.000123, "0.000123"),
        (1.23456, "1.23"),
        (1234.0, "1234"),
        (12_345, "12.3k"),
        (2.5e6, "2.5M"),
        (-3e9, "-3G"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.5, "50"), (0.1234, "12.3"), (0.00123, "0.12"), (1, "100")])
def test_percents_are_short(value: float, text: str) -> None:
    assert percent(value) == f"{text}\N{NO-BREAK SPACE}%"
