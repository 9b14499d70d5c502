"""One video of a micro batch: read it, decode it, fill its rows; or find out that it cannot be used and take another.

Runs in background threads, several videos at a time. Which frames and which crop are taken was settled by arithmetic
before (clip.py); what is settled here is only whether the sample can be used at all.

Legend: B clips of a micro batch, T frames, N bytes per frame, U different frames of a video.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.config import DataConfig
from pretrain.data.clip import ClipPlan, plan_clip
from pretrain.data.decode import Frames, VideoFacts
from pretrain.data.pool import DecoderPool, PoolClosedError, Request
from pretrain.ledger import Journal, JournalRow
from shards.errors import SampleError
from shards.order import FILLER, substitute
from shards.reader import SplitReader

_FACT_NAMES = ("num_frames", "height", "width", "grid", "matrix", "full_range")

BLACK_2X2 = np.array([16, 16, 16, 16, 128, 128], dtype=np.uint8)
"""A black I420 frame of 2x2 pixels: what filler clips show."""


@dataclass(frozen=True)
class Video:
    """One position of a micro batch, and the rows of the batch that its clips fill."""

    position: int
    epoch: int
    wanted: int
    rows: tuple[int, ...]
    draws: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """A micro batch in the making; each thread fills rows of its own."""

    planes_BTN: NDArray[np.uint8]
    facts_B: NDArray[np.void]
    """All else that a ClipBatch says of a clip, one structured row each."""


@dataclass(frozen=True)
class Delivery:
    """What became of a Video. Its rows are filled, unless its frames were too large for them."""

    sample: int | None
    """None: too many samples failed in a row."""
    failures: tuple[tuple[int, SampleError], ...]
    """The samples that were tried before, in order."""
    obeyed: JournalRow | None
    """The journal row that named the sample to begin with."""
    decode_s: float = 0.0
    num_bytes: int = 0
    num_stride_dropped: int = 0
    too_large: tuple[NDArray[np.uint8], ...] = ()
    """The frames [T, N] of each clip if a row of the batch cannot hold them: a substitute may be larger."""


def new_rows(num_rows: int, frames: int, frame_bytes: int) -> Rows:
    """Make rows for a micro batch: every one a filler clip but for its pixels."""
    fields = [
        ("height", "i4"),
        ("width", "i4"),
        ("crop", "f4", (4,)),
        ("flip", "?"),
        ("color", "u1"),
        ("frame_numbers", "i4", (frames,)),
        ("position", "i8"),
        ("epoch", "i8"),
        ("draw", "i8"),
        ("wanted", "i8"),
        ("sample", "i8"),
        ("checksum", "i8"),
        ("weight", "f4"),
    ]
    facts_B = np.zeros(num_rows, dtype=fields)
    facts_B["height"] = facts_B["width"] = 2
    facts_B["crop"] = (0, 0, 2, 2)
    facts_B["position"] = facts_B["wanted"] = facts_B["sample"] = FILLER
    return Rows(np.empty((num_rows, frames, frame_bytes), dtype=np.uint8), facts_B)


def put_frames(row_TN: NDArray[np.uint8], frames_TN: NDArray[np.uint8]) -> None:
    """Copy the frames of a clip into its row; the padding is zero, so that batches are equal byte for byte."""
    num_bytes = frames_TN.shape[1]
    row_TN[:, :num_bytes] = frames_TN
    row_TN[:, num_bytes:] = 0


class Fetcher:
    """Everything a thread needs to turn a Video into filled rows. Holds no reference to the loader."""

    def __init__(
        self,
        data: DataConfig,
        *,
        seed: int,
        reader: SplitReader,
        pool: DecoderPool,
        journal: Journal,
        max_bad: int,
    ) -> None:
        self._data = data
        self._seed = seed
        self._reader = reader
        self._pool = pool
        self._journal = journal
        self._max_bad = max_bad

    def fetch(self, video: Video, rows: Rows) -> Delivery:
        """Fill the rows of a video with its sample, else with the first substitute that can be used."""
        failures: list[tuple[int, SampleError]] = []
        obeyed = self._journal.find(video.position)
        for sample in self._candidates(video, obeyed):
            try:
                return self._deliver(sample, video, rows, tuple(failures), obeyed)
            except SampleError as error:
                failures.append((sample, error))
            if len(failures) > self._max_bad:
                break
        return Delivery(None, tuple(failures), obeyed)

    def _candidates(self, video: Video, obeyed: JournalRow | None) -> Iterator[int]:
        """The sample of a position (an earlier attempt's substitute is not questioned), then every other one."""
        first = video.wanted if obeyed is None else obeyed.substitute
        yield first
        num_samples = len(self._reader)
        for attempt in range(num_samples - 1):
            sample = substitute(self._seed, num_samples, video.position, attempt)
            if sample != first:
                yield sample

    def _deliver(
        self,
        sample: int,
        video: Video,
        rows: Rows,
        failures: tuple[tuple[int, SampleError], ...],
        obeyed: JournalRow | None,
    ) -> Delivery:
        record = self._reader.records[sample]
        facts = VideoFacts(**{name: int(record[name]) for name in _FACT_NAMES})
        plans = [self._plan(sample, video.epoch, draw, facts) for draw in video.draws]
        content = self._reader.read(sample)
        numbers_CT = np.stack([plan.frame_numbers_T for plan in plans])
        numbers_U, index_CT = np.unique(numbers_CT, return_inverse=True)
        index_CT = index_CT.reshape(numbers_CT.shape)
        with self._pool.decoded(Request(content, numbers_U, facts)) as answer:
            if answer.checksum != int(record["checksum"]):
                raise SampleError("checksum", "the bytes that were decoded are not those of the index")
            frames_UN = answer.frames.planes_TN
            fits = frames_UN.shape[1] <= rows.planes_BTN.shape[2]
            too_large: list[NDArray[np.uint8]] = []
            for row, index_T in zip(video.rows, index_CT, strict=True):
                clip_TN = frames_UN if len(index_T) == len(numbers_U) else frames_UN[index_T]
                if fits:
                    put_frames(rows.planes_BTN[row], clip_TN)
                else:
                    too_large.append(clip_TN.copy())
        for row, draw, plan in zip(video.rows, video.draws, plans, strict=True):
            _put_facts(rows.facts_B[row : row + 1], video, draw, plan, sample, answer.checksum, answer.frames)
        num_dropped = sum(plan.stride < self._data.stride for plan in plans)
        return Delivery(sample, failures, obeyed, answer.decode_s, len(content), num_dropped, tuple(too_large))

    def _plan(self, sample: int, epoch: int, draw: int, facts: VideoFacts) -> ClipPlan:
        return plan_clip(
            seed=self._seed,
            epoch=epoch,
            sample=sample,
            draw=draw,
            num_frames=facts.num_frames,
            height=facts.height,
            width=facts.width,
            grid=facts.grid,
            frames=self._data.frames,
            stride=self._data.stride,
            short=self._data.short,
            crop_scales=self._data.crop_scales,
            flip=self._data.flip,
        )


def _put_facts(
    facts_1: NDArray[np.void], video: Video, draw: int, plan: ClipPlan, sample: int, checksum: int, frames: Frames
) -> None:
    values = {
        "height": frames.height,
        "width": frames.width,
        "crop": plan.crop,
        "flip": plan.flip,
        "color": frames.color,
        "frame_numbers": plan.frame_numbers_T,
        "position": video.position,
        "epoch": video.epoch,
        "draw": draw,
        "wanted": video.wanted,
        "sample": sample,
        "checksum": checksum,
        "weight": 1.0,
    }
    for name, value in values.items():
        facts_1[name] = value


class FetchThreads:
    """A few daemon threads that work off calls in order: a read that hangs must not keep the process from ending."""

    def __init__(self, num_threads: int) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Delivery], Callable[[], Delivery]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=_work, args=(self._calls,), daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], Delivery]) -> Future[Delivery]:
        """Queue a call; its result or exception arrives in the future."""
        future: Future[Delivery] = Future()
        self._calls.put((future, call))
        return future

    def close(self) -> None:
        """Cancel what waits and let the threads end after the call each is in."""
        with suppress(queue.Empty):
            while True:  # the threads take from the same queue: it may be empty by the time it is asked
                entry = self._calls.get_nowait()
                if entry is not None and entry[0].set_running_or_notify_cancel():
                    entry[0].set_exception(PoolClosedError())
        for _ in self._threads:
            self._calls.put(None)

    def join(self, limit_s: float) -> None:
        """Wait for the threads to end, but not for a read that hangs."""
        end_s = time.monotonic() + limit_s
        for thread in self._threads:
            if thread is not threading.current_thread():  # a forgotten loader may be collected in any thread
                thread.join(max(0.0, end_s - time.monotonic()))


def _work(calls: queue.SimpleQueue[tuple[Future[Delivery], Callable[[], Delivery]] | None]) -> None:
    while (entry := calls.get()) is not None:
        future, call = entry
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        del entry, future, call  # a finished call must not keep its batch alive while this thread waits
