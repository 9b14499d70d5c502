"""The mirror over a real S3 server, with a proxy in between that refuses, cuts and forgets."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain import transfer
from pretrain.checkpoint import newest
from pretrain.mirror import Mirror
from shards import s3_upload, storage
from tests.pretrain.saved_run import SavedRun, content
from tests.s3.conftest import Gateway
from tests.s3.proxy import FaultProxy

MIB = 2**20


@pytest.fixture
def run(tmp_path: Path) -> SavedRun:
    run = SavedRun(tmp_path / "run")
    run.start()
    run.save(100)
    run.save(200, numel=3 * MIB)  # 6 MiB per rank
    return run


@pytest.fixture
def mirror(run: SavedRun, aws: Callable[..., None], tmp_path: Path) -> Mirror:
    return Mirror(f"s3://films/mirrors/{tmp_path.name}/run", run.folder)


class WriteFaults(FaultProxy):
    """Faults for writes too: every PUT and DELETE takes the next one from `writes`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.writes: list[str | None] = []

    def _fault(self, method: str, head: bytes) -> str | None:
        if method in ("PUT", "DELETE") and self.writes:
            return self.writes.pop(0)
        return super()._fault(method, head)


@pytest.fixture
def front(gateway: Gateway, aws: Callable[..., None]) -> Any:
    with WriteFaults((gateway.host, gateway.port)) as made:
        aws(made.endpoint)
        yield made


def assert_restores(mirror: Mirror, folder: Path, run: SavedRun, step: int) -> None:
    assert Mirror(mirror.url, folder).restore() == step
    found, original = content(folder), content(run.folder)
    assert found.pop("checkpoints/latest") == f"step-{step:06d}\n".encode()
    assert found == {name: data for name, data in original.items() if name in found}
    assert {name for name in original if name.startswith(f"checkpoints/step-{step:06d}")} <= found.keys()
    assert newest(folder) is not None


def keys(gateway: Gateway, mirror: Mirror) -> list[str]:
    """In the order in which the server took them."""
    prefix = mirror.url.removeprefix("s3://films/")
    found = gateway.client().list_objects_v2(Bucket="films", Prefix=prefix)["Contents"]
    return [row["Key"].removeprefix(f"{prefix}/") for row in sorted(found, key=lambda row: row["LastModified"])]


@pytest.mark.parametrize("part_bytes", [16 * MIB, 5 * MIB])
def test_there_and_back(
    part_bytes: int, run: SavedRun, mirror: Mirror, gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece or in parts, the store's etag proves the content: nothing large is read back."""
    monkeypatch.setattr(s3_upload, "PART_BYTES", part_bytes)
    mirror.send(100)
    before = storage.counters.num_bytes
    report = mirror.send(200)
    assert report.num_bytes > 12 * MIB
    assert storage.counters.num_bytes - before < MIB
    again = Mirror(mirror.url, run.folder).send(200)
    assert (again.num_files, again.num_bytes) == (0, 0)
    assert storage.counters.num_bytes - before < MIB
    names = keys(gateway, mirror)
    assert names[-1] == "latest"
    assert names[-2].endswith("manifest.json")
    assert_restores(mirror, tmp_path / "new", run, 200)
    assert mirror.steps() == [200, 100]
    mirror.keep([])
    assert sum("checkpoints/" in name for name in keys(gateway, mirror)) == 4
    assert_restores(mirror, tmp_path / "newer", run, 200)


def test_a_store_whose_etags_prove_nothing_is_read_back(
    run: SavedRun, mirror: Mirror, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a key of the store's own (SSE-KMS) etags are random."""
    monkeypatch.setattr(transfer, "_md5", lambda _data: b"another")
    before = storage.counters.num_bytes
    mirror.send(200)
    assert storage.counters.num_bytes - before > 12 * MIB
    assert Mirror(mirror.url, run.folder).send(200).num_files == 0
    [key] = [key for key in keys(gateway, mirror) if key.endswith("rank-00001.safetensors")]
    client = gateway.client()
    place = {"Bucket": "films", "Key": f"{mirror.url.removeprefix('s3://films/')}/{key}"}
    body = client.get_object(**place)["Body"].read()
    client.put_object(**place, Body=body[:-1] + b"x")
    assert Mirror(mirror.url, run.folder).send(200).num_files == 1


@pytest.mark.parametrize("fault", ["slow_down", "server_error", "reset"])
def test_a_storm_is_sat_out(fault: str, run: SavedRun, mirror: Mirror, front: WriteFaults, tmp_path: Path) -> None:
    """Reads are refused or cut in the middle of a body; writes are refused, or done and their answer is lost."""
    front.rate, front.kinds = 0.3, (fault,)
    front.writes = [fault, None, fault, fault, None] * 3
    mirror.send(100)
    mirror.send(200)
    front.writes = [fault, fault, None] * 2
    mirror.keep([])
    assert front.counts[fault] > 8
    assert_restores(mirror, tmp_path / "new", run, 200)
    assert mirror.steps() == [200]


def test_the_store_goes_away_in_the_middle_of_a_send(
    run: SavedRun, mirror: Mirror, front: WriteFaults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every connection is cut, and the deadline passes: the checkpoint before is the newest; the next send goes on."""
    monkeypatch.setattr("pretrain.mirror.SENDS", 1)
    mirror.send(100)
    real = storage.upload
    sent: list[str] = []

    def upload(path: Path, url: str) -> None:
        if url.endswith("rank-00001.safetensors"):
            front.outage(0.0, 3600.0)
        real(path, url, deadline_s=1)
        sent.append(url)

    monkeypatch.setattr(storage, "upload", upload)
    with pytest.raises(OSError, match=r"rank-00001\.safetensors: gave up after 1 s"):
        mirror.send(200)
    front.outage(0.0, 0.0)
    monkeypatch.setattr(storage, "upload", real)
    assert_restores(mirror, tmp_path / "new", run, 100)
    assert any(url.endswith("rank-00000.safetensors") for url in sent)
    assert mirror.send(200).num_bytes < 7 * MIB, "the first tensor file was there"
    assert_restores(mirror, tmp_path / "newer", run, 200)


def test_a_restore_that_storage_interrupts_goes_back_to_no_older_one(
    run: SavedRun, mirror: Mirror, front: WriteFaults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.send(100)
    mirror.send(200)
    monkeypatch.setattr("pretrain.restore.FETCHES", 1)
    real = storage.read_range

    def read_range(url: str, *arguments: Any, **named: Any) -> bytes:
        if url.endswith("rank-00001.safetensors"):
            front.outage(0.0, 3600.0)
        return real(url, *arguments, **{**named, "deadline_s": 0.5})

    monkeypatch.setattr(storage, "read_range", read_range)
    with pytest.raises(OSError, match=r"step-000200-.*gave up after 0\.5 s"):
        Mirror(mirror.url, tmp_path / "new").restore()
    front.outage(0.0, 0.0)
    monkeypatch.setattr(storage, "read_range", real)
    assert_restores(mirror, tmp_path / "new", run, 200)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "InvalidAccessKeyId"),
        ({"AWS_SECRET_ACCESS_KEY": "x"}, "SignatureDoesNotMatch"),
    ],
)
def test_wrong_credentials_are_one_clear_line(
    wrong: dict[str, str], code: str, mirror: Mirror, aws: Callable[..., None], tmp_path: Path
) -> None:
    aws(**wrong)
    new = Mirror(mirror.url, tmp_path / "new")
    for work in (lambda: mirror.send(200), lambda: mirror.keep([]), new.restore, mirror.newest_step):
        with pytest.raises(PermissionError) as caught:
            work()
        line = str(caught.value)
        assert re.match(rf"s3://films/mirrors/\S+: {code} \(403\): [^\n]+$", line), line
        assert "nobody" not in line
    assert not (tmp_path / "new").exists()


def test_a_bucket_that_is_not_there(run: SavedRun, aws: Callable[..., None], tmp_path: Path) -> None:
    """Writing says so; an empty mirror it is not."""
    with pytest.raises(FileNotFoundError, match="NoSuchBucket"):
        Mirror("s3://nothing/run", run.folder).send(200)
    with pytest.raises(FileNotFoundError, match="NoSuchBucket"):
        Mirror("s3://nothing/run", tmp_path / "new").restore()
