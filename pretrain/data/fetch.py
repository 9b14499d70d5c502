"""One video of a micro batch: decode what was read, fill its rows; or find out that it cannot be used and take another.

Runs in background threads, several videos at a time. Which frames and which crop are taken was settled by arithmetic
before (clip.py); what is settled here is only whether the sample can be used at all.

Legend: C clips of a video, T frames, U different frames of a video.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from pretrain.data.clip import ClipPlan, plan_clip
from pretrain.data.decode import VideoFacts
from pretrain.data.pool import DecoderPool, Request
from pretrain.data.rows import Rows, Video
from pretrain.data.threads import Threads
from pretrain.journal import Journal, JournalRow
from pretrain.sections import DataConfig
from shards.dataset import DataSet
from shards.errors import SampleError
from shards.layout import SOURCE_SHIFT

STORAGE = "io"
WITHDRAWN = "withdrawn"
NO_FAULT_OF_THE_SAMPLE = (STORAGE, WITHDRAWN)
"""Reasons that do not count towards `data.bad_sample_limit`. What storage did may have passed by the next epoch."""
STORAGE_IS_AWAY = 3
"""Samples at one position that storage gave up on: single objects may be unreachable, so many are not by chance."""
MAX_TRIES = 1000
"""At one position. Beyond it nearly everything must be withdrawn."""

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
        self.bad: dict[int, SampleError] = {}
        """Samples that proved unusable, and why, as far as this rank knows: what is compared with the limit."""
        self._met: set[int] = set()

    def learn(self, rows: list[JournalRow]) -> None:
        """Take over what journal rows say of samples; the limit is for the run, not for a rank or a start.

        Such samples are tried again all the same: where a position has no row, its sample was used, before it failed
        or by a rank that did not know, and must be used again for the run to be the one it was.
        """
        for row in rows:
            is_ours = row.wanted >> SOURCE_SHIFT < self._dataset.num_sources  # else of a start with other data
            is_news = row.wanted not in self.bad and row.reason not in NO_FAULT_OF_THE_SAMPLE
            if is_ours and is_news and not self._dataset.is_withdrawn(row.wanted):
                self.bad[row.wanted] = SampleError(row.reason, "found before (journal)")

    def met(self, failures: Iterable[tuple[int, SampleError]]) -> bool:
        """Take over what this process met itself; True if there is news. From now on rows say where it is replaced."""
        failed = {sample: error for sample, error in failures if error.reason not in NO_FAULT_OF_THE_SAMPLE}
        is_news = not failed.keys() <= self.bad.keys()
        self.bad.update(failed)
        self._met.update(failed)
        return is_news

    # ------------------------------------------------------------------ reading ahead

    def read(self, videos: list[Video]) -> dict[int, Content]:
        """Start reading what these videos need, neighbours together: sample -> its bytes to come."""
        firsts = [self.first(video) for video in videos]
        wanted = dict.fromkeys(sample for sample in firsts if self._refused(sample) is None)
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

    def _refused(self, sample: int) -> SampleError | None:
        """Why a sample is not even tried."""
        if self._dataset.is_withdrawn(sample):
            return SampleError(WITHDRAWN, "withdrawn by tubelet forget")
        return self.bad[sample] if sample in self._met else None

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
        for sample in itertools.islice(self._candidates(video, first), MAX_TRIES):
            found = self._refused(sample)
            if found is None:
                found = content if content is not None and ahead == sample else self._dataset.read_group([sample])[0]
            if not isinstance(found, SampleError):
                try:
                    return self._deliver(sample, found, video, rows, tuple(failures), obeyed)
                except SampleError as error:
                    found = error
            # Without its traceback, which holds these rows: failures are kept for as long as the run lasts.
            failures.append((sample, found.bare()))
            reasons = Counter(error.reason for _, error in failures)
            if reasons[STORAGE] >= STORAGE_IS_AWAY:
                # Not these samples: storage is away for longer than a read may take. A later start goes on from here.
                raise OSError(f"storage gave up on {STORAGE_IS_AWAY} samples in a row: {found}")
            found = None
            if reasons.total() - reasons[WITHDRAWN] - reasons[STORAGE] > self._max_bad:
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
