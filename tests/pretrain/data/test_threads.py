"""Work in background threads: every promise is kept, also when the threads are closed meanwhile."""

from __future__ import annotations

import threading

import pytest

from pretrain.data.pool import PoolClosedError
from pretrain.data.threads import Threads


def test_a_call_that_comes_after_the_end_is_told_so() -> None:
    """A read that ends after the loader was closed hands its bytes on: whoever waits for the clip must not wait on."""
    threads = Threads(2)
    assert threads.submit(lambda: 3).result(10) == 3
    threads.close()
    threads.join(10)
    with pytest.raises(PoolClosedError):
        threads.submit(lambda: 4).result(10)


def test_calls_that_wait_are_told_and_the_one_under_way_ends() -> None:
    threads, go_on, begun = Threads(1), threading.Event(), threading.Event()

    def first() -> int:
        begun.set()
        assert go_on.wait(10)
        return 1

    one, other = threads.submit(first), threads.submit(lambda: 2)
    assert begun.wait(10)
    threads.close()
    go_on.set()
    assert one.result(10) == 1
    with pytest.raises(PoolClosedError):
        other.result(10)
