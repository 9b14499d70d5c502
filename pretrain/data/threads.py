"""A few daemon threads that work off calls in order: a read that hangs must not keep the process from ending."""

from __future__ import annotations

import ctypes
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from pretrain.data.pool import PoolClosedError

T = TypeVar("T")

_M_ARENA_MAX = -8
"""Of glibc's malloc.h."""

_Calls = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class Threads:
    """Work that waits: for storage, or for a decoder process."""

    def __init__(self, num_threads: int) -> None:
        _share_arenas()
        self._calls: _Calls = queue.SimpleQueue()
        self._is_closed = False
        self._threads = [threading.Thread(target=_work, args=(self._calls,), daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], T], future: Future[T] | None = None) -> Future[T]:
        """Queue a call; its result or exception arrives in the future (a new one unless one is given)."""
        promised: Future[T] = future or Future()
        self._calls.put((promised, call))
        if self._is_closed:  # put behind the threads' last entries, perhaps: nobody else may come to it
            self._cancel()
        return promised

    def close(self) -> None:
        """Cancel what waits and let the threads end after the call each is in."""
        self._is_closed = True
        self._cancel()

    def _cancel(self) -> None:
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


def _share_arenas() -> None:
    """Have glibc keep two heaps for all threads instead of one each, so that what one thread frees another can use:
    with a heap each, memory creeps up over many epochs. Other C libraries know nothing of it.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if sys.platform == "linux" and set_option is not None:
        set_option(_M_ARENA_MAX, 2)


def _work(calls: _Calls) -> None:
    while (entry := calls.get()) is not None:
        future, call = entry
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        del entry, future, call  # a finished call must not keep its batch alive while this thread waits
