"""Requests on the one event loop of a process: waiting for them from any thread, a second one beside a slow one."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from shards.retry import count

SLOW_FACTOR = 3.0
LATE_S = 10.0
"""A request that is not given up so long after its limit: the loop is stuck, which keeps the limits."""
_answered_s: deque[float] = deque(maxlen=64)
"""How long the last good reads took. Only the event loop touches it."""

T = TypeVar("T")


def on_loop(request: Coroutine[Any, Any, T], limit_s: float) -> T:
    """Run a request on the event loop of fsspec and wait for it here; TimeoutError after `limit_s`."""
    from fsspec.asyn import get_loop  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    async def limited() -> T:
        try:
            async with asyncio.timeout(limit_s):
                return await request
        except TimeoutError as error:
            raise TimeoutError(str(error) or f"no answer within {limit_s:.3g} s") from None

    loop: Any = get_loop()
    future = asyncio.run_coroutine_threadsafe(limited(), loop)
    try:
        return future.result(limit_s + LATE_S)
    except TimeoutError as error:
        future.cancel()
        raise TimeoutError(str(error) or f"the event loop does not answer ({limit_s + LATE_S:.3g} s)") from None
    except BaseException:
        future.cancel()
        raise


def patience_s(hedge_s: float) -> float:
    """When a read gets company: after `hedge_s`, or three times the median of the last 64 if that is longer."""
    return max(hedge_s, SLOW_FACTOR * statistics.median(_answered_s)) if _answered_s else hedge_s


async def first_good(send: Callable[[], Coroutine[Any, Any, T]], hedge_s: float) -> T:
    """The answer of `send()`. With `hedge_s` > 0 it is called once more when the first is slow
    (Dean and Barroso, "The Tail at Scale", 2013), and the first good answer wins.

    If both fail the error of the first is raised. What is not needed any more is cancelled before this returns.
    """
    start_s = time.monotonic()
    tasks = [asyncio.create_task(send())]
    try:
        if hedge_s > 0:
            done, _ = await asyncio.wait(tasks, timeout=patience_s(hedge_s))
            if not done:
                count(num_hedges=1)
                tasks.append(asyncio.create_task(send()))
        waiting = set(tasks)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            good = next((task for task in done if task.exception() is None), None)
            if good is not None:
                _answered_s.append(time.monotonic() - start_s)
                return good.result()
        return tasks[0].result()  # raises
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
