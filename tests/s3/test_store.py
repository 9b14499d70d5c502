"""Writing, listing and copying, against the real gateway and against moto: two servers that agree on little else."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shards import retry, s3_upload, storage
from shards.cache import node_copy
from tests.s3.conftest import Gateway, make_bucket
from tests.s3.proxy import FaultProxy

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


@pytest.fixture(scope="module")
def moto() -> Iterator[Gateway]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    place = Gateway(host, port, "any-key", "any-secret")
    make_bucket(place)
    yield place
    server.stop()


@pytest.fixture(params=["juicefs", "moto"])
def store(request: pytest.FixtureRequest, gateway: Gateway, aws: Callable[..., None]) -> Gateway:
    place: Gateway = gateway if request.param == "juicefs" else request.getfixturevalue("moto")
    aws(place.endpoint, AWS_ACCESS_KEY_ID=place.key, AWS_SECRET_ACCESS_KEY=place.secret)
    return place


def test_small_objects(store: Gateway) -> None:
    url = "s3://films/small/a b+ü%.json"
    assert not storage.exists(url)
    storage.write_bytes(url, b"0123456789")
    assert storage.exists(url)
    assert storage.read_bytes(url) == b"0123456789"
    assert storage.read_range(url, 3, 4) == b"3456"
    assert storage.read_range(url, 3, 0) == b""
    size, tag = storage.size_and_tag(url)
    assert size == 10
    assert storage.read_range(url, 9, 1, tag=tag) == b"9"
    with pytest.raises(storage.ChangedObjectError):
        storage.read_range(url, 9, 1, tag="0" * 32)
    with pytest.raises(storage.ObjectEndsError):
        storage.read_range(url, 8, 5)
    assert storage.list_files("s3://films/small") == [storage.FileFacts("a b+ü%.json", 10, tag)]
    storage.remove(url)
    storage.remove(url)
    assert not storage.exists(url)
    assert storage.list_files("s3://films/small") == []


def test_an_empty_object(store: Gateway) -> None:
    storage.write_bytes("s3://films/empty/a", b"")
    assert storage.size_and_tag("s3://films/empty/a")[0] == 0
    assert storage.read_bytes("s3://films/empty/a") == b""
    assert [(file.name, file.num_bytes) for file in storage.list_files("s3://films/empty")] == [("a", 0)]


def test_a_long_list_comes_in_pages_and_holds_nothing_of_its_neighbours(
    store: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.s3.PAGE_KEYS", 50)
    client = store.client()
    names = [f"{number % 7}/{number:04d}.tar" for number in range(130)]
    for name in names:
        client.put_object(Bucket="films", Key=f"many/{name}", Body=b"x")
    client.put_object(Bucket="films", Key="many-more/a", Body=b"x")
    before = retry.counters.num_reads
    files = storage.list_files("s3://films/many/")
    assert [file.name for file in files] == sorted(names)
    assert retry.counters.num_reads - before == 3


def test_a_large_upload_appears_whole(store: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 * MIB)
    path = tmp_path / "shard.tar"
    path.write_bytes(random.Random(1).randbytes(17 * MIB + 5))
    storage.upload(path, "s3://films/large/shard.tar")
    size, tag = storage.size_and_tag("s3://films/large/shard.tar")
    assert size == 17 * MIB + 5
    body = store.client().get_object(Bucket="films", Key="large/shard.tar")["Body"].read()
    assert body == path.read_bytes()
    assert storage.read_range("s3://films/large/shard.tar", 17 * MIB, 5, tag=tag) == body[-5:]
    digest = hashlib.sha256(body).hexdigest()
    copy = node_copy("s3://films/large/shard.tar", digest, size, tmp_path / "node")
    assert copy.read_bytes() == body


def test_a_failed_upload_leaves_no_object_and_no_parts(
    proxy: Callable[..., FaultProxy], gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part is refused."""
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 * MIB)
    monkeypatch.setattr(s3_upload, "PARTS_AT_A_TIME", 1)
    path = tmp_path / "shard.tar"
    path.write_bytes(bytes(12 * MIB))
    front = proxy()
    real = s3_upload.s3.put_part

    async def failing(url: str, upload: str, number: int, data: bytes) -> str:
        if number == 2:
            raise PermissionError("AccessDenied")
        return await real(url, upload, number, data)

    monkeypatch.setattr(s3_upload.s3, "put_part", failing)
    with pytest.raises(PermissionError, match="AccessDenied"):
        storage.upload(path, "s3://films/failed/shard.tar")
    assert 1 <= front.counts["PUT"] <= 2
    assert front.counts["DELETE"] == 1
    assert storage.list_files("s3://films/failed") == []
    assert open_uploads(gateway, "failed/") == []


def test_an_upload_whose_last_answer_is_lost(
    gateway: Gateway, aws: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 * MIB)
    path = tmp_path / "shard.tar"
    path.write_bytes(bytes(12 * MIB))
    real, calls = s3_upload.s3.finish_upload, []

    async def deaf(url: str, upload: str, tags: list[str]) -> None:
        calls.append(tags)
        await real(url, upload, tags)
        if len(calls) == 1:
            raise ConnectionResetError("the answer is lost")

    monkeypatch.setattr(s3_upload.s3, "finish_upload", deaf)
    storage.upload(path, "s3://films/deaf/shard.tar")
    assert len(calls) == 2
    assert storage.size_and_tag("s3://films/deaf/shard.tar")[0] == 12 * MIB


UPLOAD = """
import sys
from pathlib import Path
from shards import s3_upload, storage
s3_upload.PART_BYTES = 5 * 2**20
s3_upload.PARTS_AT_A_TIME = 1
print("ready", flush=True)
storage.upload(Path(sys.argv[1]), "s3://films/killed-upload/shard.tar")
"""


def test_an_upload_killed_midway_leaves_no_object(gateway: Gateway, aws: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(bytes(40 * MIB))
    with FaultProxy((gateway.host, gateway.port), delay_s=0.1) as front:
        environment = {**os.environ, **gateway.environment(front.endpoint)}
        command = [sys.executable, "-c", UPLOAD, str(path)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        end_s = time.monotonic() + 60
        while front.counts["PUT"] < 3 and time.monotonic() < end_s:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 3 <= front.counts["PUT"] < 8
    assert storage.list_files("s3://films/killed-upload") == []
    assert not storage.exists("s3://films/killed-upload/shard.tar")
    storage.upload(path, "s3://films/killed-upload/shard.tar")  # and the next one is not in its way
    assert storage.size_and_tag("s3://films/killed-upload/shard.tar")[0] == 40 * MIB


def test_no_reader_sees_half_an_object(gateway: Gateway, aws: Callable[..., None]) -> None:
    """An object written over and over while four threads read it: each answer is one of its two contents."""
    contents = {bytes([number]) * 300_000 for number in (1, 2)}
    url = "s3://films/halves/a"
    storage.write_bytes(url, min(contents))
    with ThreadPoolExecutor(5) as pool:
        writes = pool.submit(lambda: [storage.write_bytes(url, data) for data in [*contents] * 15])
        reads = [pool.submit(storage.read_bytes, url) for _ in range(60)]
        writes.result()
        assert {read.result() for read in reads} <= contents


def open_uploads(place: Gateway, prefix: str) -> list[Any]:
    found: list[Any] = place.client().list_multipart_uploads(Bucket="films", Prefix=prefix).get("Uploads", [])
    return found
