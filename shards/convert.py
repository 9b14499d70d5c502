"""One file becomes its samples, in a child process with limits.

A decoder fed with strange bytes may run for ever, take all memory or crash. So each file is probed and encoded in a
child that can die without harm: it has a limit of address space (Linux), and a limit of CPU time that every decoded
frame renews. A child serves one file after the other; only after a death is a new one started.

    parent --(one JSON line: Job)--> child --(one JSON line: Outcome)--> parent;  videos travel as files in a folder
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.claims import LEVELS, read_claims
from shards.encode import PLANAR_420, Encoding, Motion, check_length, encode_file
from shards.errors import UserError
from shards.probe import Facts, Limits, Rejected, probe
from shards.storage import write_atomic

COMMAND = [sys.executable, "-m", "shards.convert"]
RENEW_EVERY_FRAMES = 16
HASH_BLOCK_BYTES = 8 << 20
MAX_COPY_BYTES = 2**32 - 1
MAX_SIDE = 2**16 - 1


@dataclass(frozen=True)
class Job:
    """What the child is asked for."""

    path: str
    folder: str
    """Where the samples and then `outcome.json` are put; "" leaves nothing behind."""
    preset: str
    """train, copy, or a level of `claims.LEVELS`: then nothing is made, the file is described as it is."""
    encoding: Encoding
    limits: Limits

    def to_json(self) -> str:
        """One line; `from_json` reads it back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read one line."""
        row = json.loads(text)
        row.update(encoding=Encoding(**row["encoding"]), limits=Limits(**row["limits"]))
        return cls(**row)


@dataclass(frozen=True)
class Piece:
    """One sample as it waits for its tar."""

    file: str
    start_s: float
    num_frames: int
    rate: float
    width: int
    height: int
    grid: int
    motion: float
    matrix: int
    full_range: bool


@dataclass(frozen=True)
class Outcome:
    """The samples of a file, or the reason why there are none."""

    pieces: tuple[Piece, ...] = ()
    reason: str = ""
    detail: str = ""
    sha256: str = ""
    """Of the file, where it gave samples."""

    def to_json(self) -> str:
        """One line; `from_json` reads it back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        """Read one line."""
        row = json.loads(text)
        pieces = tuple(Piece(**piece) for piece in row["pieces"])
        return cls(pieces, row["reason"], row["detail"], row.get("sha256", ""))


OUTCOME_NAME = "outcome.json"


class Converter:
    """The parent's end: a child that converts files, replaced when it dies. Not shared between threads."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def convert(self, job: Job) -> Outcome:
        """Convert one file. A child that dies is an outcome; UserError if the samples cannot be written."""
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(job.to_json() + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer.endswith("\n"):
            code = child.wait()
            self._child = None
            return _death(code, job.limits)
        outcome = Outcome.from_json(answer)
        if outcome.reason == "unwritable":
            raise UserError(
                f"{job.folder} cannot be written ({outcome.detail}); free some space or choose another place"
            )
        return outcome

    def close(self) -> None:
        """End the child, also in the middle of a file."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()

    def _start(self) -> subprocess.Popen[str]:
        paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._child = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        return self._child


@contextmanager
def converters(num_workers: int) -> Generator[Callable[[Job], Future[Outcome]]]:
    """A function that converts in one of several children; all of them are ended on the way out."""
    children = [Converter() for _ in range(num_workers)]
    idle: queue.SimpleQueue[Converter] = queue.SimpleQueue()
    for child in children:
        idle.put(child)
    stopped = threading.Event()

    def convert(job: Job) -> Outcome:
        child = idle.get()
        try:
            if stopped.is_set():
                return Outcome(reason="stopped")
            Path(job.folder).mkdir(exist_ok=True)
            return child.convert(job)
        except OSError as error:
            raise UserError(f"{job.folder} cannot be made ({error}); free some space and start again") from error
        finally:
            idle.put(child)

    pool = ThreadPoolExecutor(max(num_workers, 1), thread_name_prefix="convert")
    try:
        yield lambda job: pool.submit(convert, job)
    finally:
        stopped.set()
        for child in children:
            child.close()
        pool.shutdown(cancel_futures=True)


def _death(code: int, limits: Limits) -> Outcome:
    if code == -signal.SIGXCPU:
        return Outcome(reason="cpu_limit", detail=f"{limits.stall_cpu_s} CPU seconds without a further frame")
    if code < 0:
        return Outcome(reason="crash", detail=f"the decoder died of {signal.Signals(-code).name}")
    return Outcome(reason="crash", detail=f"the decoding process ended with exit code {code}")


def run_job(job: Job, renew: Callable[[], None]) -> Outcome:
    """Probe and encode one file; `renew` is called for every frame. What is wrong with the file is an Outcome."""
    try:
        pieces = _convert(job, renew)
        return Outcome(pieces, sha256=sha256_of_file(Path(job.path), renew) if job.folder else "")
    except Rejected as rejected:
        return Outcome(reason=rejected.reason, detail=rejected.detail)
    except MemoryError:
        return Outcome(reason="memory", detail=f"needs more than {job.limits.memory_bytes >> 20} MiB")
    except _UnwritableError as error:
        return Outcome(reason="unwritable", detail=str(error))
    except Exception as error:  # one strange file must not end the packing of a million; it is counted and named
        return Outcome(reason="error", detail=f"{type(error).__name__}: {error}")


class _UnwritableError(Exception):
    """The folder for samples is full or gone."""


def sha256_of_file(path: Path, renew: Callable[[], None] = lambda: None) -> str:
    """Hash of a whole file; `renew` is called for every block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
            renew()
    return digest.hexdigest()


def _convert(job: Job, renew: Callable[[], None]) -> tuple[Piece, ...]:
    path = Path(job.path)
    if not path.is_file():
        raise Rejected("missing", "there is no such file")
    if not os.access(path, os.R_OK):
        raise Rejected("unreadable", "no permission to read it")
    if job.preset in LEVELS:
        claims = read_claims(path, job.preset, job.limits, renew)
        return (Piece(file=str(path), start_s=0.0, grid=0, **vars(claims)),)
    motion = Motion(job.encoding.stride)
    is_copy = job.preset == "copy"

    def on_frame(frame: Any, number: int) -> None:
        renew()
        if is_copy:
            motion.add(frame, number)

    facts = probe(path, job.limits, on_frame)
    if is_copy:
        return (_copied(path, facts, job.encoding, motion.score),)
    pieces: list[Piece] = []
    for number, sample in enumerate(encode_file(path, facts, job.encoding, job.limits, renew)):
        file = Path(job.folder, f"{number:06d}.mp4")
        try:
            with file.open("wb") as out:
                out.write(sample.video)
                out.flush()
                os.fsync(out.fileno())  # before the outcome that names it: also a power cut leaves whole samples
        except OSError as error:
            raise _UnwritableError(str(error)) from error
        row = {name: value for name, value in vars(sample).items() if name != "video"}
        pieces.append(Piece(file=str(file), **row))
    return tuple(pieces)


def _copied(path: Path, facts: Facts, encoding: Encoding, motion: float) -> Piece:
    """A file that is stored as it is: it must need none of what the training encode would put right."""
    faults = {
        f"pixels are {facts.pixel_format}, not 8-bit 4:2:0": facts.pixel_format not in PLANAR_420,
        "it is rotated": facts.transform != (1, 0, 0, 1),
        f"pixels are not square ({facts.pixel_aspect:.3f})": abs(facts.pixel_aspect - 1) > 0.02,
        f"its size {facts.width}x{facts.height} is odd": facts.width % 2 or facts.height % 2,
        f"its size {facts.width}x{facts.height} is too large": max(facts.width, facts.height) > MAX_SIDE,
        "the main video stream is not the first": not facts.is_first_video,
        "it has 4 GiB or more": path.stat().st_size > MAX_COPY_BYTES,
        "its colour matrix is neither BT.601 nor BT.709": facts.colorspace in (0, 4, 7, 8, 9, 10),
    }
    for fault, found in faults.items():
        if found:
            raise Rejected("copy", f"{fault}; --preset train puts it right")
    check_length(facts.num_frames, encoding)
    duration_s = facts.times_s[-1]
    return Piece(
        file=str(path),
        start_s=0.0,
        num_frames=facts.num_frames,
        rate=(facts.num_frames - 1) / duration_s if duration_s > 0 else 1.0,
        width=facts.width,
        height=facts.height,
        grid=0,
        motion=motion,
        matrix=facts.matrix,
        full_range=facts.full_range,
    )


def main() -> None:
    """The child's end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints stays out of the protocol
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(lines,), daemon=True).start()
    limited = False
    while True:
        job = Job.from_json(lines.get())
        if not limited:
            _limit_memory(job.limits.memory_bytes)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            limited = True
        outcome = run_job(job, _renewer(job.limits.stall_cpu_s))
        try:
            if job.folder:
                write_atomic(Path(job.folder, OUTCOME_NAME), outcome.to_json().encode())
        except OSError as error:
            outcome = Outcome(reason="unwritable", detail=str(error))
        answers.write(outcome.to_json() + "\n")
        answers.flush()


def _limit_memory(more_bytes: int) -> None:
    """Let this process take so much more address space. On Linux only: macOS refuses the call."""
    if sys.platform == "linux":
        most_bytes = _address_space_bytes() + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))


def _address_space_bytes() -> int:
    """What the child with its libraries takes before it has opened a file."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0


def _read_lines(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # the parent is gone: end, also in the middle of a file


def _renewer(stall_cpu_s: int) -> Callable[[], None]:
    """A function that, called once per frame, moves the limit of CPU time forward."""
    count = 0
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]

    def renew() -> None:
        nonlocal count
        if count % RENEW_EVERY_FRAMES == 0:
            used = resource.getrusage(resource.RUSAGE_SELF)
            soft = int(used.ru_utime + used.ru_stime) + stall_cpu_s + 1
            resource.setrlimit(resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))
        count += 1

    renew()
    return renew


if __name__ == "__main__":
    main()
