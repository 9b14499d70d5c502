"""The ranks of a check-up: every phase has a limit, and a rank that is silent is named instead of being waited for.

    rank 0: go ──▶ all ranks: work, answer ──▶ rank 0: every answer, or None for the silent

A key-value store on rank 0 carries it (torch's TCPStore): a collective would not tell who is missing. Work runs in a
thread that is given up when its time is over, so that a rank whose disk hangs can still say so.
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed

from pretrain.finding import NO_END, PROBLEM
from pretrain.patience import Hurry, Limits
from pretrain.world import World
from shards.errors import UserError

_dist: Any = torch.distributed  # its signatures are only half typed

Answer = dict[str, Any]


@dataclass(frozen=True)
class Round:
    """One phase as rank 0 saw it."""

    answers: list[Answer | None]
    """By rank; None where none came."""
    begun_s: float
    """Unix time of rank 0 when it said go."""
    arrived_s: list[float]
    """... and when it saw each answer."""


class CutShort(Exception):
    """The launcher told rank 0 to stop, as it does when another rank has died: no further phase is begun."""


Work = Callable[[Any], Answer]
"""One phase on one rank: is given what rank 0 tells all, gives small facts."""


class RollCall:
    """What ranks do together, phase by phase: rank 0 asks, the others serve. RuntimeError: rank 0 was not reached."""

    def __init__(self, world: World, limits: Limits, hurry: Hurry) -> None:
        self.world, self.limits, self.hurry = world, limits, hurry
        self.silent: dict[int, str] = {}
        """On rank 0: ranks that no longer answer, and the phase since when."""
        self._number = 0
        self._store: Any = _dist.HashStore() if world.size == 1 else _tcp_store(world, limits.come_up_s)

    def ask(self, name: str, work: Work, *, tell: Any = None, limit_s: float | None = None) -> Round:
        """Rank 0: all ranks do the work of that name, this one included. `tell` is handed to all.

        An exception in the work, or its limit (default: `phase_s`), becomes an answer with a PROBLEM.
        Raises `CutShort`.
        """
        seconds = self.limits.phase_s if limit_s is None else limit_s
        if self.hurry and self._number:
            raise CutShort(name)
        with time_limit(seconds + 5 * self.limits.slack_s):  # the store itself may hang
            begun_s, deadline_s = time.time(), time.monotonic() + seconds + self.limits.slack_s
            self._say({"name": name, "tell": tell, "limit_s": seconds})
            self._answer(within(lambda: work(tell), seconds, lambda: self.hurry.until_s))
            return self._collect(name, begun_s, deadline_s)

    def serve(self, work_of: Callable[[str], Work]) -> int:
        """Every other rank: do what rank 0 asks for until it says that this was all. Returns its exit code."""
        while True:
            patience_s = self.limits.come_up_s + self.limits.phase_s
            with time_limit(patience_s + 5 * self.limits.slack_s):
                self._number += 1
                self._store.wait([f"go/{self._number}"], timedelta(seconds=patience_s))
                message = json.loads(self._store.get(f"go/{self._number}"))
            if "over" in message:
                self._store.set(f"bye/{self.world.rank}", "")
                return int(message["over"])
            with time_limit(message["limit_s"] + 5 * self.limits.slack_s):
                call = partial(work_of(message["name"]), message["tell"])
                self._answer(within(call, message["limit_s"]))

    def finish(self, code: int) -> None:
        """Rank 0: the end; says the exit code and waits for goodbyes, because the store ends with this process."""
        with time_limit(5 * self.limits.slack_s):
            self._say({"over": code})
            left = [rank for rank in range(1, self.world.size) if rank not in self.silent]
            deadline_s = min(time.monotonic() + self.limits.slack_s, self.hurry.until_s)
            while left and time.monotonic() < deadline_s:
                left = [rank for rank in left if not self._store.check([f"bye/{rank}"])]
                time.sleep(0.01)

    def open_group(self, backend: str, timeout_s: float) -> Any:
        """The process group of all ranks over this store: for the one check that needs collectives."""
        store = _dist.PrefixStore("group", self._store)
        place = {"rank": self.world.rank, "world_size": self.world.size}
        _dist.init_process_group(backend, store=store, timeout=timedelta(seconds=timeout_s), **place)
        return _dist

    # ------------------------------------------------------------------ the store

    def _say(self, message: Answer) -> None:
        self._number += 1
        self._store.set(f"go/{self._number}", json.dumps(message))

    def _answer(self, answer: Answer) -> None:
        self._store.set(f"answer/{self._number}/{self.world.rank}", json.dumps(answer))

    def _collect(self, name: str, begun_s: float, deadline_s: float) -> Round:
        answers: list[Answer | None] = [None] * self.world.size
        arrived_s = [0.0] * self.world.size
        waiting = [rank for rank in range(self.world.size) if rank not in self.silent]
        pause_s = 0.001
        while waiting:
            is_last_look = time.monotonic() > min(deadline_s, self.hurry.until_s)
            for rank in list(waiting):
                key = f"answer/{self._number}/{rank}"
                if self._store.check([key]):
                    arrived_s[rank] = time.time()
                    answers[rank] = json.loads(self._store.get(key))
                    waiting.remove(rank)
            if is_last_look:
                break
            if waiting:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.1)
        self.silent.update(dict.fromkeys(waiting, name))
        return Round(answers, begun_s, arrived_s)


def within(work: Callable[[], Answer], limit_s: float, hurry_s: Callable[[], float] = lambda: float("inf")) -> Answer:
    """What the work gives, or a PROBLEM: an exception, or no end within `limit_s` (or until `hurry_s()`, monotonic).

    Work that hangs is left behind in its thread; end the process with os._exit.
    """
    found: list[Answer] = []

    def call() -> None:
        try:
            found.append(work())
        except UserError as error:
            found.append({PROBLEM: str(error)})
        except Exception as error:
            found.append({PROBLEM: f"{type(error).__name__}: {error}"})

    thread = threading.Thread(target=call, name="check-up", daemon=True)
    thread.start()
    end_s = time.monotonic() + limit_s
    while thread.is_alive():
        left_s = min(end_s, hurry_s()) - time.monotonic()
        if left_s <= 0:
            break
        thread.join(min(left_s, 0.1))
    return found[0] if found else {PROBLEM: f"{NO_END} {limit_s:g} s"}


@contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """End this process, with the stacks of all threads on stderr, if what is inside takes longer.

    Runs outside the interpreter, so that a thread that holds its lock cannot keep it from working.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _tcp_store(world: World, timeout_s: float) -> Any:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has taken the port already
    store = _dist.TCPStore(
        address,
        port,
        is_master=world.is_first and not is_served,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
    return _dist.PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
