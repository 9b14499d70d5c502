"""Signals and the STOP file -> a flag; `pretrain/rounds.py` makes one decision of all ranks' flags (C9).

A handler only sets the flag. Death is local instead: `die` ends this process at once, without a collective, and the
launcher ends the others.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pretrain.world import World

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

ORPHAN_GRACE_S = 30.0
"""What deepspeed, too, gives its ranks between a signal and the kill."""


class Stop(IntEnum):
    """Why to stop; of several reasons the largest wins."""

    NO = 0
    SIGNAL = 1
    FILE = 2
    UNSAVED = 3
    """No save has worked for checkpoint.max_age_s."""
    UNWRITABLE = 4
    """The ledger cannot be written: what comes after the last commit cannot be proved."""


class StopFlag:
    """This rank's wish to stop."""

    def __init__(self, run_dir: Path, world: World) -> None:
        self._file = run_dir / "STOP"
        self._world = world
        self._wish = Stop.NO
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        # Whoever started this rank may have blocked them until now, so that none is lost (launch/node.py).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._wish = max(self._wish, Stop.SIGNAL)
        if number == signal.SIGINT:  # a second Ctrl-C means now
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def read(self) -> Stop:
        """What it is now. Rank 0 looks for the STOP file."""
        if self._world.is_first and self._file.exists():
            self._wish = max(self._wish, Stop.FILE)
        return self._wish

    def wish(self, stop: Stop) -> None:
        """Stop, for a reason that is no signal."""
        self._wish = max(self._wish, stop)

    def honoured(self) -> None:
        """The STOP file did its work: remove it, so that the same command goes on."""
        if self._world.is_first:
            self._file.unlink(missing_ok=True)


def watch_parents(poll_s: float = 1.0) -> None:
    """Die when whoever started this rank dies: an orphan must not go on writing into a run that may be started again.

    Watched are the parent process and the `tubelet` command that TUBELET_START names (PID:TOKEN, launch/local.py): with
    them this rank dies. Above a parent that lives on, no launcher may lose its own parent: then this rank stops as at a
    signal (Ctrl-C ends `deepspeed` before its ranks have saved), and dies ORPHAN_GRACE_S later.
    """
    parent = os.getppid()
    starter = int(os.environ.get("TUBELET_START", "0:").partition(":")[0])
    launchers = _launchers_above(parent)

    def watch() -> None:
        until_s = math.inf
        while os.getppid() == parent and (not starter or _is_alive(starter)) and time.monotonic() < until_s:
            lost = any(_parent_of(pid) != its_parent for pid, its_parent in launchers.items())
            if lost and until_s == math.inf:
                until_s = time.monotonic() + ORPHAN_GRACE_S
                os.kill(os.getpid(), signal.SIGTERM)
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


def _launchers_above(parent: int) -> dict[int, int]:
    """Processes of the deepspeed launcher on this machine that outlive the one above them: each with its parent.

        deepspeed ── pdsh ── ssh ══ sshd ── [shell] ── launch ── rank

    A `launch` would go on without its sshd (or its `deepspeed`, where no ssh is between), and pdsh, which may be here,
    without its `deepspeed`. What is above `deepspeed` may end: people log out.
    """
    found: dict[int, int] = {}
    pid = parent
    while b"deepspeed.launcher.launch" in _command_of(pid):
        found[pid] = _launcher_of(pid)
        pid = _parent_of(pid)
    if not found:
        return {}
    named = (b"--world_info=", b"--master_addr=", b"--master_port=")  # pdsh carries the words of the start it made
    start = [word for word in _command_of(parent).split(b"\0") if word.startswith(named)]
    for folder in Path("/proc").glob("[0-9]*"):
        command = _command_of(int(folder.name))
        if command.startswith(b"pdsh\0") and all(word in command for word in start):
            found[int(folder.name)] = _launcher_of(int(folder.name))
    return found


def _launcher_of(pid: int) -> int:
    """Parent of a process that deepspeed started; 0 if it has lost it already, and init (no Python) has taken it."""
    parent = _parent_of(pid)
    return 0 if parent == 1 and b"python" not in _command_of(1) else parent


def _command_of(pid: int) -> bytes:
    """Arguments of a process, each with a zero byte behind it; empty where it has ended, or where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent_of(pid: int) -> int:
    """Parent of a process; 0 where it has ended, waited for or not."""
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if state == b"Z" else int(parent)


def die(reason: str, code: int = 75) -> NoReturn:
    """End this rank now: stacks of all threads to stderr, no collective, no save, no cleanup that could hang."""
    try:
        sys.stdout.flush()
        print(f"rank ends: {reason}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
    finally:  # a pipe that nobody reads any more must not keep an orphan alive
        os._exit(code)
