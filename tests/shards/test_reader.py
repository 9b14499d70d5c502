"""Samples by number: neighbours in one read, and what is not what was packed is refused or replaced, never used."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from shards import reader as reader_module
from shards import storage
from shards.cache import SampleCache
from shards.errors import SampleError, UserError
from shards.layout import MANIFEST_NAME, Manifest, Shard
from shards.manifest import build_manifest, load_manifest
from shards.reader import SplitReader, open_split
from shards.withdraw import Withdrawal, withdrawn_url


def video(sample: int, size: int) -> bytes:
    """Bytes that nothing decodes, different for every sample."""
    return bytes((sample + 7 * place) % 251 for place in range(size))


def write_tar(path: Path, sizes: Sequence[int], first: int = 0) -> None:
    with tarfile.open(path, "w") as tar:
        for sample, size in enumerate(sizes, first):
            facts = {
                "label": "even" if sample % 2 == 0 else None,
                "group": f"g{sample}",
                "num_frames": 16,
                "rate": 16.0,
                "source": f"{sample}.mp4",
                "source_sha256": f"{sample:064x}",
                "width": 64,
                "height": 48,
                "grid": 4,
                "motion": 1.0,
                "matrix": 0,
                "full_range": False,
            }
            for extension, data in (("mp4", video(sample, size)), ("json", json.dumps(facts).encode())):
                member = tarfile.TarInfo(f"train-{sample:09d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


SIZES = (100, 200, 9000, 300, 400)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Samples 0 to 4 in one tar, 5 and 6 in another; sample 2 is longer than what a read passes over."""
    made = tmp_path / "set"
    made.mkdir()
    write_tar(made / "train-000000.tar", SIZES)
    write_tar(made / "train-000001.tar", (50, 60), first=5)
    build_manifest(made, "train")
    return made


@pytest.fixture
def memory() -> Iterator[Any]:
    """A memory file system under memory://set."""
    filesystem: Any = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/set", recursive=True)


def upload(filesystem: Any, folder: Path) -> str:
    for path in folder.iterdir():
        filesystem.pipe(f"/set/{path.name}", path.read_bytes())
    return "memory://set"


def num_reads_of(call: Any) -> tuple[Any, int]:
    before = replace(storage.counters)
    found = call()
    return found, storage.counters.num_reads - before.num_reads


def reason_of(content: bytes | SampleError) -> str:
    return content.reason if isinstance(content, SampleError) else "read"


# ------------------------------------------------------------------ neighbours


def test_groups_are_neighbours_in_the_order_of_their_tar(folder: Path) -> None:
    reader = open_split(str(folder), "train")
    assert reader.groups([6, 4, 1, 0, 3]) == [[0, 1], [3, 4], [6]]  # nobody reads over the 9,000 bytes of sample 2
    assert reader.groups(range(7)) == [[0, 1, 2, 3, 4], [5, 6]]  # a tar ends a group
    assert reader.groups([2]) == [[2]]
    assert reader.groups([]) == []


def test_a_group_is_no_longer_than_one_read_may_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_split(str(folder), "train")
    records = reader.records
    ends = records["offset"] + records["size"]
    monkeypatch.setattr(reader_module, "MAX_GROUP_BYTES", int(ends[1] - records["offset"][0]))
    assert reader.groups(range(5))[0] == [0, 1]
    monkeypatch.setattr(reader_module, "MAX_GROUP_BYTES", int(ends[1] - records["offset"][0]) - 1)
    assert reader.groups(range(5))[0] == [0]
    monkeypatch.setattr(reader_module, "MAX_GROUP_BYTES", 1)  # a sample longer than that is a read of its own
    assert reader.groups(range(7)) == [[sample] for sample in range(7)]


def test_a_group_is_one_request(folder: Path) -> None:
    reader = open_split(str(folder), "train")
    for group in reader.groups(range(7)):
        found, num_reads = num_reads_of(lambda group=group: reader.read_group(group))
        assert num_reads == 1
        assert found == [video(sample, (*SIZES, 50, 60)[sample]) for sample in group]
    assert reader.read(3) == video(3, 300)
    with pytest.raises(ValueError, match="read-only"):
        reader.records["size"][0] = 1


def test_keys_labels_and_extensions_come_from_tar_and_manifest(folder: Path) -> None:
    reader = open_split(str(folder), "train")
    assert [reader.key(sample) for sample in (0, 6)] == ["train-000000000", "train-000000006"]
    assert reader.extension(3) == "mp4"
    assert [reader.label_name(sample) for sample in (0, 1)] == ["even", None]
    assert len(reader) == 7


# ------------------------------------------------------------------ not what was packed


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Write into a tar without changing its size or what says when it was written."""
    facts = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_a_bad_checksum_fails_one_sample_of_a_group(folder: Path) -> None:
    reader = open_split(str(folder), "train")
    overwrite(folder / "train-000000.tar", int(reader.records["offset"][2]) + 50, b"flipped bits")
    found = reader.read_group([0, 1, 2, 3, 4])
    assert [reason_of(content) for content in found] == ["read", "read", "checksum", "read", "read"]
    assert [found[sample] for sample in (0, 1, 3, 4)] == [video(sample, SIZES[sample]) for sample in (0, 1, 3, 4)]
    assert "sample 2" in str(found[2])
    with pytest.raises(SampleError, match="not what was packed"):
        reader.read(2)


def test_a_short_tar_is_refused_at_first_touch(folder: Path) -> None:
    os.truncate(folder / "train-000001.tar", 600)
    reader = open_split(str(folder), "train")
    assert reader.read(0) == video(0, 100)
    with pytest.raises(UserError, match=r"train-000001\.tar has 600 bytes .* must have the 10240"):
        reader.read_group([5, 6])


def test_a_tar_cut_off_or_exchanged_under_the_run_is_refused(folder: Path) -> None:
    cut, exchanged = folder / "train-000000.tar", folder / "train-000001.tar"
    reader = open_split(str(folder), "train")
    reader.read_group([0, 1])
    reader.read_group([5])
    os.truncate(cut, 600)
    with pytest.raises(UserError, match=r"train-000000\.tar was changed while it was in use"):
        reader.read_group([3, 4])
    exchanged.write_bytes(bytes(exchanged.stat().st_size))
    os.utime(exchanged, ns=(1, 1))
    with pytest.raises(UserError, match=r"train-000001\.tar was changed while it was in use"):
        reader.read_group([5, 6])


def test_a_copy_of_the_same_bytes_is_no_change(folder: Path) -> None:
    reader = open_split(str(folder), "train")
    reader.read(0)
    os.utime(folder / "train-000000.tar", ns=(1, 1))
    assert reader.read(1) == video(1, 200)


def test_a_missing_tar_is_named(folder: Path) -> None:
    reader = open_split(str(folder), "train")
    reader.read(0)
    for name in ("train-000000.tar", "train-000001.tar"):  # one was read before, one was not
        (folder / name).unlink()
    for sample, name in ((1, "train-000000.tar"), (5, "train-000001.tar")):
        with pytest.raises(UserError, match=f"{name} is missing"):
            reader.read(sample)


@pytest.mark.parametrize(
    ("fault", "reason"), [(OSError("gave up"), "io"), (storage.ShortReadError("2 bytes came"), "short")]
)
def test_a_read_that_storage_gave_up_fails_its_samples(
    fault: OSError, reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = open_split(str(folder), "train")

    def broken(*arguments: Any, **named: Any) -> bytes:
        raise fault

    reader.read(0)  # whose tar was seen before, that of the others was not
    with monkeypatch.context() as patched:
        patched.setattr(storage, "read_range", broken)
        patched.setattr(storage, "first_range", broken)
        assert [reason_of(content) for content in reader.read_group([0, 1])] == [reason, reason]
        assert [reason_of(content) for content in reader.read_group([5, 6])] == [reason, reason]
        patched.setattr(storage, "size_and_tag", broken)  # nor does it say whether the tar was cut
        assert [reason_of(content) for content in reader.read_group([0, 1])] == ["io", "io"]
        assert [reason_of(content) for content in reader.read_group([5, 6])] == ["io", "io"]
    assert reader.read_group([5, 6]) == [video(5, 50), video(6, 60)]


def test_limits_reach_storage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def told(plain: Any, *arguments: Any, **named: Any) -> Any:
        asked.append(named)
        return plain(*arguments, **named)

    for name in ("first_range", "read_range"):
        monkeypatch.setattr(storage, name, partial(told, getattr(storage, name)))
    reader = open_split(str(folder), "train", attempt_s=3, deadline_s=7, hedge_s=2)
    assert [reader.read(0), reader.read(1)] == [video(0, 100), video(1, 200)]
    limits = {"attempt_s": 3, "deadline_s": 7, "hedge_s": 2}
    assert limits in asked  # of the first read of a tar
    assert {**limits, "tag": ""} in asked  # of every later one


def test_a_broken_header_is_a_sample_error_and_no_name(folder: Path) -> None:
    reader = open_split(str(folder), "train")
    overwrite(folder / "train-000000.tar", int(reader.records["offset"][1]) - 512, bytes(range(1, 255)))
    with pytest.raises(SampleError, match="no tar header before sample 1"):
        reader.key(1)


def test_splits_and_indexes_that_are_not_there(folder: Path) -> None:
    with pytest.raises(UserError, match="no split 'test'; it must be one of train"):
        open_split(str(folder), "test")
    index = folder / "train.index"
    data = index.read_bytes()
    for wrong in (data[:-48], data + data[:48], bytes([data[0] ^ 1]) + data[1:], b""):
        index.write_bytes(wrong)
        with pytest.raises(UserError, match=r"train\.index is not the index its manifest names"):
            open_split(str(folder), "train")
    index.unlink()
    with pytest.raises(UserError, match=r"train\.index is missing"):
        open_split(str(folder), "train")


# ------------------------------------------------------------------ tars made by others


def foreign(folder: Path, names: Sequence[str], tag: str = "") -> Manifest:
    """The manifest of the folder with other names for its tars, whose hash nobody knows."""
    manifest = load_manifest(str(folder))
    split = manifest.splits["train"]
    shards = tuple(
        Shard(name, shard.num_bytes, shard.num_samples, "", tag)
        for name, shard in zip(names, split.shards, strict=True)
    )
    splits = {"train": dataclasses.replace(split, shards=shards)}
    return Manifest.make(preset="", labels=manifest.labels, splits=splits)


def test_tars_named_by_a_full_url_are_read_where_they_are(folder: Path, memory: Any, tmp_path: Path) -> None:
    memory.pipe("/set/others.tar", (folder / "train-000000.tar").read_bytes())
    elsewhere = tmp_path / "elsewhere.tar"
    (folder / "train-000001.tar").rename(elsewhere)
    (folder / "train-000000.tar").unlink()
    manifest = foreign(folder, ["memory://set/others.tar", f"file://{elsewhere}"])
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    reader = open_split(str(folder), "train")
    assert reader.read_group([0, 1]) == [video(0, 100), video(1, 200)]
    assert reader.read_group([5, 6]) == [video(5, 50), video(6, 60)]
    assert reader.key(5) == "train-000000005"
    absolute = foreign(folder, ["memory://set/others.tar", str(elsewhere)])
    assert SplitReader(str(folder), absolute, "train").read(6) == video(6, 60)
    with pytest.raises(UserError, match="outside its folder"):  # but no manifest from elsewhere may name such a path
        Manifest.from_json(absolute.to_json(), "there")


def test_a_tag_that_was_recorded_must_be_the_one_that_is_there(folder: Path, tmp_path: Path) -> None:
    tars = [tmp_path / name for name in ("one.tar", "two.tar")]
    for number, tar in enumerate(tars):
        (folder / f"train-{number:06d}.tar").rename(tar)
        os.utime(tar, ns=(5, 5))
    manifest = foreign(folder, [f"file://{tar}" for tar in tars], tag="5")
    reader = SplitReader(str(folder), manifest, "train")
    assert reader.read(0) == video(0, 100)
    for tar in tars:
        os.utime(tar, ns=(6, 6))
    with pytest.raises(UserError, match=r"two\.tar has 10240 bytes \(tag 6\); .* \(tag 5\)"):
        reader.read(5)  # at first touch
    with pytest.raises(UserError, match=r"one\.tar was changed while it was in use"):
        reader.read(0)  # later


# ------------------------------------------------------------------ withdrawn


def test_a_withdrawn_sample_is_not_read(folder: Path) -> None:
    rows = [Withdrawal("train", 1, "train-000000001", "2026-01-01T00:00:00Z"), Withdrawal("val", 0, "v", "")]
    Path(withdrawn_url(str(folder))).write_text("".join(f"{row.to_json()}\n" for row in rows))
    reader = open_split(str(folder), "train")
    assert reader.withdrawn == {1}
    found, num_reads = num_reads_of(lambda: reader.read_group([0, 1, 2]))
    assert [reason_of(content) for content in found] == ["read", "withdrawn", "read"]
    assert num_reads == 1
    found, num_reads = num_reads_of(lambda: reader.read_group([1]))
    assert (reason_of(found[0]), num_reads) == ("withdrawn", 0)
    with pytest.raises(SampleError, match="withdrawn"):
        reader.read(1)
    (folder / "withdrawn.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match="nothing that was withdrawn is read before that"):
        open_split(str(folder), "train")


# ------------------------------------------------------------------ what a node keeps


def kept_files(cache: SampleCache) -> list[Path]:
    return sorted(path for path in cache.folder.glob("*/*") if path.is_file())


def test_what_is_kept_is_not_read_again(folder: Path, tmp_path: Path) -> None:
    cache = SampleCache(tmp_path / "cache", 1 << 20)
    reader = open_split(str(folder), "train", cache=cache)
    plain = reader.read_group([0, 1])
    found, num_reads = num_reads_of(lambda: reader.read_group([0, 1]))
    assert (found, num_reads) == (plain, 0)
    found, num_reads = num_reads_of(lambda: reader.read_group([0, 1, 3, 4]))  # only what is missing
    assert [len(content) for content in found] == [100, 200, 300, 400]
    assert num_reads == 1
    assert (cache.counters.num_hits, cache.counters.num_misses) == (4, 4)

    moved = folder.rename(folder.with_name("moved"))
    again = open_split(str(moved), "train", cache=SampleCache(tmp_path / "cache", 1 << 20))
    for tar in moved.glob("*.tar"):
        tar.unlink()
    assert again.read_group([0, 1, 3]) == [*plain, video(3, 300)]


def test_a_kept_file_that_is_damaged_is_read_again(folder: Path, tmp_path: Path) -> None:
    cache = SampleCache(tmp_path / "cache", 1 << 20)
    reader = open_split(str(folder), "train", cache=cache)
    reader.read(1)
    (kept,) = kept_files(cache)
    kept.write_bytes(bytes(200))
    found, num_reads = num_reads_of(lambda: reader.read(1))
    assert (found, num_reads) == (video(1, 200), 1)
    assert cache.counters.num_bad == 1
    assert num_reads_of(lambda: reader.read(1)) == (video(1, 200), 0)


def test_bad_bytes_are_never_kept(folder: Path, tmp_path: Path) -> None:
    cache = SampleCache(tmp_path / "cache", 1 << 20)
    reader = open_split(str(folder), "train", cache=cache)
    overwrite(folder / "train-000000.tar", int(reader.records["offset"][1]), b"bad")
    assert [reason_of(content) for content in reader.read_group([0, 1, 2])] == ["read", "checksum", "read"]
    assert len(kept_files(cache)) == 2
    overwrite(folder / "train-000000.tar", int(reader.records["offset"][1]), video(1, 3))
    assert reader.read(1) == video(1, 200)


def test_a_withdrawn_sample_is_not_taken_from_the_cache_either(folder: Path, tmp_path: Path) -> None:
    cache = SampleCache(tmp_path / "cache", 1 << 20)
    open_split(str(folder), "train", cache=cache).read(1)
    row = Withdrawal("train", 1, "train-000000001", "2026-01-01T00:00:00Z")
    Path(withdrawn_url(str(folder))).write_text(row.to_json() + "\n")
    assert reason_of(open_split(str(folder), "train", cache=cache).read_group([1])[0]) == "withdrawn"


def test_a_remote_index_is_copied_once_per_node(
    folder: Path, memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(memory, folder)
    ranges: list[str] = []
    plain = storage.read_range

    def read_range(where: str, *arguments: Any, **named: Any) -> bytes:
        ranges.append(where)
        return plain(where, *arguments, **named)

    monkeypatch.setattr(storage, "read_range", read_range)
    readers = [open_split(url, "train", node_folder=tmp_path / "node") for _ in range(3)]
    assert ranges == ["memory://set/train.index"]
    local = open_split(str(folder), "train").records
    assert all(np.array_equal(reader.records, local) for reader in readers)
    assert readers[0].read_group([0, 1]) == [video(0, 100), video(1, 200)]
    assert ranges[1:] == ["memory://set/train-000000.tar"]
    open_split(url, "train", node_folder=tmp_path / "another node")
    assert ranges.count("memory://set/train.index") == 2


def test_a_remote_index_that_is_another_one_or_gone_is_refused(folder: Path, memory: Any, tmp_path: Path) -> None:
    url = upload(memory, folder)
    data = (folder / "train.index").read_bytes()
    for number, wrong in enumerate((data[:-48], bytes([data[0] ^ 1]) + data[1:])):
        memory.pipe("/set/train.index", wrong)
        with pytest.raises(UserError, match=r"set/train\.index is not the index its manifest names"):
            open_split(url, "train", node_folder=tmp_path / str(number))
    memory.rm("/set/train.index")
    with pytest.raises(UserError, match=r"set/train\.index is missing"):
        open_split(url, "train", node_folder=tmp_path / "node")


def test_remote_tars_that_change_or_go_are_refused(folder: Path, memory: Any, tmp_path: Path) -> None:
    url = upload(memory, folder)
    reader = open_split(url, "train", deadline_s=0.3, node_folder=tmp_path / "node")
    assert reader.read(0) == video(0, 100)
    memory.pipe("/set/train-000000.tar", (folder / "train-000000.tar").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"train-000000\.tar was changed while it was in use"):
        reader.read(4)
    memory.rm("/set/train-000000.tar")
    with pytest.raises(UserError, match=r"train-000000\.tar is missing"):
        reader.read(1)
