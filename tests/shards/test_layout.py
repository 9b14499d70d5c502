from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.layout import (
    RECORD_DTYPE,
    Manifest,
    Shard,
    Split,
    Version,
    group_number,
    index_name,
    sample_key,
    shard_name,
    spread_name,
)

NAMES = st.text(alphabet="abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=12)
COUNTS = st.integers(0, 2**63 - 1)
SHARDS = st.builds(
    Shard, name=NAMES.map(lambda name: f"{name}.tar"), num_bytes=COUNTS, num_samples=COUNTS, sha256=NAMES
)
SPLITS = st.builds(
    Split,
    index=NAMES.map(index_name),
    num_samples=COUNTS,
    num_frames=COUNTS,
    min_frames=COUNTS,
    max_frames=COUNTS,
    max_pixels=COUNTS,
    max_bytes=COUNTS,
    sha256=NAMES,
    shards=st.lists(SHARDS, max_size=4).map(tuple),
)


@given(labels=st.lists(st.text(max_size=20), max_size=5).map(tuple), splits=st.dictionaries(NAMES, SPLITS, max_size=3))
def test_a_manifest_survives_json(labels: tuple[str, ...], splits: dict[str, Split]) -> None:
    manifest = Manifest.make(preset="train", labels=labels, splits=splits)
    assert Manifest.from_json(manifest.to_json(), "here") == manifest
    assert Manifest.from_json(manifest.to_json().encode(), "here").hash == manifest.hash


@given(splits=st.dictionaries(NAMES, SPLITS, min_size=1, max_size=2), data=st.data())
def test_every_number_counts_for_the_hash(splits: dict[str, Split], data: st.DataObject) -> None:
    manifest = Manifest.make(preset="train", labels=(), splits=splits)
    name = data.draw(st.sampled_from(sorted(splits)))
    field = data.draw(st.sampled_from(["num_samples", "num_frames", "max_pixels", "max_bytes"]))
    changed = replace(splits[name], **{field: getattr(splits[name], field) + 1})
    assert Manifest.make(preset="train", labels=(), splits={**splits, name: changed}).hash != manifest.hash


def test_the_order_of_splits_does_not_change_the_hash() -> None:
    split = Split("a.index", 1, 2, 2, 2, 4, 5, "h", ())
    first = Manifest.make(preset="train", labels=("x",), splits={"a": split, "b": split})
    second = Manifest.make(preset="train", labels=("x",), splits={"b": split, "a": split})
    assert first.hash == second.hash


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda row: row.update(preset="copy"), "does not match its own hash"),
        (lambda row: row.update(format=99), "format 99"),
        (lambda row: row.pop("splits"), "damaged"),
        (lambda row: row.pop("format"), "no manifest"),
    ],
)
def test_a_changed_manifest_is_refused(edit: object, words: str) -> None:
    row = json.loads(Manifest.make(preset="train", labels=(), splits={}).to_json())
    edit(row)
    with pytest.raises(UserError, match=words):
        Manifest.from_json(json.dumps(row), "here/manifest.json")


def test_what_is_not_used_leaves_no_trace() -> None:
    """So that manifests written before there were tags and versions keep their hash."""
    split = Split("a.index", 1, 2, 2, 2, 4, 5, "h", (Shard("a.tar", 1, 1, "h"),))
    manifest = Manifest.make(preset="train", labels=("x",), splits={"a": split})
    assert manifest.hash == "2af002ac5b4af3ef6764527e23d3bdf48861ac49fb9ed3befeeae35fbfc76803"
    assert "history" not in json.loads(manifest.to_json())
    assert "tag" not in manifest.to_json()


def test_history_and_tags_survive_json() -> None:
    split = Split(
        "a.index", 1, 2, 2, 2, 4, 5, "h", (Shard("s3://b/a.tar", 1, 1, "", "etag"), Shard("c.tar", 1, 1, "h"))
    )
    old = Manifest.make(preset="train", labels=(), splits={"a": split})
    new = Manifest.make(preset="train", labels=(), splits={"a": split}, history=(old.version(),))
    assert Manifest.from_json(new.to_json(), "here") == new
    assert new.history == (Version(old.hash, {"a": 1}),)
    assert new.hash != old.hash


@pytest.mark.parametrize("name", ["s3://b/a.index", "../a.index", "/a.index"])
def test_an_index_lies_in_the_folder(name: str) -> None:
    text = Manifest.make(preset="train", labels=(), splits={"a": Split(name, 1, 2, 2, 2, 4, 5, "h", ())}).to_json()
    with pytest.raises(UserError, match="outside its folder"):
        Manifest.from_json(text, "here")


@pytest.mark.parametrize("name", ["../other.tar", "/etc/passwd", "a/../../b.tar"])
def test_a_manifest_that_names_files_outside_is_refused(name: str) -> None:
    split = Split("a.index", 1, 2, 2, 2, 4, 5, "h", (Shard(name, 1, 1, "h"),))
    text = Manifest.make(preset="train", labels=(), splits={"a": split}).to_json()
    with pytest.raises(UserError, match="outside its folder"):
        Manifest.from_json(text, "here")


def test_text_that_is_no_manifest_is_refused() -> None:
    for text in ("", "hello", "[]", "{}", "null"):
        with pytest.raises(UserError, match="no manifest"):
            Manifest.from_json(text, "here")


def test_a_record_has_48_bytes_in_a_fixed_order() -> None:
    assert RECORD_DTYPE.itemsize == 48
    record = np.zeros(1, RECORD_DTYPE)
    record["offset"], record["label"], record["full_range"] = 0x0102030405060708, -1, 1
    data = record.tobytes()
    assert data[:8] == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    assert data[28:32] == b"\xff" * 4
    assert data[45] == 1


def test_names() -> None:
    assert shard_name("train", 3) == "train-000003.tar"
    assert sample_key("val", 12) == "val-000000012"
    assert "." not in sample_key("val", 12)
    assert sample_key("val", 12, "0003-of-0016") == "val-0003-of-0016-000000012"
    assert index_name("val", "0123456789abcdef") == "val-0123456789ab.index"
    assert group_number("a") != group_number("b")


def test_object_stores_get_many_prefixes() -> None:
    names = [spread_name(shard_name("train", number)) for number in range(2000)]
    assert all(name[2:] == f"/{shard_name('train', number)}" for number, name in enumerate(names))
    assert len({name[:2] for name in names}) == 256
