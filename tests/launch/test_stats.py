"""The picture of a data set: whole, escaped, without anything from outside."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from launch.stats import charts, drawing, page, picture
from shards.errors import UserError
from shards.stats import Stats, stats

EVIL = '<script>alert("x")</script>&'


@pytest.fixture(scope="module")
def found(packed: Path) -> Stats:
    """With names that are not to be trusted."""
    counted = stats(str(packed))
    splits = tuple(
        dataclasses.replace(split, labels=((EVIL, 3), ("cat", 1)), num_withdrawn=2) for split in counted.splits
    )
    return dataclasses.replace(counted, url=f"data/{EVIL}", splits=splits, rejected={EVIL: 4})


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not {"src", "href", "onload"} & {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_shows_every_split_and_trusts_no_name(found: Stats) -> None:
    tags = Tags()
    tags.feed(page(found))
    assert "script" not in tags.seen
    assert tags.seen.count("svg") == sum(len(charts(split)) for split in found.splits)
    for words in ("train", "val", "withdrawn: 2", "every frame decoded", "Rejected", "tubelet stats"):
        assert words.lower() in tags.words.lower()


def test_every_chart_is_drawn_within_its_frame(found: Stats) -> None:
    for split in found.splits:
        drawn = dict(charts(split))
        assert len(drawn) == 7  # five measures, sizes, labels
        for svg in drawn.values():
            root = ElementTree.fromstring(svg)
            width, height = map(float, root.attrib["viewBox"].split()[2:])
            bars = root.findall("rect")
            assert bars
            for bar in bars:
                x, y, wide, high = (float(bar.attrib[name]) for name in ("x", "y", "width", "height"))
                assert x >= 0
                assert y >= 0
                assert x + wide <= width
                assert y + high <= height
                assert bar.find("title") is not None


def test_heights_are_counts(found: Stats) -> None:
    split = found.splits[0]
    (_, svg), spread = charts(split)[0], split.distributions[0]
    heights = [float(bar.attrib["height"]) for bar in ElementTree.fromstring(svg).findall("rect")]
    assert heights == pytest.approx([h * max(heights) / max(spread.counts) for h in spread.counts], abs=0.06)


def test_the_drawing_is_one_svg(found: Stats) -> None:
    root = ElementTree.fromstring(drawing(found))
    name = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{name}svg")) == sum(len(charts(split)) for split in found.splits)
    assert root.find(f"{name}script") is None


def test_the_kind_is_told_by_the_name(found: Stats, tmp_path: Path) -> None:
    picture(found, tmp_path / "a.html")
    picture(found, tmp_path / "a.svg")
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "a.svg").read_text().startswith("<svg xmlns=")
    with pytest.raises(UserError, match=r"a.png; it must end with .html or .svg"):
        picture(found, tmp_path / "a.png")
    with pytest.raises(UserError, match="it cannot be written"):
        picture(found, tmp_path / "no" / "a.svg")
