"""Tars made by others, indexed where they are: in a bucket, with faults on the way."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shards import storage, tarstream
from shards.errors import UserError
from shards.foreign import IndexOptions, index_foreign
from shards.keys import find_samples
from shards.reader import open_split
from shards.withdraw import withdraw, withdrawn
from tests.s3.proxy import FaultProxy
from tests.shards.conftest import write_video


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("tars")
    video = write_video(folder / "a.mp4", 16).read_bytes()
    made: dict[str, bytes] = {}
    for number in range(3):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name in range(8):
                info = tarfile.TarInfo(f"{number}-{name}.mp4")
                info.size = len(video)
                tar.addfile(info, io.BytesIO(video))
        made[f"x-{number:03d}.tar"] = file.getvalue()
    return made


def test_a_bucket_is_indexed_through_faults_and_read_once(
    tars: dict[str, bytes], tmp_path: Path, proxy: Callable[..., FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tarstream, "READ_BYTES", 16 << 10)
    (tmp_path / "here").mkdir()
    for name, data in tars.items():
        storage.write_bytes(f"s3://films/others/{name}", data)
        storage.write_bytes(f"s3://films/others/deeper/{name}", data)  # not in the folder itself
        (tmp_path / "here" / name).write_bytes(data)
    index_foreign(str(tmp_path / "here"), IndexOptions(workers=2))
    calm = proxy()
    index_foreign("s3://films/others", IndexOptions(to=tmp_path / "calm", workers=2))
    assert calm.counts["bytes"] < 1.02 * sum(map(len, tars.values())) + 20_000
    rough = proxy(rate=0.2, seed=5)
    pattern = "s3://films/others/x-{000..002}.tar"
    summary = index_foreign(pattern, IndexOptions(to=tmp_path / "rough", workers=2))
    assert sum(rough.counts[kind] for kind in rough.kinds) > 3
    assert summary.rejected == {}
    rows = [(tmp_path / folder / "train.index").read_bytes() for folder in ("here", "calm", "rough")]
    assert rows[0] == rows[1] == rows[2]
    reader = open_split(str(tmp_path / "rough"), "train")
    assert [shard.name for shard in reader.split.shards] == [f"s3://films/others/{name}" for name in tars]
    assert all(shard.tag for shard in reader.split.shards)
    assert len(reader.read(20)) == int(reader.records[20]["size"])


def test_an_index_in_a_bucket_takes_withdrawals(
    tars: dict[str, bytes], tmp_path: Path, aws: Callable[..., None]
) -> None:
    for name, data in tars.items():
        (tmp_path / name).write_bytes(data)
    index_foreign(str(tmp_path), IndexOptions(workers=2))
    for path in tmp_path.iterdir():
        storage.upload(path, f"s3://films/moved/{path.name}")
    found = find_samples("s3://films/moved", ["1-3", "2-0"])
    withdraw("s3://films/moved", [sample for samples in found.values() for sample in samples])
    assert withdrawn("s3://films/moved", "train") == {11, 16}
    assert withdraw("s3://films/moved", found["1-3"]) == []


def test_a_tar_that_is_exchanged_while_it_is_read_is_named(
    tars: dict[str, bytes], tmp_path: Path, aws: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "s3://films/exchanged/x.tar"
    one, other = tars["x-000.tar"], tars["x-001.tar"]
    assert len(one) == len(other)
    storage.write_bytes(url, one)
    monkeypatch.setattr(tarstream, "READ_BYTES", 16 << 10)
    real = storage.read_range
    reads: list[int] = []

    def exchange(url_: str, offset: int, size: int, *, tag: str = "") -> bytes:
        reads.append(offset)
        if len(reads) == 3:
            storage.write_bytes(url, other)
        return real(url_, offset, size, tag=tag)

    monkeypatch.setattr(storage, "read_range", exchange)
    with pytest.raises(UserError, match=r"x.tar was changed while it was read"):
        index_foreign(url, IndexOptions(to=tmp_path / "index", workers=1))
    assert len(reads) <= 4
    assert not (tmp_path / "index" / "manifest.json").exists()
