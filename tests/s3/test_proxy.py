"""The proxy itself: invisible without faults, the same faults for the same seed, usable from a shell."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from shards import storage
from tests.s3.conftest import Gateway
from tests.s3.proxy import KINDS, FaultProxy


def test_nothing_changes_without_faults(proxy: Callable[..., FaultProxy], gateway: Gateway) -> None:
    front = proxy()
    data = bytes(range(256)) * 5000
    storage.write_bytes("s3://films/proxy/a", data)
    assert storage.read_bytes("s3://films/proxy/a") == data
    [file] = storage.list_files("s3://films/proxy")
    assert (file.name, file.num_bytes) == ("a", len(data))
    storage.remove("s3://films/proxy/a")
    assert front.counts["PUT"] == front.counts["DELETE"] == 1
    assert front.counts["GET"] == front.counts["requests"] - 2 == 2
    assert not set(front.counts) & set(KINDS)


def test_a_seed_gives_the_same_faults() -> None:
    def faults(seed: int) -> list[str | None]:
        front = FaultProxy(("127.0.0.1", 1), rate=0.3, seed=seed)
        return [front._fault("GET", b"") for _ in range(200)]

    assert faults(1) == faults(1) != faults(2)
    assert 30 < sum(fault is not None for fault in faults(1)) < 90
    assert set(faults(1)) == {None, *KINDS}


def test_it_runs_from_a_shell(gateway: Gateway, aws: Callable[..., None]) -> None:
    command = [sys.executable, str(Path(__file__).with_name("proxy.py"))]
    command += ["--upstream", f"{gateway.host}:{gateway.port}", "--delay-ms", "5", "--rate", "0.5", "--seed", "4"]
    command += ["--kinds", "slow_down,server_error"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        aws(json.loads(process.stdout.readline())["endpoint"])
        storage.write_bytes("s3://films/shell/a", b"0123")
        for _ in range(20):
            assert storage.read_range("s3://films/shell/a", 1, 2) == b"12"
        process.send_signal(signal.SIGTERM)
        counts = json.loads(process.stdout.read())
    assert counts["GET"] == storage.counters.num_reads == 20 + counts["slow_down"] + counts["server_error"]
    assert process.returncode == 0
