"""Copies committed checkpoints to the mirror while training goes on; on rank 0. One at a time, the newest first.

A checkpoint that is committed while another is being sent waits; if a newer one comes, it is left out: the mirror may
lag, it never queues. Trouble is told and tried again with the next checkpoint; training never waits for it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain import checkpoint
from pretrain.attempt import Superseded
from pretrain.checkpoint import kept_steps
from pretrain.mirror import Mirror, Stopped
from pretrain.sections import CheckpointConfig

log = logging.getLogger(__name__)


class Mirroring:
    """A thread that sends what `offer` names."""

    def __init__(self, run_dir: Path, attempt: int, settings: CheckpointConfig) -> None:
        assert settings.mirror is not None
        self._mirror = Mirror(settings.mirror, run_dir, attempt)
        self._settings = settings
        self._changed = threading.Condition()
        self._offered: int | None = None
        self._sending: int | None = None
        self._is_closed = self._is_given_up = False
        self._events: list[dict[str, Any]] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def offer(self, step: int) -> None:
        """The checkpoint of `step` is committed."""
        with self._changed:
            self._offered = step
            self._changed.notify()

    def pinned(self) -> set[int]:
        """Steps that must not be deleted yet."""
        with self._changed:
            return {step for step in (self._offered, self._sending) if step is not None}

    def events(self) -> list[Mapping[str, Any]]:
        """What was sent, or was not, since the last call. Raises Superseded, or what is a bug here."""
        if self._error is not None:
            raise self._error
        with self._changed:
            events, self._events = self._events, []
        return list(events)

    def finish(self) -> None:
        """Nothing more will be offered."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    @property
    def is_done(self) -> bool:
        """Whether all that was offered has been sent, or cannot be."""
        return not self._thread.is_alive()

    def close(self) -> None:
        """Stop, amid a send if there is one."""
        self.finish()
        with self._changed:
            self._offered = None
            self._is_given_up = True
        self._thread.join(1.0)

    def _work(self) -> None:
        while (step := self._next()) is not None:
            try:
                report = self._mirror.send(step, lambda: self._is_given_up)
                keep = self._settings
                self._mirror.keep(
                    kept_steps(self._mirror.steps(), keep.keep, keep.keep_every_steps), lambda: self._is_given_up
                )
            except Stopped:
                return
            except Superseded as error:
                self._error = error
                return
            except Exception as error:  # whatever storage has to say, training goes on and says so
                log.warning("the checkpoint of step %d did not reach the mirror: %s", step, error)
                self._tell({"event": "mirror_failed", "step": step, "reason": str(error)})
            else:
                sent = {"num_files": report.num_files, "bytes": report.num_bytes, "seconds": report.seconds}
                self._tell({"event": "mirrored", "step": step, **sent})

    def _next(self) -> int | None:
        with self._changed:
            self._sending = None
            while self._offered is None and not self._is_closed:
                self._changed.wait()
            self._sending, self._offered = self._offered, None
            return self._sending

    def _tell(self, event: dict[str, Any]) -> None:
        with self._changed:
            self._events.append({"kind": "event", **event})


class Restoring:
    """Before an attempt is taken, on rank 0: a run folder without checkpoints gets the mirror's newest whole one."""

    def __init__(self, run_dir: Path, settings: CheckpointConfig) -> None:
        self._run_dir, self._mirror = run_dir, settings.mirror
        self._step: int | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="restore", daemon=True)
        if settings.mirror is not None and not checkpoint.candidates(run_dir):
            self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether there is nothing (more) to do."""
        return not self._thread.is_alive()

    def result(self) -> int | None:
        """Step of what was restored. Raises what kept it from being restored."""
        if self._error is not None:
            raise self._error
        return self._step

    def _work(self) -> None:
        assert self._mirror is not None
        try:
            self._step = Mirror(self._mirror, self._run_dir).restore()
        except BaseException as error:
            self._error = error
