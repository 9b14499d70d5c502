"""Every fault that a store or the way to it can have: the right bytes come, or the right error, and the counts hold."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shards import retry, storage
from shards.errors import UserError
from tests.s3.conftest import Gateway, free_port
from tests.s3.proxy import FaultProxy

Proxy = Callable[..., FaultProxy]
SIZE = 300_000
CONTENT = random.Random(0).randbytes(SIZE)
URL = "s3://films/faults/object"


@pytest.fixture(autouse=True)
def stored(gateway: Gateway, aws: Callable[..., None]) -> None:
    gateway.client().put_object(Bucket="films", Key="faults/object", Body=CONTENT)


SLOW = [pytest.param(fault, marks=pytest.mark.slow) for fault in ("slow", "stuck")]


@pytest.mark.parametrize("fault", ["slow_down", "server_error", "reset", "short", *SLOW])
def test_a_passing_fault_is_asked_for_again(proxy: Proxy, fault: str) -> None:
    front = proxy()
    front.queue.extend([fault, fault, None])
    attempt_s = 1.5 if fault in ("slow", "stuck") else 30.0  # these two end only with our patience
    assert storage.read_range(URL, 1000, 200_000, attempt_s=attempt_s) == CONTENT[1000:201_000]
    counters = retry.counters
    assert front.counts[fault] == 2
    assert counters.num_reads == front.counts["GET"] == 3
    assert counters.num_retries == 2
    assert counters.num_throttled == (2 if fault == "slow_down" else 0)
    assert counters.num_failures == counters.num_hedges == counters.num_renewals == 0
    assert 200_000 <= counters.num_bytes <= 200_000 + 2 * 100_000
    if fault == "short":  # every byte that came is counted, also those of no use
        assert counters.num_bytes == front.counts["bytes"] == 400_000


def test_a_storm_that_does_not_end(proxy: Proxy) -> None:
    front = proxy(rate=1.0, kinds=["slow_down"])
    with pytest.raises(OSError, match=r"s3://films/faults/object: gave up after 1 s.*SlowDown"):
        storage.read_range(URL, 0, 10, deadline_s=1)
    assert retry.counters.num_failures == 1
    counters = retry.counters
    assert 2 < counters.num_reads == front.counts["GET"]
    assert counters.num_throttled in (counters.num_reads, counters.num_reads - 1)  # the deadline may cut the last one


def test_a_body_that_is_always_short(proxy: Proxy) -> None:
    proxy(rate=1.0, kinds=["short"])
    with pytest.raises(OSError, match="gave up after 1 s"):
        storage.read_range(URL, 0, 1000, deadline_s=1)


def test_what_is_final_is_asked_once(proxy: Proxy) -> None:
    front = proxy()
    front.queue.append("denied")
    with pytest.raises(PermissionError, match="AccessDenied"):
        storage.read_range(URL, 0, 10)
    with pytest.raises(FileNotFoundError, match="NoSuchKey"):
        storage.read_range("s3://films/faults/nothing", 0, 10)
    with pytest.raises(FileNotFoundError, match="NoSuchBucket"):
        storage.read_range("s3://nothing/object", 0, 10)
    with pytest.raises(storage.ObjectEndsError, match="ends at 300000 bytes, 300010 are needed"):
        storage.read_range(URL, SIZE - 10, 20)
    with pytest.raises(storage.ObjectEndsError):
        storage.read_range(URL, SIZE, 20)
    assert front.counts["GET"] == retry.counters.num_reads == 5
    assert retry.counters.num_retries == 0


def test_another_object_is_refused(proxy: Proxy, gateway: Gateway) -> None:
    front = proxy()
    size, tag = storage.size_and_tag(URL)
    assert size == SIZE
    assert storage.read_range(URL, 5, 10, tag=tag) == CONTENT[5:15]
    front.queue.append("changed")  # a store that does not look at If-Match
    with pytest.raises(storage.ChangedObjectError, match="its etag is another"):
        storage.read_range(URL, 5, 10, tag=tag)
    gateway.client().put_object(Bucket="films", Key="faults/object", Body=CONTENT[::-1])
    with pytest.raises(storage.ChangedObjectError, match="PreconditionFailed"):  # no body was sent
        storage.read_range(URL, 5, 10, tag=tag)
    assert storage.read_range(URL, 5, 10) == CONTENT[::-1][5:15]
    assert retry.counters.num_retries == 0


def test_many_threads_and_a_faulty_store(proxy: Proxy) -> None:
    front = proxy(rate=0.2, kinds=["slow_down", "reset", "short", "server_error"], seed=3)
    draw = random.Random(1)
    ranges = [(draw.randrange(SIZE - 5000), draw.randrange(1, 5000)) for _ in range(400)]
    with ThreadPoolExecutor(64) as pool:
        parts = list(pool.map(lambda at: storage.read_range(URL, *at), ranges))
    assert parts == [CONTENT[offset : offset + size] for offset, size in ranges]
    num_faults = sum(front.counts[kind] for kind in front.kinds)
    assert num_faults > 40
    assert retry.counters.num_retries == num_faults
    assert retry.counters.num_reads == front.counts["GET"] == 400 + num_faults
    assert retry.counters.num_throttled == front.counts["slow_down"]


def test_sixty_four_reads_at_a_time(proxy: Proxy) -> None:
    front = proxy(delay_s=1.0)
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda at: storage.read_range(URL, at, 10), range(64)))
    assert front.most_at_a_time >= 50


@pytest.mark.slow
def test_a_store_that_is_not_there(aws: Callable[..., None]) -> None:
    aws(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(OSError, match=r"gave up after 3 s.*Could not connect"):
        storage.read_range(URL, 0, 10, deadline_s=3)


def test_an_outage_is_waited_for(proxy: Proxy) -> None:
    front = proxy()
    assert storage.read_range(URL, 0, 10) == CONTENT[:10]
    front.outage(0.0, 1.5)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: storage.read_range(URL, at, 10, deadline_s=30), range(8)))
    assert parts == [CONTENT[at : at + 10] for at in range(8)]
    assert front.counts["refused"] >= 8
    assert retry.counters.num_failures == 0


def test_a_second_read_beside_a_stuck_one(proxy: Proxy) -> None:
    front = proxy()
    front.queue.append("stuck")
    assert storage.read_range(URL, 0, 1000, attempt_s=20, hedge_s=0.2) == CONTENT[:1000]
    assert retry.counters.num_hedges == 1
    assert retry.counters.num_retries == 0
    assert retry.counters.num_reads == front.counts["GET"] == 2


def test_a_second_read_beside_a_slow_body_with_a_fault_of_its_own(proxy: Proxy) -> None:
    front = proxy()
    front.queue.extend(["slow", "slow_down", None])
    assert storage.read_range(URL, 0, 1000, attempt_s=2, hedge_s=0.5) == CONTENT[:1000]
    assert retry.counters.num_hedges == 1
    assert retry.counters.num_retries == 1


def test_no_second_read_while_all_reads_are_slow(proxy: Proxy) -> None:
    proxy(delay_s=0.3)
    for at in range(3):
        storage.read_range(URL, at, 10, hedge_s=2.0)
    for at in range(5):  # three times the median is 0.9 s, whatever the smaller figure asks for
        storage.read_range(URL, at, 10, hedge_s=0.05)
    assert retry.counters.num_hedges == 0


@pytest.fixture
def keys_in_file(
    aws: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, str], None]:
    """keys_in_file(endpoint, key, secret): the shared credentials file, replaced whole at each call."""
    monkeypatch.setattr("shards.s3.RENEW_EVERY_S", 0.1)

    def write(endpoint: str, key: str, secret: str) -> None:
        (tmp_path / "new").write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
        (tmp_path / "new").replace(tmp_path / "credentials")
        if endpoint:
            aws(endpoint, AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "credentials"))
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
            monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    return write


def test_expired_credentials_are_read_anew(
    proxy: Proxy, gateway: Gateway, keys_in_file: Callable[[str, str, str], None]
) -> None:
    front = proxy()
    front.expired_keys.add("old-key")
    keys_in_file(front.endpoint, "old-key", "old-secret")
    renewer = threading.Timer(0.8, keys_in_file, ["", gateway.key, gateway.secret])
    renewer.start()
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: storage.read_range(URL, at, 10, deadline_s=30), range(40)))
    renewer.join()
    assert parts == [CONTENT[at : at + 10] for at in range(40)]
    assert 1 <= retry.counters.num_renewals < front.counts["expired"]
    assert retry.counters.num_retries == front.counts["expired"] >= 8
    assert retry.counters.num_reads == front.counts["GET"]
    assert retry.counters.num_failures == 0


def test_a_key_that_was_replaced_while_the_file_was_not_yet(
    proxy: Proxy, gateway: Gateway, keys_in_file: Callable[[str, str, str], None]
) -> None:
    """Once it worked, an unknown key is a key in rotation; at the very first request it is a mistake."""
    front = proxy()
    keys_in_file(front.endpoint, gateway.key, gateway.secret)
    assert storage.read_range(URL, 0, 10) == CONTENT[:10]
    time.sleep(0.15)
    keys_in_file("", "unknown-key", "unknown-secret")
    front.queue.append("expired")
    renewer = threading.Timer(0.6, keys_in_file, ["", gateway.key, gateway.secret])
    renewer.start()
    assert storage.read_range(URL, 0, 10, deadline_s=30) == CONTENT[:10]
    renewer.join()
    assert retry.counters.num_renewals >= 2


def test_credentials_that_stay_expired(proxy: Proxy, gateway: Gateway) -> None:
    front = proxy()
    front.expired_keys.add(gateway.key)
    with pytest.raises(OSError, match=r"gave up after 1 s.*ExpiredToken"):
        storage.read_range(URL, 0, 10, deadline_s=1)


@pytest.mark.slow
def test_no_secret_in_an_error(proxy: Proxy, aws: Callable[..., None], gateway: Gateway) -> None:
    """Wrong keys, wrong signatures, and a password in the endpoint's URL."""
    texts: list[str] = []

    def fails(kind: type[Exception]) -> None:
        with pytest.raises(kind) as caught:
            storage.read_range(URL, 0, 10, deadline_s=3)
        error: BaseException | None = caught.value
        while error is not None:  # a traceback prints causes too
            texts.append(f"{error!r} {error}")
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)

    aws(AWS_ACCESS_KEY_ID="wrong-canary-id")
    fails(PermissionError)
    aws(AWS_SECRET_ACCESS_KEY="wrong-canary-secret")
    fails(PermissionError)
    aws("http://user:canary-password@127.0.0.1:1/")
    fails(OSError)
    aws("http://user:canary-password@127.0.0.1:1/?token=canary-token")
    fails(UserError)
    assert "AWS_ENDPOINT_URL" in texts[-1]
    front = proxy()
    front.expired_keys.add(gateway.key)
    fails(OSError)
    assert len(texts) == 5
    for secret in (gateway.key, gateway.secret, "canary", os.environ["AWS_SECRET_ACCESS_KEY"]):
        assert not [text for text in texts if secret in text]


def test_what_the_user_can_mend(aws: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="names no bucket"):
        storage.read_range("s3:///a", 0, 10)
    with pytest.raises(UserError, match=r"no_such bucket.*cannot be asked for"):
        storage.read_range("s3://no_such bucket/a", 0, 10)
    aws("not a url")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL"):
        storage.read_range(URL, 0, 10)
    aws(AWS_PROFILE="nobody")
    with pytest.raises(UserError, match="needs S3 credentials"):
        storage.read_range(URL, 0, 10)
    aws()
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="needs S3 credentials"):
        storage.read_range(URL, 0, 10)
    assert retry.counters.num_retries == 0
