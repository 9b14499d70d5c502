"""Faults of storage are normal: what is asked for again, for how long, and the counts of it.

    attempt ─ good ───────────────────────────────▶ result
       └─ fault ─ mended by asking again? ─ no ───▶ raised at once
                     └─ yes ─ jittered wait ─ attempt …  until the deadline, then raised

This loop is the only one: the clients below it are told to try once, so that the counts are exact.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from shards.errors import UserError

log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.1
SILENT_S = 5.0
"""Who waits longer for an answer is told why (in a run: in the log of the rank)."""
LONGEST_WAIT_S = 15.0
FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, UserError)
BUGS = (TypeError, AttributeError, NameError, NotImplementedError)
"""Asking again mends none of these two."""
_THROTTLED = re.compile(r"\b(429|503)\b|slow ?down|throttl|reduce your request rate|too many requests", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/\s'\"]*@")
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*")

T = TypeVar("T")


class ShortReadError(OSError):
    """Fewer bytes came than there should be."""


class ObjectEndsError(ShortReadError):
    """The object itself ends before the range does: no second request will bring more."""


class ChangedObjectError(OSError):
    """The object is another one than the one that was first seen."""


class RefusedError(OSError):
    """The store refuses the request, and would refuse it again."""


class ThrottledError(OSError):
    """The store asks for fewer requests per second."""


class ExpiredError(OSError):
    """The credentials are no longer good. Whoever raises this has thrown them away: the next attempt reads new ones."""


@dataclass
class StorageCounters:
    """What this process asked storage for. Local files count too.

    One request is not seen: aiohttp itself sends a GET once more where a kept connection was closed before any answer.
    `num_reads`: read requests sent, second ones and failed ones among them. `num_bytes`: bytes that came, used or not.
    `num_hedges`: second requests beside a slow one. `num_renewals`: how often credentials were read anew.
    `num_failures`: reads and writes that were given up at their deadline.
    """

    num_reads: int = 0
    num_bytes: int = 0
    num_retries: int = 0
    num_hedges: int = 0
    num_throttled: int = 0
    num_renewals: int = 0
    num_failures: int = 0


counters = StorageCounters()
_lock = threading.Lock()


def count(**amounts: int) -> None:
    """Add to the counters; many threads do."""
    with _lock:
        for name, amount in amounts.items():
            setattr(counters, name, getattr(counters, name) + amount)


def bare(text: str) -> str:
    """The text with every URL in it freed of user info and query: both may hold secrets."""
    return _QUERY.sub(r"\1", _USER_INFO.sub("", text))


def is_throttled(text: str) -> bool:
    """Whether an error's text says that there were too many requests."""
    return bool(_THROTTLED.search(text))


def persist(
    url: str,
    attempt: Callable[[float], T],
    attempt_s: float,
    deadline_s: float,
    also_final: tuple[type[Exception], ...] = (),
) -> T:
    """Try until it works or the deadline is over; `attempt` is told the seconds it may take.

    Local reads come through here too: on a cluster they go to a file server. There a short file is short for good.
    """
    final = FINAL_ERRORS + BUGS + (ChangedObjectError, ObjectEndsError, RefusedError) + also_final
    start_s = time.monotonic()
    end_s = start_s + deadline_s
    is_told = False
    wait_s = FIRST_WAIT_S
    fault: Exception | None = None
    while True:
        limit_s = max(min(attempt_s, end_s - time.monotonic()), 0.01)
        try:
            return attempt(limit_s)
        except final as error:
            text = str(error)
            if bare(text) == text:
                raise
            raise type(error)(bare(text)) from None
        except Exception as error:  # remote clients raise many kinds that are no OSError
            if not isinstance(error, ThrottledError) and is_throttled(str(error)):
                count(num_throttled=1)
            if fault is None or limit_s == attempt_s or not isinstance(error, TimeoutError):
                fault = error  # an attempt that the deadline cut short says nothing about the store
            pause_s = wait_s * random.uniform(0.5, 1.5)
            if end_s - time.monotonic() <= pause_s:
                count(num_failures=1)
                kind = ShortReadError if isinstance(fault, ShortReadError) else OSError
                # A cause would be printed with its own text, which may name a URL with a password in it.
                raise kind(f"{bare(url)}: gave up after {deadline_s:g} s: {bare(repr(fault))}") from None
            count(num_retries=1)
            if not is_told and time.monotonic() - start_s >= SILENT_S:
                is_told = True
                left_s = end_s - time.monotonic()
                log.warning("%s does not answer (%s); trying for %.0f s more", bare(url), bare(repr(fault)), left_s)
            time.sleep(pause_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
