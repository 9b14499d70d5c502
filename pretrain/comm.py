"""How long a rank waits inside the collectives of training: what tells a slow rank from those that wait for it.

DeepSpeed's calls go through one backend object; its methods are wrapped. Where the host runs ahead of the device
(CUDA) these calls return at once, and the figure means nothing: `Engine.comm_wait_s` is null there.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TIMED = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "barrier",
)


@dataclass
class CommClock:
    """Seconds waited so far."""

    waited_s: float = 0.0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, timed; of one that is asynchronous, the wait for its end."""

        @functools.wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            start_s = time.perf_counter()
            handle = call(*arguments, **named)
            self.waited_s += time.perf_counter() - start_s
            return handle if handle is None or not hasattr(handle, "wait") else _Handle(handle, self)

        return timed


class _Handle:
    """A collective under way, whose `wait` is timed."""

    def __init__(self, handle: Any, clock: CommClock) -> None:
        self._handle, self._clock = handle, clock

    def wait(self, *arguments: Any, **named: Any) -> Any:
        """Wait for it."""
        start_s = time.perf_counter()
        try:
            return self._handle.wait(*arguments, **named)
        finally:
            self._clock.waited_s += time.perf_counter() - start_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def time_collectives(backend: Any) -> CommClock:
    """Time what goes through this backend from now on; asked again, the clock that is there already."""
    clock = getattr(backend, "tubelet_clock", None)
    if clock is None:
        clock = backend.tubelet_clock = CommClock()
        for name in TIMED:
            setattr(backend, name, clock.wrap(getattr(backend, name)))
    return clock
