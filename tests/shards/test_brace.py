"""Brace patterns: what shells and WebDataset make of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.brace import expand, is_pattern
from shards.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("plain.tar", ["plain.tar"]),
        ("x{000..002}.tar", ["x000.tar", "x001.tar", "x002.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{98..101}", ["98", "99", "100", "101"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{0..9..3}", ["0", "3", "6", "9"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("{a,{b,c{0..1}}d}", ["a", "bd", "c0d", "c1d"]),
        ("{abc}", ["{abc}"]),
        ("{a,}", ["a", ""]),
        (
            "s3://b/{train,val}-{00..01}.tar",
            ["s3://b/train-00.tar", "s3://b/train-01.tar", "s3://b/val-00.tar", "s3://b/val-01.tar"],
        ),
    ],
)
def test_what_patterns_stand_for(pattern: str, words: list[str]) -> None:
    assert expand(pattern) == words
    assert is_pattern(pattern) == (words != [pattern])


@given(st.integers(0, 2000), st.integers(0, 300), st.integers(1, 7))
def test_ranges_keep_their_zeros(first: int, length: int, width: int) -> None:
    last = first + length
    words = expand(f"a-{{{first:0{width}d}..{last:0{width}d}}}.tar")
    assert [int(word[2:-4]) for word in words] == list(range(first, last + 1))
    if len(str(first)) < width and len(str(last)) <= width:
        assert {len(word) for word in words} == {width + 6}


@pytest.mark.parametrize("pattern", ["a{0..3", "a{b,{c}", "{"])
def test_a_brace_left_open_is_named(pattern: str) -> None:
    with pytest.raises(UserError, match="does not close"):
        expand(pattern)


@pytest.mark.parametrize("pattern", ["{0..99999999999}", "{0..9999}{0..9999}", "{0..3..0}"])
def test_a_range_beyond_reason_is_refused_before_it_takes_memory(pattern: str) -> None:
    with pytest.raises(UserError, match="too many"):
        expand(pattern)
