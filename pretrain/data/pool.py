"""The parent's side of decoding: a few worker processes that may be killed at any moment.

Threads of the loader borrow a decoder each: video bytes go into its shared-memory slot, frames come back in the same
slot. A decoder that does not answer in time is killed and its sample given up; one that dies is replaced and the
sample tried once more. The other decoders keep their work: nothing is shared between them.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from pretrain.data.decode import Frames, VideoFacts, decode_frames
from pretrain.data.worker import READY
from shards.errors import SampleError, UserError

WORKER_COMMAND = (sys.executable, "-m", "pretrain.data.worker")
_START_DEADLINE_S = 120.0
VIDEOS_PER_PROCESS = 5000
"""A codec library that leaks loses its memory with its process: a fresh one takes over after so many videos."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Request:
    """One video to decode."""

    video: bytes
    frame_numbers: NDArray[np.int32]
    """Ascending, no repeats."""
    facts: VideoFacts


@dataclass(frozen=True)
class Answer:
    """Decoded frames. `frames.planes_TN` may lie in a shared slot: copy it before the decoder is given back."""

    frames: Frames
    checksum: int
    """crc32 of the bytes that the decoder was given."""
    decode_s: float


class _DecoderDiedError(Exception):
    """The process ended while it worked: by its codec, the kernel's memory killer, or an operator."""


class PoolClosedError(Exception):
    """The pool was closed while a request was under way."""


class _Decoder(Protocol):
    def decode(self, request: Request) -> Answer: ...

    def close(self) -> None: ...


class DecoderPool:
    """`num_workers` killable decoders, or one in this process if `num_workers` is 0. Safe to use from many threads."""

    def __init__(
        self,
        num_workers: int,
        *,
        decoder: str,
        slot_bytes: int,
        deadline_s: float,
        worker_command: Sequence[str] | None = None,
    ) -> None:
        self._decoders: list[_Decoder] = [
            _DecodeProcess(decoder, slot_bytes, deadline_s, worker_command or WORKER_COMMAND)
            for _ in range(num_workers)
        ] or [_InProcessDecoder(decoder)]
        self._idle: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
        for free in self._decoders:
            self._idle.put(free)

    @property
    def num_respawns(self) -> int:
        """Processes started in place of one that was killed or died."""
        processes = [d for d in self._decoders if isinstance(d, _DecodeProcess)]
        return sum(max(0, d.num_starts - 1 - d.num_planned) for d in processes)

    @property
    def pids(self) -> list[int]:
        """Process numbers of the workers that run now."""
        processes = [d.process for d in self._decoders if isinstance(d, _DecodeProcess)]
        return [process.pid for process in processes if process is not None and process.poll() is None]

    @contextmanager
    def decoded(self, request: Request) -> Generator[Answer]:
        """Decode with the next free decoder, which is kept until the block ends.

        Raises SampleError: "decode" (damaged), "deadline" (killed after the deadline), "died" (its process died twice).
        """
        decoder = self._idle.get()
        try:
            try:
                answer = decoder.decode(request)
            except _DecoderDiedError:
                try:
                    answer = decoder.decode(request)
                except _DecoderDiedError as error:
                    raise SampleError("died", f"the decoder process died twice: {error}") from error
            yield answer
        finally:
            self._idle.put(decoder)

    def close(self) -> None:
        """Kill and reap all workers. Threads that wait for one get PoolClosedError."""
        for decoder in self._decoders:
            decoder.close()


class _InProcessDecoder:
    def __init__(self, decoder: str) -> None:
        self._decoder = decoder

    def decode(self, request: Request) -> Answer:
        start_s = time.perf_counter()
        frames = decode_frames(request.video, request.frame_numbers, self._decoder, request.facts)
        return Answer(frames, zlib.crc32(request.video), time.perf_counter() - start_s)

    def close(self) -> None: ...


class _DecodeProcess:
    """One worker process, started when first needed, and its slot."""

    def __init__(self, decoder: str, slot_bytes: int, deadline_s: float, command: Sequence[str]) -> None:
        self._decoder = decoder
        self._deadline_s = deadline_s
        self._command = command
        self._slot_bytes = slot_bytes
        self._slot_file = _anonymous_file(slot_bytes)
        self._slot = mmap.mmap(self._slot_file.fileno(), slot_bytes)
        self._busy = threading.Lock()  # held while a thread talks to the process
        self._starting = threading.Lock()  # between a start and `close`
        self._is_closed = False
        self.process: subprocess.Popen[bytes] | None = None
        self._num_videos = 0  # by the process that runs now
        self.num_starts = 0
        self.num_planned = 0
        """Ends that were no fault."""

    def decode(self, request: Request) -> Answer:
        with self._busy:
            if self._num_videos >= VIDEOS_PER_PROCESS:
                self._kill()
                self.num_planned += 1
            answer = self._ask(request)
            self._num_videos += 1
        if "error" in answer:
            raise SampleError(answer["error"], answer["detail"])
        planes_N = np.frombuffer(self._slot, dtype=np.uint8, count=answer["num_bytes"])
        planes_TN = planes_N.reshape(len(request.frame_numbers), -1)
        frames = Frames(planes_TN, answer["height"], answer["width"], answer["color"])
        return Answer(frames, answer["checksum"], answer["decode_s"])

    def close(self) -> None:
        with self._starting:
            self._is_closed = True
        process = self.process
        if process is not None:
            process.kill()  # which also wakes the thread that waits for an answer
        with self._busy:
            self._kill()
            self._slot_file.close()
            with suppress(BufferError):  # a thread is copying frames: the slot goes when it is done
                self._slot.close()

    def _ask(self, request: Request) -> dict[str, Any]:
        process = self.process or self._start()
        assert process.stdin is not None
        header = {
            "size": len(request.video),
            "frame_numbers": request.frame_numbers.tolist(),
            "decoder": self._decoder,
            "facts": asdict(request.facts),
        }
        self._slot[: len(request.video)] = request.video
        try:
            process.stdin.write(json.dumps(header).encode() + b"\n")
            process.stdin.flush()
            return json.loads(_read_line(process, self._deadline_s))
        except TimeoutError:
            self._kill()
            raise SampleError("deadline", f"decoding took more than {self._deadline_s:g} s") from None
        except (EOFError, BrokenPipeError):
            raise self._died(self._kill()) from None

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the worker with the trainer's signals blocked: it must not die of them before it can ignore them."""
        arguments = [*self._command, str(self._slot_file.fileno()), str(self._slot_bytes)]
        search_path = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search_path)), "OMP_NUM_THREADS": "1"}
        with self._starting:
            if self._is_closed:
                raise PoolClosedError
            previous = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
            try:
                process = self.process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pass_fds=(self._slot_file.fileno(),),
                    env=environment,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, previous)
            self.num_starts += 1
            self._num_videos = 0
        try:
            ready = _read_line(process, _START_DEADLINE_S)
        except (EOFError, TimeoutError):
            ready = b""
        if ready == READY:
            return process
        code = self._kill()
        if code < 0 or self._is_closed:
            raise self._died(code)
        command = " ".join(arguments)
        raise UserError(
            f"a decode worker did not start (exit code {code}, its message is above): mend what it says; "
            f"it was {command}"
        )

    def _died(self, code: int) -> Exception:
        return PoolClosedError() if self._is_closed else _DecoderDiedError(f"exit code {code}")

    def _kill(self) -> int:
        """Kill and reap the process, if there is one; the next request starts another. Returns its exit code."""
        process, self.process = self.process, None
        if process is None:
            return 0
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # a request that the dead process never read
                    pipe.close()
        return code


def _read_line(process: subprocess.Popen[bytes], deadline_s: float) -> bytes:
    """Read one line from a process. Raises TimeoutError, or EOFError if the process is gone."""
    assert process.stdout is not None
    end_s = time.monotonic() + deadline_s
    line = b""
    poller = select.poll()
    poller.register(process.stdout, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poller.poll(max(0.0, end_s - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(process.stdout.fileno(), 65536)
        if not part:
            raise EOFError
        line += part
    return line


def _anonymous_file(num_bytes: int) -> BinaryIO:
    """Make memory that a child can share by file descriptor and that vanishes with the last process that has it."""
    if hasattr(os, "memfd_create"):
        file = cast(BinaryIO, os.fdopen(os.memfd_create("tubelet-slot"), "r+b", buffering=0))
    else:
        file = cast(BinaryIO, tempfile.TemporaryFile(buffering=0))  # noqa: SIM115  # the caller closes it
    file.truncate(num_bytes)
    return file
