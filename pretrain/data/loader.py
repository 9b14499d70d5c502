"""Order -> read -> decode -> batch: the stream of ClipBatches of one rank.

    clip numbers of a step (shards.order) ─ samples (shards.dataset) ─ threads: range reads, neighbours together
        ─ threads: plan (clip.py), killable decoders (pool.py) ─ rows of one uint8 tensor (rows.py) ─ ClipBatch

There is no state but the number of global batches handed out: everything else is a function of it (contracts C1 to
C3). What only the clock or the disk decides, a sample that could not be used, becomes a journal row before the batch
is handed out, and rows found in the journal are obeyed (contract C6).

Legend: B clips of a micro batch, R clips that are no fillers.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from pretrain.batch import ClipBatch
from pretrain.data.decode import check_decoder
from pretrain.data.fetch import Content, Delivery, Fetcher
from pretrain.data.pool import DecoderPool
from pretrain.data.rows import Rows, Video
from pretrain.data.source import check_fit, open_dataset
from pretrain.data.stats import LoaderStats, Totals
from pretrain.data.threads import Threads
from pretrain.journal import Journal, JournalRow
from pretrain.sections import DataConfig, LimitsConfig
from shards.errors import SampleError, UserError
from shards.order import FILLER, ORDER_VERSION, clip_places, num_micro_steps, rank_clips

MAX_NAMED = 20
NUM_READERS = 16
"""Reads under way at a time: they wait for storage, not for a processor."""


@dataclass(frozen=True)
class _MicroBatch:
    """One micro batch under way."""

    step: int
    micro_step: int
    rows: Rows
    videos: list[Video]
    deliveries: list[Future[Delivery]]


class ClipLoader:
    """An endless stream of ClipBatches, one per micro step; ends only if `num_clips` is given.

    The sequence depends on the data set, the seed, the global batch and the clip settings, and on nothing else: not on
    workers, ranks, micro batch, prefetching, kills or resumes. `micro_batch` defaults to this rank's whole
    share of the global batch. `num_clips` (evaluation) stops after that many clips, counted over all ranks; iterating
    again then starts over.

    Raises UserError for settings that do not fit the data, a data set that changed, or too many unusable samples.
    Close it, or use it as a context manager: it owns processes.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        journal: Journal | None = None,
        num_clips: int | None = None,
        limits: LimitsConfig | None = None,
        worker_command: Sequence[str] | None = None,
    ) -> None:
        check_decoder(data.decoder)
        limits = limits or LimitsConfig()
        self._wait_limit_s = limits.wait_limit_s
        self._data = data
        self._seed = seed
        self._global_batch = global_batch
        self._micro_batch = micro_batch or _default_micro_batch(global_batch, world_size, data.clips_per_video)
        self._rank = rank
        self._world_size = world_size
        self._num_clips = num_clips
        self._journal = journal or Journal(None)
        self._dataset = open_dataset(data, seed=seed, limits=limits)
        check_fit(
            data,
            self._dataset,
            global_batch=global_batch,
            micro_batch=self._micro_batch,
            world_size=world_size,
            has_cursor=num_clips is None,
        )
        self.num_micro_steps = num_micro_steps(global_batch, self._micro_batch, world_size)

        values_per_pixel = 3.0 if data.decoder == "decord" else 1.5
        clip_bytes = int(self._dataset.max_pixels * values_per_pixel) * data.frames
        self._pool = DecoderPool(
            data.workers,
            decoder=data.decoder,
            slot_bytes=max(self._dataset.max_bytes, clip_bytes * data.clips_per_video),
            deadline_s=data.decode_deadline_s,
            worker_command=worker_command,
        )
        self._max_bad = max(1, int(data.bad_sample_limit * self.num_samples))
        self._readers = Threads(NUM_READERS)
        self._fetcher = Fetcher(
            data,
            seed=seed,
            dataset=self._dataset,
            pool=self._pool,
            readers=self._readers,
            journal=self._journal,
            max_bad=self._max_bad,
        )
        self._fetcher.learn(self._journal.rows())
        # One thread per decoder, and one that copies frames meanwhile.
        self._threads = Threads(data.workers + 1)
        self._stop = weakref.finalize(self, _shut_down, self._readers, self._threads, self._pool)

        self._stats = LoaderStats()
        self._told = self._totals()
        self._micro_index = 0  # micro batches handed out since position 0
        self._under_way: deque[_MicroBatch] = deque()

    # ------------------------------------------------------------------ what a user sees

    @property
    def num_samples(self) -> int:
        """Samples to draw from, over all sources."""
        return self._dataset.num_samples

    @property
    def manifest_hash(self) -> str:
        """Hash of the content of all sources."""
        return self._dataset.manifest_hash

    @property
    def worker_pids(self) -> list[int]:
        """Process numbers of the decode workers that run now."""
        return self._pool.pids

    def __iter__(self) -> Iterator[ClipBatch]:
        if self._is_at_end(self._micro_index):
            self.go_to_step(0)
        return self

    def __next__(self) -> ClipBatch:
        """Hand out the next micro batch. Its tensors are the caller's to keep."""
        if self._is_at_end(self._micro_index):
            raise StopIteration
        start_s = time.perf_counter()
        self._prefetch(1 + self._data.prefetch_steps)
        batch = self._assemble(self._under_way[0])
        self._under_way.popleft()
        self._micro_index += 1
        self._stats.wait_s += time.perf_counter() - start_s
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Say where the stream is, in whole global batches (contract C2): small, and equal on all ranks.

        A batch counts from the moment it is handed out, so call this after the step that used it. Amid the micro
        batches of a step the state still names the beginning of that step. What was prefetched never counts.
        """
        position = self._micro_index // self.num_micro_steps * self._positions_per_step
        return {
            "position": position,
            "seed": self._seed,
            "order_version": ORDER_VERSION,
            "journal_digest": self._journal.digest(position),
            **self._dataset.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` says. Nothing that is finished is read again.

        The journal's digest is evidence for the audit and no gate: rows before the position are done with, and a
        rank that died late may have added some. A data set that grew by appending is taken over at its next epoch,
        and the journal says so. Raises UserError if the state is of another data set, seed or order, or not at the
        beginning of a step.
        """
        for key, ours in (("order_version", ORDER_VERSION), ("seed", self._seed)):
            if state[key] != ours:
                raise UserError(
                    f"the saved data state has {key} {state[key]!r}, this loader {ours!r}; they must be equal: "
                    "go on with the same data, seed and version, or start a new run"
                )
        step, rest = divmod(state["position"], self._positions_per_step)
        if rest:
            raise UserError(
                f"the saved data state is at position {state['position']}; it must be a multiple of "
                f"{self._positions_per_step} (global batch / clips_per_video): go on with the global batch of that run"
            )
        self.go_to_step(step)
        settled = self._dataset.go_on(state, state["position"], self._journal.growth())
        if self._rank == 0:
            self._journal.add_growth(settled)

    def go_to_step(self, step: int) -> None:
        """Hand out the batches of this step next, whichever came before."""
        for micro in self._under_way:
            for delivery in micro.deliveries:
                delivery.cancel()
        self._under_way.clear()
        self._micro_index = step * self.num_micro_steps

    def stats(self) -> LoaderStats:
        """Return what happened since the last call."""
        stats, self._stats = self._stats, LoaderStats()
        told, self._told = self._told, self._totals()
        return stats.since(told, self._told)

    def _totals(self) -> Totals:
        return Totals.now(self._pool.num_respawns, self._dataset.cache_counters)

    def close(self) -> None:
        """End all workers and threads. The loader cannot be used afterwards."""
        self._stop()

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ from clip numbers to work

    @property
    def _positions_per_step(self) -> int:
        return self._global_batch // self._data.clips_per_video

    def _is_at_end(self, micro_index: int) -> bool:
        step = micro_index // self.num_micro_steps
        return self._num_clips is not None and step * self._global_batch >= self._num_clips

    def _prefetch(self, num_steps: int) -> None:
        """Start whole steps until that many are under way, the one that is being handed out among them."""
        first_step = self._micro_index // self.num_micro_steps
        for step in range(first_step, first_step + num_steps):
            first_micro = step * self.num_micro_steps
            if self._is_at_end(first_micro):
                return
            if first_micro >= self._micro_index + len(self._under_way):
                self._under_way.extend(self._start(step))

    def _start(self, step: int) -> list[_MicroBatch]:
        """Begin to read and decode this rank's share of a step, neighbours in one read over all micro batches."""
        videos = [self._videos(step, micro_step) for micro_step in range(self.num_micro_steps)]
        contents = self._fetcher.read([video for of_micro in videos for video in of_micro])
        started: list[_MicroBatch] = []
        for micro_step, of_micro in enumerate(videos):
            frame_bytes = max([self._frame_bytes(video.wanted) for video in of_micro], default=0)
            rows = Rows.make(self._micro_batch, self._data.frames, frame_bytes)
            deliveries = [self._deliver(video, rows, contents) for video in of_micro]
            started.append(_MicroBatch(step, micro_step, rows, of_micro, deliveries))
        return started

    def _videos(self, step: int, micro_step: int) -> list[Video]:
        """The positions of a micro batch, and which of its rows they fill."""
        clips_B = rank_clips(
            step,
            micro_step,
            global_batch=self._global_batch,
            micro_batch=self._micro_batch,
            rank=self._rank,
            world_size=self._world_size,
        )
        if self._num_clips is not None:
            clips_B = np.where(clips_B < self._num_clips, clips_B, FILLER)
        position_B, draw_B = clip_places(clips_B, self._data.clips_per_video)
        real_R = np.flatnonzero(clips_B != FILLER)
        epoch_R, sample_R = self._dataset.places(position_B[real_R])
        videos: list[Video] = []
        for position in dict.fromkeys(position_B[real_R].tolist()):
            mine = np.flatnonzero(position_B[real_R] == position)
            rows = real_R[mine]
            epoch, wanted = int(epoch_R[mine[0]]), int(sample_R[mine[0]])
            videos.append(Video(position, epoch, wanted, tuple(rows.tolist()), tuple(draw_B[rows].tolist())))
        return videos

    def _deliver(self, video: Video, rows: Rows, contents: dict[int, Content]) -> Future[Delivery]:
        """Have a video decoded as soon as its bytes are there: one that is late holds up no other."""
        delivery: Future[Delivery] = Future()
        first, threads, fetch = self._fetcher.first(video), self._threads, self._fetcher.fetch

        def go_on(content: Content) -> None:
            error = content.exception()
            if error is None:
                threads.submit(partial(fetch, video, rows, first, content.result()), delivery)
            elif delivery.set_running_or_notify_cancel():
                delivery.set_exception(error)

        if first in contents:
            contents[first].add_done_callback(go_on)
        else:
            threads.submit(partial(fetch, video, rows), delivery)
        return delivery

    def _frame_bytes(self, sample: int) -> int:
        record = self._dataset.record(sample)
        pixels = (int(record["height"]) & ~1) * (int(record["width"]) & ~1)
        return pixels * 3 if self._data.decoder == "decord" else pixels * 3 // 2

    # ------------------------------------------------------------------ from finished work to a batch

    def _wait_for(self, future: Future[Delivery]) -> Delivery:
        try:
            return future.result(self._wait_limit_s)
        except TimeoutError as error:
            raise TimeoutError(
                f"no clip came within limits.wait_limit_s ({self._wait_limit_s:g} s): look at the storage with "
                "`tubelet doctor CONFIG`, or raise the limit"
            ) from error

    def _assemble(self, micro: _MicroBatch) -> ClipBatch:
        """Wait for all clips of a micro batch, write down what was replaced, and make the batch."""
        for video, future in zip(micro.videos, micro.deliveries, strict=True):
            delivery = self._wait_for(future)
            row = self._fetcher.obeyed(video)
            if row is not None and row != delivery.obeyed and row.substitute != delivery.sample:
                # Another clip of this video was replaced while this one was under way: they stay together.
                delivery = self._fetcher.fetch(video, micro.rows)
            self._write_down(video, delivery)
        self._stats.num_clips += sum(len(video.rows) for video in micro.videos)
        return micro.rows.to_batch(micro.step, micro.micro_step)

    def _write_down(self, video: Video, delivery: Delivery) -> None:
        """Turn what the clock and the disk decided into a journal row, before anybody sees the pixels."""
        self._stats.decode_s += delivery.decode_s
        self._stats.stride_dropped += delivery.num_stride_dropped
        is_news = self._fetcher.met(delivery.failures)
        if delivery.sample is not None and delivery.failures:
            reason = delivery.failures[0][1].reason
            self._journal.add(JournalRow(video.position, video.wanted, delivery.sample, reason))
            self._stats.substituted[reason] += 1
        elif delivery.obeyed is not None:
            self._stats.substituted[delivery.obeyed.reason] += 1
        if is_news:
            self._fetcher.learn(self._journal.of_all_ranks())
        if delivery.sample is None or len(self._bad) > self._max_bad:
            self._refuse()

    @property
    def _bad(self) -> dict[int, SampleError]:
        return self._fetcher.bad

    def _refuse(self) -> NoReturn:
        """Stop the run: too much of the data set cannot be used."""
        if not self._bad:
            raise UserError(
                f"data.shards has {self.num_samples} samples to draw from, and a thousand in a row were withdrawn; "
                "there must be others: use another data set, or pack more"
            )
        named = [f"{self._dataset.name(sample)} ({self._bad[sample]})" for sample in sorted(self._bad)[:MAX_NAMED]]
        if len(self._bad) > MAX_NAMED:
            named.append(f"and {len(self._bad) - MAX_NAMED} more")
        are_short = any(error.reason == "short" for error in self._bad.values())
        hint = f', leave short videos out (data.where="num_frames >= {self._data.frames}")' if are_short else ""
        raise UserError(
            f"data.bad_sample_limit is {self._data.bad_sample_limit:g}; at most {self._max_bad} of the "
            f"{self.num_samples} samples may prove unusable, and {len(self._bad)} did: run `tubelet verify` on "
            f"the data set and pack it anew{hint}, or raise the limit. Unusable: {'; '.join(named)}"
        )


def _default_micro_batch(global_batch: int, world_size: int, clips_per_video: int) -> int:
    """The whole share of a rank, in whole videos."""
    return -(-global_batch // (world_size * clips_per_video)) * clips_per_video


def _shut_down(readers: Threads, threads: Threads, pool: DecoderPool) -> None:
    try:
        readers.close()
        threads.close()
    finally:
        pool.close()
    readers.join(limit_s=1.0)
    threads.join(limit_s=1.0)
