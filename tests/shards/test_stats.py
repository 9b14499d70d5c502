"""What a data set holds: the figures against plain numpy, at any length, without holding the rows."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shards.stats
from shards.keys import Found
from shards.layout import RECORD_DTYPE, Manifest, Records, Shard
from shards.manifest import describe, load_manifest
from shards.pack import PackSummary
from shards.reader import open_split
from shards.stats import SplitStats, count_split, short, stats
from shards.withdraw import withdraw

LABELS = tuple(f"label {n}" for n in range(12))


def make_records(num: int, seed: int = 0) -> Records:
    rng = np.random.default_rng(seed)
    records = np.zeros(num, RECORD_DTYPE)
    records["num_frames"] = rng.integers(2, 3000, num)
    records["rate"] = rng.choice([24, 25, 30, 59.94], num)
    records["size"] = rng.lognormal(12, 2, num).clip(100, 2**31)
    records["width"], records["height"] = rng.choice([320, 640, 1920], num), rng.choice([240, 360], num)
    records["motion"] = rng.exponential(4, num)
    records["label"] = rng.integers(-1, len(LABELS), num)
    records["group"] = rng.integers(0, 2**32, num)
    records["level"] = rng.integers(0, 3, num)
    return records


def count(records: Records, num_withdrawn: int = 0) -> SplitStats:
    split = describe(np.array(records), "train.index", "", [Shard("a.tar", 10**9, len(records), "")])
    manifest = Manifest.make(preset="train", labels=LABELS, splits={"train": split})
    return count_split(manifest, "train", records, num_withdrawn)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 100), st.sampled_from([1, 7, 100, 5000]))
def test_figures_are_those_of_numpy(num: int, seed: int, at_a_time: int) -> None:
    records = make_records(num, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.stats, "ROWS_AT_A_TIME", at_a_time)
        found = count(records)
    seconds = records["num_frames"] / records["rate"].astype(np.float64)
    assert found.hours == pytest.approx(seconds.sum() / 3600)
    assert (found.num_samples, found.num_bytes) == (num, int(records["size"].sum(dtype=np.int64)))
    assert found.num_groups == len(np.unique(records["group"]))
    assert found.are_groups_exact
    assert sum(found.levels.values()) == num
    labels = {name: int((records["label"] == n).sum()) for n, name in enumerate(LABELS)}
    assert dict(found.labels) == {name: count for name, count in labels.items() if count}
    assert [count for _, count in found.labels] == sorted(dict(found.labels).values(), reverse=True)
    assert found.num_unlabelled == int((records["label"] < 0).sum())
    assert sum(count for _, count in found.sizes) == num
    truth: dict[str, Any] = {
        "duration": seconds,
        "rate": records["rate"],
        "short side": np.minimum(records["width"], records["height"]),
        "bytes per second": records["size"] / seconds,
        "motion": records["motion"],
    }
    for spread in found.distributions:
        values = truth[spread.name].astype(np.float64)
        assert sum(spread.counts) == num
        assert (spread.lowest, spread.highest) == pytest.approx((values.min(), values.max()))
        for share, quantile in ((0.05, spread.q05), (0.5, spread.median), (0.95, spread.q95)):
            exact = np.quantile(values, share, method="inverted_cdf")
            assert quantile == pytest.approx(exact, rel=0.06, abs=1.1e-3)
        assert list(spread.edges) == sorted(spread.edges)
        assert len(spread.edges) == len(spread.counts) + 1
        assert len(spread.counts) <= shards.stats.NUM_BARS
        assert len(spread.line()) <= 80


def test_groups_of_large_sets_are_counted_within_a_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.stats, "MOST_EXACT_GROUPS", 1000)
    monkeypatch.setattr(shards.stats, "GROUP_BITS", 20)
    records = make_records(200_000)
    records["group"] = records["group"] // 7 * 7  # some of them more than once
    found = count(records)
    assert not found.are_groups_exact
    assert found.num_groups == pytest.approx(len(np.unique(records["group"])), rel=0.01)


def test_memory_does_not_grow_with_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.stats, "ROWS_AT_A_TIME", 1 << 12)
    monkeypatch.setattr(shards.stats, "MOST_EXACT_GROUPS", 1)
    monkeypatch.setattr(shards.stats, "GROUP_BITS", 16)
    peaks: list[int] = []
    for num in (1 << 14, 1 << 18):
        make_records(num).tofile(tmp_path / f"{num}.index")
        records: Records = np.memmap(tmp_path / f"{num}.index", RECORD_DTYPE, "r")
        split = describe(np.array(records), "i", "", [])
        manifest = Manifest.make(preset="train", labels=LABELS, splits={"train": split})
        tracemalloc.start()
        count_split(manifest, "train", records, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_a_packed_data_set(packed: tuple[Path, PackSummary], tmp_path: Path) -> None:
    folder = shutil.copytree(packed[0], tmp_path / "data")
    withdraw(str(folder), [Found("train", 0, "k"), Found("train", 1, "k")])
    (folder / "rejected.jsonl").write_text(
        "".join(
            json.dumps({"path": p, "reason": r, "detail": ""}) + "\n"
            for p, r in [("a", "hdr"), ("b", "empty"), ("c", "hdr")]
        )
    )
    found = stats(str(folder))
    assert found.rejected == {"hdr": 2, "empty": 1}
    assert [split.name for split in found.splits] == ["train", "val"]
    train = found.splits[0]
    records = open_split(str(folder), "train").records
    assert (train.num_samples, train.num_withdrawn) == (len(records), 2)
    assert {name for name, _ in train.labels} == {"city", "bunny"}
    assert train.levels == {"every frame decoded": len(records)}
    assert train.num_groups == 2
    assert train.num_shard_bytes == sum(path.stat().st_size for path in folder.glob("train-*.tar"))
    lines = found.lines()
    assert max(map(len, lines[1:])) <= 80
    text = "\n".join(lines)
    for words in ("minutes", "duration, s", "withdrawn: 2", "rejected 3: hdr 2, empty 1", "labels: ", "groups: 2"):
        assert words in text
    assert found.to_json()["splits"][0]["num_samples"] == len(records)
    assert load_manifest(str(folder)).hash == packed[1].manifest.hash


def test_numbers_are_short() -> None:
    for value in (0, 1e-3, 0.123456, 1, 999, 999.9, 1000, 999_999, 1e6, 123_456_789, 9.99e14):
        assert len(short(value)) <= 6
    assert (short(1500), short(2.5e9), short(25)) == ("1.5k", "2.5G", "25")
