"""Order -> read -> decode -> batch: the stream of ClipBatches of one rank.

    clip numbers of a micro step (shards.order) ─ index records ─ plans (clip.py)
        ─ threads: range read, checksum (fetch.py) ─ killable decoders (pool.py) ─ rows of one uint8 tensor

There is no state but the number of global batches handed out: everything else is a function of it (contracts C1 to
C3). What only the clock or the disk decides, a sample that could not be used, becomes a journal row before the batch
is handed out, and rows found in the journal are obeyed (contract C6).

Legend: B clips of a micro batch, T frames, N bytes per frame, R clips that are no fillers.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.batch import ClipBatch
from pretrain.config import DataConfig, LimitsConfig
from pretrain.data.decode import check_decoder
from pretrain.data.fetch import BLACK_2X2, Delivery, Fetcher, FetchThreads, Rows, Video, new_rows, put_frames
from pretrain.data.pool import DecoderPool
from pretrain.ledger import Journal, JournalRow
from shards.errors import SampleError, UserError
from shards.order import FILLER, ORDER_VERSION, clip_places, num_micro_steps, rank_clips, sample_numbers
from shards.reader import open_split

MAX_NAMED = 20


@dataclass
class LoaderStats:
    """What happened since the last call of `ClipLoader.stats`."""

    wait_s: float = 0.0
    """Time that `next` waited for a batch."""
    decode_s: float = 0.0
    """Time in decoders, summed over workers."""
    bytes_read: int = 0
    num_clips: int = 0
    stride_dropped: int = 0
    """Clips whose stride was lowered to fit the video (or that loop a short one)."""
    substituted: Counter[str] = field(default_factory=lambda: Counter[str]())
    """Positions whose sample was replaced, by reason."""
    num_respawns: int = 0
    """Decoder processes that were replaced."""


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
    again then starts over. `split` and `shards` replace those of `data`.

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
        split: str | None = None,
        shards: str | None = None,
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
        self._reader = open_split(
            shards or data.shards,
            split or data.split,
            attempt_s=limits.read_attempt_s,
            deadline_s=limits.read_deadline_s,
        )
        self.num_samples = len(self._reader)
        self._check_settings()
        self.num_micro_steps = num_micro_steps(global_batch, self._micro_batch, world_size)

        facts = self._reader.manifest.splits[self._reader.name]
        values_per_pixel = 3.0 if data.decoder == "decord" else 1.5
        clip_bytes = int(facts.max_pixels * values_per_pixel) * data.frames
        self._pool = DecoderPool(
            data.workers,
            decoder=data.decoder,
            slot_bytes=max(facts.max_bytes, clip_bytes * data.clips_per_video),
            deadline_s=data.decode_deadline_s,
            worker_command=worker_command,
        )
        self._max_bad = max(1, int(data.bad_sample_limit * self.num_samples))
        self._fetcher = Fetcher(
            data, seed=seed, reader=self._reader, pool=self._pool, journal=self._journal, max_bad=self._max_bad
        )
        # More threads than decoders: while these work, the next videos are on their way.
        self._threads = FetchThreads(2 * data.workers + 2 if data.workers else 1)
        self._stop = weakref.finalize(self, _shut_down, self._threads, self._pool)

        # Unusable samples met so far, and why; what earlier attempts met counts.
        self._bad: dict[int, str] = {row.wanted: row.reason for row in self._journal.rows()}
        self._stats = LoaderStats()
        self._num_respawns_told = 0
        self._micro_index = 0  # micro batches handed out since position 0
        self._under_way: deque[_MicroBatch] = deque()

    # ------------------------------------------------------------------ what a user sees

    @property
    def manifest_hash(self) -> str:
        """Hash of the data set's content."""
        return self._reader.manifest.hash

    @property
    def worker_pids(self) -> list[int]:
        """Process numbers of the decode workers that run now."""
        return self._pool.pids

    def __iter__(self) -> Iterator[ClipBatch]:
        if self._is_at_end(self._micro_index):
            self._go_to_step(0)
        return self

    def __next__(self) -> ClipBatch:
        """Hand out the next micro batch. Its tensors are the caller's to keep."""
        if self._is_at_end(self._micro_index):
            raise StopIteration
        start_s = time.perf_counter()
        self._prefetch(1 + self._data.prefetch_steps * self.num_micro_steps)
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
            "manifest_hash": self.manifest_hash,
            "order_version": ORDER_VERSION,
            "journal_digest": self._journal.digest(position),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` says. Nothing that is finished is read again.

        The journal's digest is evidence for the audit and no gate: rows before the position are done with, and a
        rank that died late may have added some. Raises UserError if the state is of another data set, seed or order,
        or not at the beginning of a step.
        """
        for key, ours in (
            ("order_version", ORDER_VERSION),
            ("manifest_hash", self.manifest_hash),
            ("seed", self._seed),
        ):
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
        self._go_to_step(step)

    def stats(self) -> LoaderStats:
        """Return what happened since the last call."""
        stats, self._stats = self._stats, LoaderStats()
        stats.num_respawns = self._pool.num_respawns - self._num_respawns_told
        self._num_respawns_told += stats.num_respawns
        return stats

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

    def _go_to_step(self, step: int) -> None:
        for micro in self._under_way:
            for delivery in micro.deliveries:
                delivery.cancel()
        self._under_way.clear()
        self._micro_index = step * self.num_micro_steps

    def _prefetch(self, num_under_way: int) -> None:
        """Start micro batches until that many are under way."""
        while len(self._under_way) < num_under_way:
            micro_index = self._micro_index + len(self._under_way)
            if self._is_at_end(micro_index):
                return
            self._under_way.append(self._start(*divmod(micro_index, self.num_micro_steps)))

    def _start(self, step: int, micro_step: int) -> _MicroBatch:
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
        epoch_R, sample_R = sample_numbers(self._seed, self.num_samples, position_B[real_R])
        videos: list[Video] = []
        for position in dict.fromkeys(position_B[real_R].tolist()):
            mine = np.flatnonzero(position_B[real_R] == position)
            rows_of_video = real_R[mine]
            draws = tuple(draw_B[rows_of_video].tolist())
            epoch, wanted = int(epoch_R[mine[0]]), int(sample_R[mine[0]])
            videos.append(Video(position, epoch, wanted, tuple(rows_of_video.tolist()), draws))
        frame_bytes = max([self._frame_bytes(video.wanted) for video in videos], default=BLACK_2X2.size)
        rows = new_rows(len(clips_B), self._data.frames, frame_bytes)
        deliveries = [self._threads.submit(partial(self._fetcher.fetch, video, rows)) for video in videos]
        return _MicroBatch(step, micro_step, rows, videos, deliveries)

    def _frame_bytes(self, sample: int) -> int:
        record = self._reader.records[sample]
        pixels = (int(record["height"]) & ~1) * (int(record["width"]) & ~1)
        return pixels * 3 if self._data.decoder == "decord" else pixels * 3 // 2

    # ------------------------------------------------------------------ from finished work to a batch

    def _wait_for(self, future: Future[Delivery]) -> Delivery:
        try:
            return future.result(self._wait_limit_s)
        except TimeoutError as error:
            raise TimeoutError(
                f"no clip came within limits.wait_limit_s ({self._wait_limit_s:g} s): is the storage answering?"
            ) from error

    def _assemble(self, micro: _MicroBatch) -> ClipBatch:
        """Wait for all clips of a micro batch, write down what was replaced, and make the batch."""
        deliveries: list[Delivery] = []
        for video, future in zip(micro.videos, micro.deliveries, strict=True):
            delivery = self._wait_for(future)
            row = self._journal.find(video.position)
            if row is not None and row != delivery.obeyed and row.substitute != delivery.sample:
                # Another clip of this video was replaced while this one was under way: they stay together.
                delivery = self._fetcher.fetch(video, micro.rows)
            self._write_down(video, delivery)
            deliveries.append(delivery)
        planes_BTN, facts_B = micro.rows.planes_BTN, micro.rows.facts_B
        largest = max((clip.shape[1] for d in deliveries for clip in d.too_large), default=0)
        if largest:
            planes_BTN = np.pad(planes_BTN, ((0, 0), (0, 0), (0, largest - planes_BTN.shape[2])))
            for video, delivery in zip(micro.videos, deliveries, strict=True):
                for row, clip_TN in zip(video.rows, delivery.too_large, strict=False):
                    put_frames(planes_BTN[row], clip_TN)
        for row in np.flatnonzero(facts_B["sample"] == FILLER):
            put_frames(planes_BTN[row], np.tile(BLACK_2X2, (self._data.frames, 1)))
        self._stats.num_clips += sum(len(video.rows) for video in micro.videos)

        def column(name: str) -> torch.Tensor:
            return _tensor(facts_B[name].copy())

        return ClipBatch(
            step=micro.step,
            micro_step=micro.micro_step,
            planes_BTN=_tensor(planes_BTN),
            height_B=column("height"),
            width_B=column("width"),
            crop_B4=column("crop"),
            flip_B=column("flip"),
            color_B=column("color"),
            frame_numbers_BT=column("frame_numbers"),
            position_B=column("position"),
            epoch_B=column("epoch"),
            draw_B=column("draw"),
            wanted_B=column("wanted"),
            sample_B=column("sample"),
            checksum_B=column("checksum"),
            weight_B=column("weight"),
        )

    def _write_down(self, video: Video, delivery: Delivery) -> None:
        """Turn what the clock and the disk decided into a journal row, before anybody sees the pixels."""
        self._stats.decode_s += delivery.decode_s
        self._stats.bytes_read += delivery.num_bytes
        self._stats.stride_dropped += delivery.num_stride_dropped
        if delivery.obeyed is not None:
            self._bad.setdefault(delivery.obeyed.wanted, delivery.obeyed.reason)
        self._bad.update((sample, str(error)) for sample, error in delivery.failures)
        if delivery.sample is None or len(self._bad) > self._max_bad:
            self._refuse()
        if delivery.failures:
            reason = delivery.failures[0][1].reason
            self._journal.add(JournalRow(video.position, video.wanted, delivery.sample, reason))
            self._stats.substituted[reason] += 1
        elif delivery.obeyed is not None:
            self._stats.substituted[delivery.obeyed.reason] += 1

    def _refuse(self) -> NoReturn:
        """Stop the run: too much of the data set cannot be used."""
        named = [f"{self._name(sample)} ({reason})" for sample, reason in sorted(self._bad.items())[:MAX_NAMED]]
        if len(self._bad) > MAX_NAMED:
            named.append(f"and {len(self._bad) - MAX_NAMED} more")
        raise UserError(
            f"data.bad_sample_limit is {self._data.bad_sample_limit:g}; at most {self._max_bad} of the "
            f"{self.num_samples} samples may prove unusable, and {len(self._bad)} did: run `tubelet verify` on "
            f"the data set and pack it anew, or raise the limit. Unusable: {'; '.join(named)}"
        )

    def _name(self, sample: int) -> str:
        try:
            return f"{self._reader.name} sample {sample} {self._reader.key(sample)!r}"
        except (SampleError, UserError):  # its tar may be what is broken
            return f"{self._reader.name} sample {sample}"

    # ------------------------------------------------------------------ settings

    def _check_settings(self) -> None:
        data, batch = self._data, self._global_batch
        facts = self._reader.manifest.splits[self._reader.name]
        problems: list[str] = []
        if self.num_samples < 1:
            problems.append(f"split {self._reader.name!r} has no samples; it must have one: pack videos into it")
        elif data.short == "reject" and facts.max_frames < data.frames:
            problems.append(
                f"data.frames is {data.frames}; the longest video of split {self._reader.name!r} has "
                f"{facts.max_frames}: take fewer frames, pack longer videos, or set data.short to loop"
            )
        has_cursor = self._num_clips is None
        whole_videos = {
            "train.global_batch": (batch, has_cursor),  # the cursor counts positions
            "train.micro_batch": (self._micro_batch, self._world_size > 1),  # one rank decides about a position
        }
        for name, (value, must_be_whole) in whole_videos.items():
            if value < 1 or (must_be_whole and value % data.clips_per_video):
                problems.append(
                    f"{name} is {value}; it must be a positive multiple of data.clips_per_video "
                    f"({data.clips_per_video}): the clips of a video stay together"
                )
        if has_cursor and self._world_size > batch:
            problems.append(f"there are {self._world_size} ranks; train.global_batch ({batch}) must be at least that")
        if problems:
            raise UserError("\n".join(problems))


def _default_micro_batch(global_batch: int, world_size: int, clips_per_video: int) -> int:
    """The whole share of a rank, in whole videos."""
    return -(-global_batch // (world_size * clips_per_video)) * clips_per_video


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]  # its argument is untyped in torch


def _shut_down(threads: FetchThreads, pool: DecoderPool) -> None:
    try:
        threads.close()
    finally:
        pool.close()
    threads.join(limit_s=2.0)
