"""One video of a micro batch: decode what was read, fill its rows; or find out that it cannot be used and take another.

Runs in background threads, several videos at a time. Which frames and which crop are taken was settled by arithmetic
before (clip.py); what is settled here is only whether the sample can be used at all.

Legend: C clips of a video, T frames, U different frames of a video.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from pretrain.config import DataConfig
from pretrain.data.clip import ClipPlan, plan_clip
from pretrain.data.decode import VideoFacts
from pretrain.data.pool import DecoderPool, Request
from pretrain.data.rows import Rows, Video
from pretrain.data.threads import Threads
from pretrain.journal import Journal, JournalRow
from shards.dataset import DataSet
from shards.errors import SampleError
from shards.layout import SOURCE_SHIFT

TRANSIENT = ("io",)
"""Reasons that may have passed by the next epoch: such a sample is tried again, any other is not."""
WITHDRAWN = "withdrawn"

_FACT_NAMES = ("num_frames", "height", "width", "grid", "matrix", "full_range")

Content = Future[bytes | SampleError]
"""The bytes of a sample, or why there are none; on their way."""


@dataclass(frozen=True)
class Delivery:
    """What became of a Video. Its rows are filled."""

    sample: int | None
    """None: too many samples failed in a row."""
    failures: tuple[tuple[int, SampleError], ...]
    """The samples that were tried before, in order."""
    obeyed: JournalRow | None
    """The journal row that named the sample to begin with."""
    decode_s: float = 0.0
    num_stride_dropped: int = 0


class Fetcher:
    """Everything a thread needs to turn a Video into filled rows. Holds no reference to the loader."""

    def __init__(
        self,
        data: DataConfig,
        *,
        seed: int,
        dataset: DataSet,
        pool: DecoderPool,
        readers: Threads,
        journal: Journal,
        max_bad: int,
    ) -> None:
        self._data = data
        self._seed = seed
        self._dataset = dataset
        self._pool = pool
        self._readers = readers
        self._journal = journal
        self._max_bad = max_bad
        # Unusable samples met so far, and why; what earlier attempts met counts.
        self.bad: dict[int, SampleError] = {}
        # From which position on those that the journal names are not tried; those met here never are.
        self._avoided_from: dict[int, int] = {}

    def learn(self, rows: list[JournalRow]) -> None:
        """Take over what journal rows say of samples: one that proved unusable is not tried again.

        That holds behind the last row. Before it, a position without a row is one where the sample was used: before
        it failed, or by a rank that did not know. Then it is used again, or the run would not be what it was.
        """
        behind = 1 + max((row.position for row in rows), default=-1)
        for row in rows:
            is_ours = row.wanted >> SOURCE_SHIFT < self._dataset.num_sources  # else of a start with other data
            is_news = row.wanted not in self.bad and row.reason != WITHDRAWN
            if is_ours and is_news and not self._dataset.is_withdrawn(row.wanted):
                self._avoided_from[row.wanted] = behind
                self.bad[row.wanted] = SampleError(row.reason, "found before (journal)")

    def met(self, failed: dict[int, SampleError]) -> None:
        """Take over what this process met itself: where it is not used from now on, a row will say so."""
        self.bad.update(failed)
        for sample in failed:
            self._avoided_from.pop(sample, None)

    # ------------------------------------------------------------------ reading ahead

    def read(self, videos: list[Video]) -> dict[int, Content]:
        """Start reading what these videos need, neighbours together: sample -> its bytes to come."""
        firsts = [(self.first(video), video.position) for video in videos]
        wanted = dict.fromkeys(sample for sample, position in firsts if self._refused(sample, position) is None)
        contents: dict[int, Content] = {sample: Future() for sample in wanted}
        needed_at = {sample: place for place, sample in enumerate(contents)}
        groups = self._dataset.groups(list(contents))
        for group in sorted(groups, key=lambda group: min(needed_at[sample] for sample in group)):
            self._read_group(group, [contents[sample] for sample in group])
        return contents

    def _read_group(self, samples: list[int], contents: list[Content]) -> None:
        def call() -> None:
            try:
                found = self._dataset.read_group(samples)
            except BaseException as error:
                for content in contents:
                    content.set_exception(error)
                raise
            for content, data in zip(contents, found, strict=True):
                content.set_result(data)

        def stopped(future: Future[None]) -> None:
            """The threads were closed before they came to it: nobody may wait for ever."""
            error = future.exception()
            for content in contents:
                if error is not None and not content.done():
                    content.set_exception(error)

        self._readers.submit(call).add_done_callback(stopped)

    def obeyed(self, video: Video) -> JournalRow | None:
        """The journal row to obey. One that an attempt wrote under another order (weights to come were changed, the
        data grew, before a checkpoint got there) says nothing of this video."""
        row = self._journal.find(video.position)
        return row if row is not None and row.wanted == video.wanted else None

    def first(self, video: Video) -> int:
        """The sample to try first: an earlier attempt's substitute is not questioned."""
        obeyed = self.obeyed(video)
        return video.wanted if obeyed is None else obeyed.substitute

    def _refused(self, sample: int, position: int) -> SampleError | None:
        """Why a sample is not even tried at a position."""
        if self._dataset.is_withdrawn(sample):
            return SampleError(WITHDRAWN, "withdrawn by tubelet forget")
        known = self.bad.get(sample)
        if known is None or known.reason in TRANSIENT or position < self._avoided_from.get(sample, 0):
            return None
        return known

    # ------------------------------------------------------------------ one video

    def fetch(
        self, video: Video, rows: Rows, ahead: int | None = None, content: bytes | SampleError | None = None
    ) -> Delivery:
        """Fill the rows of a video with its sample, else with the first substitute that can be used.

        `content` is what was read ahead, of sample `ahead`: a journal row may name another one by now.
        """
        failures: list[tuple[int, SampleError]] = []
        obeyed = self.obeyed(video)
        first = video.wanted if obeyed is None else obeyed.substitute
        for sample in self._candidates(video, first):
            found = self._refused(sample, video.position)
            if found is None:
                found = content if content is not None and ahead == sample else self._dataset.read_group([sample])[0]
            if not isinstance(found, SampleError):
                try:
                    return self._deliver(sample, found, video, rows, tuple(failures), obeyed)
                except SampleError as error:
                    found = error
            # Without its traceback, which holds these rows: failures are kept for as long as the run lasts.
            failures.append((sample, found.bare()))
            found = None
            if sum(error.reason != WITHDRAWN for _, error in failures) > self._max_bad:
                break
        return Delivery(None, tuple(failures), obeyed)

    def _candidates(self, video: Video, first: int) -> Iterator[int]:
        yield first
        for sample in self._dataset.substitutes(video.position, video.wanted):
            if sample != first:
                yield sample

    def _deliver(
        self,
        sample: int,
        content: bytes,
        video: Video,
        rows: Rows,
        failures: tuple[tuple[int, SampleError], ...],
        obeyed: JournalRow | None,
    ) -> Delivery:
        record = self._dataset.record(sample)
        facts = VideoFacts(**{name: int(record[name]) for name in _FACT_NAMES})
        plans = [self._plan(sample, video.epoch, draw, facts, float(record["rate"])) for draw in video.draws]
        numbers_CT = np.stack([plan.frame_numbers_T for plan in plans])
        numbers_U, index_CT = np.unique(numbers_CT, return_inverse=True)
        with self._pool.decoded(Request(content, numbers_U, facts)) as answer:
            if answer.checksum != int(record["checksum"]):
                raise SampleError("checksum", "the bytes that were decoded are not those of the index")
            rows.fill(video, plans, answer.frames, index_CT.reshape(numbers_CT.shape), sample, answer.checksum)
        num_dropped = sum(plan.is_dense for plan in plans)
        return Delivery(sample, failures, obeyed, answer.decode_s, num_dropped)

    def _plan(self, sample: int, epoch: int, draw: int, facts: VideoFacts, rate: float) -> ClipPlan:
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
            rate_hz=self._data.rate_hz,
            rate=rate,
        )
