"""What a loader counts: for the metrics of a run, and for `tubelet bench`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field

from shards import storage


@dataclass(frozen=True)
class Totals:
    """Counts that go on for as long as the process lives."""

    num_respawns: int
    bytes_read: int
    num_requests: int
    num_retries: int
    num_hedges: int
    num_throttled: int
    num_cache_hits: int
    num_cache_misses: int

    @staticmethod
    def now(num_respawns: int, cache: tuple[int, int]) -> Totals:
        """The counts of this moment; `cache` is (hits, misses)."""
        seen = storage.counters
        reads = seen.num_bytes, seen.num_reads, seen.num_retries, seen.num_hedges, seen.num_throttled
        return Totals(num_respawns, *reads, *cache)


@dataclass
class LoaderStats:
    """What happened on this rank since the last call of `ClipLoader.stats`."""

    wait_s: float = 0.0
    """Time that `next` waited for a batch."""
    decode_s: float = 0.0
    """Time in decoders, summed over workers."""
    num_clips: int = 0
    stride_dropped: int = 0
    """Clips whose frames are closer together than asked for: the video is too short (or loops)."""
    substituted: Counter[str] = field(default_factory=lambda: Counter[str]())
    """Positions whose sample was replaced, by reason."""
    num_respawns: int = 0
    """Decoder processes that were replaced."""
    bytes_read: int = 0
    """From storage, by this process; what the node's cache answered is not in it."""
    num_requests: int = 0
    num_retries: int = 0
    num_hedges: int = 0
    """Second reads sent beside one that was late."""
    num_throttled: int = 0
    """Answers that asked for fewer requests (503 SlowDown)."""
    num_cache_hits: int = 0
    num_cache_misses: int = 0

    def since(self, before: Totals, now: Totals) -> LoaderStats:
        """These, with the difference of two totals."""
        earlier = dataclasses.asdict(before)
        difference = {name: total - earlier[name] for name, total in dataclasses.asdict(now).items()}
        return dataclasses.replace(self, **difference)
