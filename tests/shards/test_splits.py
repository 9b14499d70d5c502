from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from shards.sources import Source
from shards.splits import choose_splits


def source(name: str, group: str | None = None, split: str | None = None) -> Source:
    return Source(Path(name), name, None, split, group or name)


NAMES = st.lists(st.text(alphabet="abcdefgh/", min_size=1, max_size=6), unique=True, min_size=1, max_size=60)


@given(names=NAMES, fraction=st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_both_parts_exist_where_they_can(names: list[str], fraction: float) -> None:
    rule = choose_splits([source(name) for name in names], fraction)
    assert set(rule.split_of) == set(names)
    parts = set(rule.split_of.values())
    assert "train" in parts
    assert ("val" in parts) == (len(names) >= 2 and fraction > 0)


@given(names=NAMES)
def test_a_group_is_never_torn(names: list[str]) -> None:
    rule = choose_splits([source(f"{name}{take}", group=name) for name in names for take in range(3)], 0.5)
    for name in names:
        assert len({rule.split_of[f"{name}{take}"] for take in range(3)}) == 1


def test_more_files_move_no_other() -> None:
    few = choose_splits([source(f"film{number}") for number in range(200)], 0.1).split_of
    many = choose_splits([source(f"film{number}") for number in range(1000)], 0.1).split_of
    assert all(many[name] == split for name, split in few.items())
    share = sum(split == "val" for split in many.values()) / 1000
    assert 0.07 < share < 0.13


def test_given_splits_stay() -> None:
    sources = [source("a", split="test"), source("b", split="train"), source("c", group="b")]
    rule = choose_splits(sources, 0.1)
    assert rule.split_of == {"a": "test", "b": "train", "c": "train"}
    assert rule.text == "splits: as given"
    assert rule.warnings == ()


def test_a_missing_part_is_filled_from_what_is_free() -> None:
    rule = choose_splits([source("a", split="train"), source("b", split="train"), source("c")], 0.1)
    assert rule.split_of["c"] == "val"
    rule = choose_splits([source("a", split="val"), source("b")], 0.1)
    assert rule.split_of["b"] == "train"


def test_a_group_in_two_given_splits_is_a_leak() -> None:
    rule = choose_splits([source("a", "film", "train"), source("b", "film", "val")], 0.1)
    assert "held-out data leaks" in rule.warnings[0]
    assert "'film'" in rule.warnings[0]


def test_the_rule_is_said() -> None:
    rule = choose_splits([source("a"), source("b")], 0.1)
    assert rule.text == "splits: by source file, fixed by a hash of its name, 10% to val: 1 train, 1 val"
    assert "by group" in choose_splits([source("a", "x"), source("b", "y")], 0.1).text
    assert "one alone cannot be split" in choose_splits([source("a")], 0.1).text
