"""Signals and the STOP file -> one decision that all ranks reach in the same step (C9).

A handler only sets a flag. The flags are reduced over a gloo group; the result is read one step later, so no step waits
for it. Death is local instead: `die` ends this process at once, without a collective, and the launcher ends the others.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pretrain.agree import Agreement
from pretrain.world import World

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Stop(IntEnum):
    """Why to stop; of several reasons the largest wins."""

    NO = 0
    SIGNAL = 1
    FILE = 2


class StopAgreement:
    """The flag, and its reduction over all ranks."""

    def __init__(self, run_dir: Path, world: World, agreement: Agreement) -> None:
        self._file = run_dir / "STOP"
        self._world = world
        self._flag = Stop.NO
        self._agreement = agreement
        self._pending = agreement.start_maximum(Stop.NO)
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._flag = max(self._flag, Stop.SIGNAL)
        if number == signal.SIGINT:  # a second Ctrl-C means now
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def agree(self) -> Stop:
        """What all ranks knew one step ago; starts the next round. Call once per step on every rank."""
        decision = Stop(self._pending.result())
        if self._world.is_first and self._file.exists():
            self._flag = Stop.FILE
        self._pending = self._agreement.start_maximum(self._flag)
        return decision

    def close(self) -> None:
        """Finish the round under way, so that no rank leaves while another waits for it."""
        self._pending.result()

    def honoured(self) -> None:
        """The STOP file did its work: remove it, so that the same command goes on."""
        if self._world.is_first:
            self._file.unlink(missing_ok=True)


@contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """End this rank, with the stacks of all threads on stderr, if what is inside takes longer: a hang decides nothing.

    Runs outside the interpreter, so that a thread that holds the GIL cannot keep it from working.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def watch_parents(poll_s: float = 1.0) -> None:
    """Die when whoever started this rank dies: an orphan must not go on writing into a run that may be started again.

    Watched are the parent process and the `tubelet` command that TUBELET_START names (PID:TOKEN, launch/local.py);
    between the two may stand launchers that survive it.
    """
    parent = os.getppid()
    starter = int(os.environ.get("TUBELET_START", "0:").partition(":")[0])

    def watch() -> None:
        while os.getppid() == parent and (not starter or _is_alive(starter)):
            time.sleep(poll_s)
        die("the launcher of this rank is gone")

    threading.Thread(target=watch, name="watch-parents", daemon=True).start()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def die(reason: str, code: int = 75) -> NoReturn:
    """End this rank now: stacks of all threads to stderr, no collective, no save, no cleanup that could hang."""
    try:
        sys.stdout.flush()
        print(f"rank ends: {reason}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
    finally:  # a pipe that nobody reads any more must not keep an orphan alive
        os._exit(code)
