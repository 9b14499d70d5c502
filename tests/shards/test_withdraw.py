"""Samples withdrawn by key, source or group: exactly those, written down whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import shutil
import tarfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import storage
from shards.errors import SampleError, UserError
from shards.foreign import IndexOptions, index_foreign
from shards.keys import Found, find_samples
from shards.layout import Manifest
from shards.manifest import describe, load_manifest
from shards.pack import PackOptions, PackSummary, pack
from shards.reader import open_split
from shards.withdraw import read_withdrawals, withdraw, withdrawn


@pytest.fixture
def data(packed: tuple[Path, PackSummary], tmp_path: Path) -> Path:
    return shutil.copytree(packed[0], tmp_path / "data")


def facts_of(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(split, key) -> KEY.json of every sample, read with nothing of ours."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in folder.rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    row = json.loads(file.read())
                    found[row["split"], member.name.removesuffix(".json")] = row
    return found


def names(found: list[Found]) -> set[tuple[str, str]]:
    return {(sample.split, sample.key) for sample in found}


# ------------------------------------------------------------------------------------------------ finding


def test_every_key_of_ours_names_its_sample(data: Path) -> None:
    facts = facts_of(data)
    found = find_samples(str(data), [key for _, key in facts])
    for split, key in facts:
        (sample,) = found[key]
        assert (sample.split, sample.key, open_split(str(data), split).key(sample.sample)) == (split, key, key)


@pytest.mark.parametrize("has_content", [True, False])
def test_sources_and_groups_name_all_their_samples(data: Path, has_content: bool) -> None:
    if not has_content:  # then every description is read
        (data / "content.jsonl").unlink()
    facts = facts_of(data)
    sources = {row["source"] for row in facts.values()}
    groups = {row["group"] for row in facts.values()}
    assert not sources & groups
    found = find_samples(str(data), [*sources, *groups])
    for word in sources | groups:
        assert names(found[word]) == {place for place, row in facts.items() if word in (row["source"], row["group"])}
        assert found[word]


def test_keys_are_found_where_rows_are_missing_and_in_parts(data: Path, tmp_path: Path, clips: Path) -> None:
    """Numbers rise with rows, but are not the rows: duplicates were left out, parts were joined."""
    manifest = load_manifest(str(data))
    records = np.fromfile(data / "train.index", open_split(str(data), "train").records.dtype)
    kept = np.delete(records, [1, 4])
    sha256 = hashlib.sha256(kept.tobytes()).hexdigest()
    (data / "train.index").write_bytes(kept.tobytes())
    splits = {**manifest.splits, "train": describe(kept, "train.index", sha256, manifest.splits["train"].shards)}
    small = Manifest.make(preset="train", labels=manifest.labels, splits=splits)
    (data / "manifest.json").write_text(small.to_json())
    more = tmp_path / "more"
    more.mkdir()
    for number, film in enumerate(sorted(clips.iterdir())[:2]):
        (more / f"{number}{film.suffix}").write_bytes(film.read_bytes() + b"\0")
    pack(more, data, PackOptions(short_side=48, max_frames=48, min_frames=8, workers=2), append=True)
    facts = facts_of(data)
    gone = {("train", "train-000000001"), ("train", "train-000000004")}
    assert gone < facts.keys()
    parts = {key for _, key in facts if "more" in key}
    assert len(parts) >= 2
    found = find_samples(str(data), sorted(parts))
    for split, key in facts.keys() - gone:
        (sample,) = find_samples(str(data), [key])[key]
        assert open_split(str(data), split).key(sample.sample) == key
    assert names([sample for samples in found.values() for sample in samples]) == {
        place for place in facts if place[1] in parts
    }
    with pytest.raises(UserError, match="'train-000000001'"):
        find_samples(str(data), ["train-000000001"])
    added = {row["source"] for place, row in facts.items() if place[1] in parts}
    by_source = find_samples(str(data), sorted(added))
    assert names([sample for samples in by_source.values() for sample in samples]) == {
        place for place in facts if place[1] in parts
    }


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> bytes:
    return make_video(tmp_path_factory.mktemp("video") / "a.mp4", 8).read_bytes()


def foreign(folder: Path, tars: dict[str, list[tuple[str, bytes]]]) -> str:
    folder.mkdir()
    for tar_name, members in tars.items():
        with tarfile.open(folder / tar_name, "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index_foreign(str(folder), IndexOptions(probe="header", workers=2))
    return str(folder)


def test_samples_of_others_are_found_by_key_source_and_group(tmp_path: Path, video: bytes) -> None:
    long_key = "a/" * 70 + "ü long"
    film = json.dumps({"source": "film 1"}).encode()
    group = json.dumps({"group": "people", "source": "film 2", "caption": "x" * 3000}).encode()
    url = foreign(
        tmp_path / "t",
        {
            "0.tar": [
                ("s/0.json", film),  # before the video, as sorted names are
                ("s/0.mp4", video),
                ("1.mp4", video),
                ("1.json", film),
                (f"{long_key}.mp4", video),
            ],
            "1.tar": [("s/0.mp4", video), ("2.json", group), ("2.mp4", video)],
        },
    )
    wanted = {
        "film 1": [0, 1],
        "s/0": [0, 3],
        "1": [1],
        long_key: [2],
        "people": [4],
        "2": [4],
        "film 2": [4],
    }
    found = find_samples(url, list(wanted))
    assert {word: [sample.sample for sample in samples] for word, samples in found.items()} == wanted


def test_another_name_with_the_same_crc_is_told_apart(tmp_path: Path, clips: Path) -> None:
    groups = ["plumless", "buckeroo"]  # a known pair
    assert zlib.crc32(groups[0].encode()) == zlib.crc32(groups[1].encode())
    films = sorted(clips.iterdir())
    listing = tmp_path / "films.csv"
    rows = [f"{film},{group}" for film, group in zip(films, [*groups, "third"], strict=True)]
    listing.write_text("path,group\n" + "\n".join(rows) + "\n")
    pack(listing, tmp_path / "data", PackOptions(short_side=32, max_frames=64, val_fraction=0, workers=2))
    facts = facts_of(tmp_path / "data")
    found = find_samples(str(tmp_path / "data"), groups)
    for group in groups:
        assert found[group]
        assert names(found[group]) == {place for place, row in facts.items() if row["group"] == group}


def test_names_of_others_that_are_gone_or_short_are_told(tmp_path: Path, video: bytes) -> None:
    url = foreign(tmp_path / "t", {"0.tar": [("a.mp4", video), ("b.mp4", video)]})
    path = tmp_path / "t" / "train.names.gz"
    data = path.read_bytes()
    path.write_bytes(gzip.compress(b'["a"]\n'))
    with pytest.raises(UserError, match="has 1 lines; it must have one for each of 2"):
        find_samples(url, ["a"])
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"train.names.gz cannot be read"):
        find_samples(url, ["a"])
    path.unlink()
    with pytest.raises(UserError, match=r"train.names.gz cannot be read"):
        find_samples(url, ["a"])


def test_names_of_others_grow_with_the_index(tmp_path: Path, video: bytes) -> None:
    url = foreign(tmp_path / "t", {"0.tar": [("a.mp4", video), ("b.mp4", video)]})
    with tarfile.open(tmp_path / "t" / "1.tar", "w") as tar:
        info = tarfile.TarInfo("c.mp4")
        info.size = len(video)
        tar.addfile(info, io.BytesIO(video))
    index_foreign(url, IndexOptions(probe="header", workers=2))
    found = find_samples(url, ["a", "b", "c"])
    assert {word: samples[0].sample for word, samples in found.items()} == {"a": 0, "b": 1, "c": 2}


def test_a_scan_says_how_far_it_is(data: Path) -> None:
    (data / "content.jsonl").unlink()
    seen: list[tuple[int, int]] = []
    source = next(iter(facts_of(data).values()))["source"]
    find_samples(str(data), [source], lambda done, total: seen.append((done, total)))
    total = sum(split.num_samples for split in load_manifest(str(data)).splits.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# ------------------------------------------------------------------------------------------------ writing


def test_withdrawn_samples_are_read_back_and_refused_by_the_reader(data: Path) -> None:
    assert withdrawn(str(data), "train") == frozenset()
    chosen = [Found("train", 2, "train-000000002"), Found("val", 0, "val-000000000")]
    before = load_manifest(str(data))
    new = withdraw(str(data), chosen)
    assert [(row.split, row.sample, row.key) for row in new] == [(f.split, f.sample, f.key) for f in chosen]
    assert withdrawn(str(data), "train") == {2}
    assert withdrawn(str(data / "manifest.json"), "val") == {0}
    assert load_manifest(str(data)) == before
    reader = open_split(str(data), "train")
    with pytest.raises(SampleError, match="withdrawn"):
        reader.read(2)
    reader.read(1)


def test_withdrawing_again_changes_nothing(data: Path) -> None:
    one, two = Found("train", 2, "train-000000002"), Found("train", 3, "train-000000003")
    withdraw(str(data), [one])
    text = (data / "withdrawn.jsonl").read_bytes()
    assert withdraw(str(data), [one, one]) == []
    assert (data / "withdrawn.jsonl").read_bytes() == text
    assert [row.sample for row in withdraw(str(data), [two, one])] == [3]
    assert (data / "withdrawn.jsonl").read_bytes().startswith(text)
    assert [row.sample for row in read_withdrawals(str(data))] == [2, 3]


def test_unknown_names_are_all_named(data: Path) -> None:
    with pytest.raises(UserError, match=r"'train-000009999', 'nobody'"):
        find_samples(str(data), ["train-000000000", "train-000009999", "nobody"])


def test_a_duplicate_that_was_left_out_leads_to_the_one_that_was_not(tmp_path: Path, clips: Path) -> None:
    """Whoever asks to be taken out is in the data set under another name."""
    film = min(clips.iterdir(), key=lambda path: path.stat().st_size)
    (tmp_path / "src").mkdir()
    for name in ("a", "b"):
        shutil.copy(film, tmp_path / "src" / f"{name}{film.suffix}")
    pack(tmp_path / "src", tmp_path / "data", PackOptions(short_side=32, max_frames=64, val_fraction=0, workers=2))
    with pytest.raises(UserError, match=rf"b{film.suffix} was rejected .*same bytes as a{film.suffix}"):
        find_samples(str(tmp_path / "data"), [f"b{film.suffix}"])


def test_a_damaged_list_is_no_empty_list(data: Path) -> None:
    (data / "withdrawn.jsonl").write_text('{"split": "train", "sample": 1, "key": "k", "time": "t"}\n{"split"')
    with pytest.raises(UserError, match=r"withdrawn.jsonl line 2"):
        withdrawn(str(data), "train")
    with pytest.raises(UserError, match=r"withdrawn.jsonl line 2"):
        open_split(str(data), "train")
    with pytest.raises(UserError, match=r"withdrawn.jsonl line 2"):
        withdraw(str(data), [Found("train", 0, "k")])


def test_a_remote_list(data: Path) -> None:
    import fsspec

    memory: Any = fsspec.filesystem("memory")
    url = f"memory://withdraw-{random.getrandbits(32)}"
    for path in data.iterdir():
        memory.pipe_file(f"{url.removeprefix('memory:/')}/{path.name}", path.read_bytes())
    assert withdrawn(url, "train") == frozenset()
    source = next(row["source"] for (split, _), row in facts_of(data).items() if split == "train")
    found = find_samples(url, [source])
    withdraw(url, found[source])
    assert withdrawn(url, "train") == {sample.sample for sample in found[source]}
    assert storage.exists(f"{url}/withdrawn.jsonl")


def test_many_writers_at_once_lose_nothing(data: Path) -> None:
    threads = [
        threading.Thread(target=withdraw, args=(str(data), [Found("train", number, f"k{number}")]))
        for number in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert withdrawn(str(data), "train") == frozenset(range(12))


def test_a_place_that_cannot_be_written_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(storage, "write_bytes", refuse)
    with pytest.raises(UserError, match=r"withdrawn.jsonl cannot be written"):
        withdraw(str(data), [Found("train", 0, "k")])


def test_a_list_that_may_not_be_read_is_no_empty_list(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 says 403 of a file that is not there to whoever may not list the bucket."""

    def forbidden(*_: Any, **__: Any) -> bytes:
        raise PermissionError("AccessDenied (403)")

    monkeypatch.setattr(storage, "read_bytes", forbidden)
    with pytest.raises(UserError, match=r"withdrawn\.jsonl.*s3:ListBucket"):
        withdrawn(str(data), "train")
