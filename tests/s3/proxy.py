"""A proxy with faults in front of any S3 server: requests pass unchanged (signatures hold), answers to GET may not.

    python tests/s3/proxy.py --upstream 127.0.0.1:9000 --delay-ms 40 --rate 0.05 --down-after-s 60 --down-s 60

prints its port, and its counts as JSON when it is ended with SIGTERM or Ctrl-C. Only the standard library.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable

BLOCK_BYTES = 2**18
KINDS = ("slow_down", "reset", "short", "slow", "expired")
"""What `rate` draws from: all that a client should survive without a word of its user. Also known: "changed", "stuck",
"denied", "server_error"."""
REFUSALS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "server_error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "denied": (403, "AccessDenied", "Access Denied"),
}


class FaultProxy:
    """Faults come from `queue` (one per GET, None for none), then by `rate` from `kinds`, drawn with the seed.

    `counts`: "requests", "GET", "PUT" ..., "bytes" (of bodies sent to clients), and one entry per kind of fault done.
    `expired_keys`: access keys all of whose requests are answered with ExpiredToken. `delay_s` goes before each
    request; requests wait side by side. Use as a context manager: it serves from a thread of its own.
    """

    def __init__(
        self,
        upstream: tuple[str, int],
        *,
        port: int = 0,
        delay_s: float = 0.0,
        rate: float = 0.0,
        kinds: Iterable[str] = KINDS,
        seed: int = 0,
    ) -> None:
        self.upstream = upstream
        self.port = port
        self.delay_s = delay_s
        self.rate = rate
        self.kinds = tuple(kinds)
        self.queue: deque[str | None] = deque()
        self.expired_keys: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.most_at_a_time = 0
        self._at_a_time = 0
        self._draw = random.Random(seed)
        self._down_s: tuple[float, float] = (0.0, 0.0)
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        if not self._ready.wait(10):
            raise RuntimeError("the fault proxy did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def outage(self, after_s: float, for_s: float) -> None:
        """From then on, and for that long, all connections are cut and new ones as well."""
        start_s = time.monotonic() + after_s
        self._down_s = (start_s, start_s + for_s)
        self._loop.call_soon_threadsafe(self._loop.call_later, after_s, self._cut_all)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._client, "127.0.0.1", self.port, limit=BLOCK_BYTES, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _is_down(self) -> bool:
        return self._down_s[0] <= time.monotonic() < self._down_s[1]

    def _cut_all(self) -> None:
        for writer in list(self._writers):
            _reset(writer)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client; it has one upstream connection of its own."""
        if self._is_down():
            self.counts["refused"] += 1
            _reset(writer)
            return
        self._writers.add(writer)
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            upstream = await asyncio.open_connection(*self.upstream, limit=BLOCK_BYTES)
            while await self._exchange(reader, writer, *upstream):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # either side is gone; the other one is closed below
        finally:
            self._writers.discard(writer)
            for each in (writer, upstream[1] if upstream else None):
                if each is not None:
                    each.close()

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> bool:
        """One request and its answer; whether the connection stays open."""
        head = await reader.readuntil(b"\r\n\r\n")
        method = head.split(b" ", 1)[0].decode()
        self.counts["requests"] += 1
        self.counts[method] += 1
        self._at_a_time += 1
        self.most_at_a_time = max(self.most_at_a_time, self._at_a_time)
        try:
            fault = self._fault(method, head)
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if fault:
                self.counts[fault] += 1
            if fault == "stuck":
                await reader.read()  # until the client hangs up
                return False
            if fault in REFUSALS and method == "GET":
                writer.write(_refusal(*REFUSALS[fault]))
                await writer.drain()
                return True
            if fault in REFUSALS:  # the body is on its way; do not read it
                writer.write(_refusal(*REFUSALS[fault], close=True))
                await writer.drain()
                return False
            up_writer.write(head)
            if _field(head, b"expect"):
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await _pump(reader, up_writer, head)
            return await self._answer(method, fault, writer, up_reader)
        finally:
            self._at_a_time -= 1

    def _fault(self, method: str, head: bytes) -> str | None:
        if any(f"Credential={key}/".encode() in head for key in self.expired_keys):
            return "expired"
        if method != "GET":
            return None
        if self.queue:
            return self.queue.popleft()
        return self._draw.choice(self.kinds) if self._draw.random() < self.rate else None

    async def _answer(
        self, method: str, fault: str | None, writer: asyncio.StreamWriter, up_reader: asyncio.StreamReader
    ) -> bool:
        head = b"HTTP/1.1 100 "
        while head.startswith(b"HTTP/1.1 1"):  # "continue": we said so ourselves
            head = await up_reader.readuntil(b"\r\n\r\n")
        if fault == "changed":
            old = _field(head, b"etag")
            head = head.replace(old, b'"another' + old[-8:]) if old else head
        writer.write(head)
        if method == "HEAD" or head.split(b" ", 2)[1] in (b"204", b"304"):
            await writer.drain()
            return True
        size = int(_field(head, b"content-length") or 0)
        cut = {"short": size // 2, "reset": size // 2, "slow": min(size, 100)}.get(fault or "")
        await _pump(up_reader, writer, head, cut, self.counts)
        if fault == "slow":
            for _ in range(600):  # a byte each tenth of a second, until the client has had enough
                writer.write(await up_reader.readexactly(1))
                await writer.drain()
                await asyncio.sleep(0.1)
        elif fault == "reset":
            await asyncio.sleep(0.02)  # what was sent should get there first
            _reset(writer)
        return cut is None and _field(head, b"connection").lower() != b"close"


async def _pump(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    head: bytes,
    cut: int | None = None,
    counts: Counter[str] | None = None,
) -> None:
    """Pass a body on, only `cut` bytes of it where that is given; counted before the other side can see them."""
    counts = Counter() if counts is None else counts
    if b"chunked" in _field(head, b"transfer-encoding").lower():
        while True:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            counts["bytes"] += size
            writer.write(line + await reader.readexactly(size + 2))
            await writer.drain()
            if not size:
                return
    length = _field(head, b"content-length")
    left = int(length) if length else 0
    left = left if cut is None else min(left, cut)
    while left:
        block = await reader.read(min(left, BLOCK_BYTES))
        if not block:
            raise OSError("cut off")
        counts["bytes"] += len(block)
        left -= len(block)
        writer.write(block)
        await writer.drain()
    await writer.drain()


def _field(head: bytes, name: bytes) -> bytes:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.lower() == name:
            return value.strip()
    return b""


def _refusal(status: int, code: str, message: str, *, close: bool = False) -> bytes:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return (
        f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        f"Connection: {'close' if close else 'keep-alive'}\r\n\r\n{body}"
    ).encode()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other side gets a reset, not an end."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=0.0, help="share of the GETs that get a fault")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--down-after-s", type=float, default=0.0)
    parser.add_argument("--down-s", type=float, default=0.0, help="length of one total outage")
    options = parser.parse_args()
    host, _, port = options.upstream.rpartition(":")
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with FaultProxy(
        (host, int(port)),
        port=options.port,
        delay_s=options.delay_ms / 1e3,
        rate=options.rate,
        kinds=options.kinds.split(","),
        seed=options.seed,
    ) as proxy:
        print(json.dumps({"endpoint": proxy.endpoint}), flush=True)
        if options.down_s:
            proxy.outage(options.down_after_s, options.down_s)
        ended.wait()
        print(json.dumps({**proxy.counts, "most_at_a_time": proxy.most_at_a_time}), flush=True)


if __name__ == "__main__":
    main()
