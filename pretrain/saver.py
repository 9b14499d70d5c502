"""Checkpoints written while training goes on (C8). One save is in flight at a time.

    boundary ─ each rank copies its slices into host memory and goes on training
    threads  ─ each rank: ledger segment to disk, its part of the checkpoint to disk
             ─ rank 0: waits for all parts in the staged folder, commits (lineage, manifest, rename, pointer)
    rounds   ─ what became of it, told to all ranks with the next agreement (`pretrain/rounds.py`)

The ranks meet in the folder, not in a collective: no step waits for a disk. A part that cannot be written fails the
save and not the run; its ledger segments go into the next one.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pretrain import checkpoint
from pretrain.attempt import refuse_superseded
from pretrain.checkpoint import Facts
from pretrain.ledger import LineageHead, OpenSegment, Segment, commit_lineage
from pretrain.sections import CheckpointConfig
from pretrain.world import World

log = logging.getLogger(__name__)

POLL_S = 0.05
BLOCK_NUMEL = 1 << 26
"""Copies share blocks of 256 MiB: torch rounds what it pins up to a power of two, up to twice of many small pieces."""
_NO_NEWS = (0, 0, 0)
_NONE = torch.empty(0)

Slices = Iterable[tuple[str, str, int, Tensor]]


@dataclass(frozen=True)
class Settled:
    """What became of a save, as all ranks know it."""

    step: int
    is_committed: bool
    reason: str
    """Why it was given up."""
    blocking_s: float
    """How long training waited for it on this rank."""
    write_s: float
    """From the copy to the commit (known on rank 0)."""
    num_bytes: int
    """Written by this rank."""


@dataclass
class _Save:
    step: int
    number: int
    staging: Path
    segment: OpenSegment | None
    facts: Facts | None
    begun_s: float
    blocking_s: float = 0.0
    write_s: float = 0.0
    num_bytes: int = 0
    is_given_up: threading.Event = field(default_factory=threading.Event)


class Saver:
    """One rank's side of every save of an attempt."""

    def __init__(
        self,
        run_dir: Path,
        attempt: int,
        world: World,
        settings: CheckpointConfig,
        *,
        pinned: Callable[[], Collection[int]] = tuple,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`pinned`: steps of checkpoints that must not be deleted yet."""
        self.lineage: LineageHead | None = None
        """Of the newest checkpoint; kept up to date on rank 0 alone."""
        self.newest_step: int | None = None
        """Step of the newest checkpoint that this attempt committed; the same on all ranks."""
        self._run_dir, self._attempt, self._world, self._settings = run_dir, attempt, world, settings
        self._pinned, self._clock, self._durable_time = pinned, clock, clock()
        self._wanted_time: float | None = None
        self._number = 0
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None
        self._buffers: dict[tuple[str, str, int], Tensor] = {}
        self._segments: list[Segment] = []
        self._news = [*_NO_NEWS]
        """Numbers of the newest save that rank 0 committed, that a rank could not write (x 1000 + errno), and that
        rank 0 has cleared away."""
        self._error: BaseException | None = None
        self.ledger_error: OSError | None = None
        """Rows were not written, or not brought to disk: no save may succeed any more."""

    @property
    def step_in_flight(self) -> int | None:
        """Step of the save that is being written; the same on all ranks."""
        return None if self._save is None else self._save.step

    @property
    def age_s(self) -> float:
        """Age of the newest durable checkpoint; before the first one, of this attempt."""
        return max(0.0, self._clock() - self._durable_time)

    @property
    def failing_s(self) -> float:
        """For how long saves have been tried since the newest that was committed."""
        return 0.0 if self._wanted_time is None else max(0.0, self._clock() - self._wanted_time)

    def resumed_from(self, lineage: LineageHead, saved_time: float) -> None:
        """The attempt goes on from a checkpoint that was committed at that time."""
        self.lineage, self._durable_time = lineage, saved_time

    def begin(self, step: int, slices: Slices, segment: OpenSegment | None, facts: Facts | None) -> None:
        """Copy the states of `step` and start writing them; every rank calls this after the same step.

        `facts`: on rank 0. Raises Superseded if a newer attempt is at work.
        """
        assert self._save is None
        begun_s = time.perf_counter()
        refuse_superseded(self._run_dir, self._attempt)
        if self._thread is not None:  # of a save that another rank failed
            self._thread.join()
        self._wanted_time = self._wanted_time or self._clock()
        self._number += 1
        staging = checkpoint.staging_folder(self._run_dir, step, self._attempt, self._number)
        save = self._save = _Save(step, self._number, staging, segment, facts, begun_s)
        copies = self._copy(slices)
        save.blocking_s = time.perf_counter() - begun_s
        self._thread = threading.Thread(target=self._write, args=(save, copies), name="saver", daemon=True)
        self._thread.start()

    def reserve(self, slices: Slices) -> None:
        """Take the host memory that saves copy into, before training starts: the first would wait for its pages."""
        missing = [
            ((name, state, offset), values_K.numel(), values_K.is_cuda)
            for name, state, offset, values_K in slices
            if self._buffers.get((name, state, offset), _NONE).numel() != values_K.numel()
        ]
        left, block_K, used = sum(numel for _, numel, _ in missing), _NONE, 0
        for key, numel, is_cuda in missing:
            if used + numel > block_K.numel():
                block_K, used = torch.zeros(max(numel, min(left, BLOCK_NUMEL)), pin_memory=is_cuda), 0
            self._buffers[key] = block_K[used : used + numel]
            used, left = used + numel, left - numel

    def _copy(self, slices: Slices) -> list[tuple[str, str, int, Tensor]]:
        """Into host memory that is kept from save to save."""
        slices = list(slices)
        self.reserve(slices)
        copies: list[tuple[str, str, int, Tensor]] = []
        is_cuda = False
        for name, state, offset, values_K in slices:
            key = name, state, offset
            is_cuda |= values_K.is_cuda
            self._buffers[key].copy_(values_K.detach().reshape(-1), non_blocking=True)
            copies.append((*key, self._buffers[key]))
        if is_cuda:
            torch.cuda.synchronize()
        return copies

    def join(self) -> None:
        """Wait until this rank's thread is done with the save that was settled, retention included."""
        if self._save is None and self._thread is not None:
            self._thread.join()

    # ------------------------------------------------------------------------------------------ the thread

    def _write(self, save: _Save, copies: Sequence[tuple[str, str, int, Tensor]]) -> None:
        try:
            self._seal(save)
            if self._world.is_first:  # of a save that failed: a rank may have gone on writing; the disk may be full
                for leftover in save.staging.parent.glob(f"*.{self._attempt:04d}.*.tmp"):
                    if leftover != save.staging:
                        shutil.rmtree(leftover, ignore_errors=True)
            save.num_bytes = checkpoint.write_part(save.staging, self._world.rank, copies, self._segments)
        except OSError as error:
            self._fail(save, error)
        except BaseException as error:
            self._error = error
            return
        if self._world.is_first:
            try:
                self._commit(save)
            except OSError as error:
                self._fail(save, error)
                self._clear(save)
            except BaseException as error:
                self._error = error

    def _seal(self, save: _Save) -> None:
        if self.ledger_error is not None:
            raise self.ledger_error
        try:
            if save.segment is not None:
                self._segments.append(save.segment.seal())
        except OSError as error:
            self.ledger_error = error
            raise

    def _commit(self, save: _Save) -> None:
        """Rank 0: once all parts are there, make a checkpoint of them."""
        assert save.facts is not None
        missing = list(range(self._world.size))
        while missing:
            missing = [rank for rank in missing if not checkpoint.has_part(save.staging, rank)]
            if missing and save.is_given_up.wait(POLL_S):
                self._clear(save)
                return
        parts, segments = checkpoint.read_parts(save.staging, self._world.size)
        refuse_superseded(self._run_dir, self._attempt)
        lineage = commit_lineage(self._run_dir / "ledger", save.step, self._attempt, segments, self.lineage)
        checkpoint.stage(save.staging, save.facts, parts, lineage)
        refuse_superseded(self._run_dir, self._attempt)
        checkpoint.publish(save.staging, save.step)
        self.lineage, self._durable_time = lineage, self._clock()
        save.write_s = time.perf_counter() - save.begun_s
        self._news[0] = save.number
        refuse_superseded(self._run_dir, self._attempt)
        try:
            keep = self._settings
            pinned = {*self._pinned(), save.step}
            checkpoint.keep_newest(self._run_dir, keep.keep, save.step, self._attempt, keep.keep_every_steps, pinned)
        except OSError as error:  # the checkpoint is there; what should go will go after the next one
            log.warning("old checkpoints could not be deleted: %s", error)

    def _fail(self, save: _Save, error: OSError) -> None:
        log.warning("the save of step %d failed on rank %d: %s", save.step, self._world.rank, error)
        self._news[1] = save.number * 1000 + (error.errno or errno.EIO)
        save.is_given_up.set()

    def _clear(self, save: _Save) -> None:
        shutil.rmtree(save.staging, ignore_errors=True)
        self._news[2] = save.number

    # ------------------------------------------------------------------------------------------ the main thread

    def news(self) -> tuple[int, int, int]:
        """What this rank has to say in the next round. Raises what a writer thread met that is no disk's fault."""
        if self._error is not None:
            raise self._error
        return self._news[0], self._news[1], self._news[2]

    def settle(self, agreed: Sequence[int]) -> Settled | None:
        """Take in the maxima of all ranks' news; says what became of the save in flight, once that is known."""
        save = self._save
        if save is None:
            return None
        committed, failed, cleared = agreed
        if committed == save.number:
            self._segments = []  # they are in the lineage now
            self._save = self._wanted_time = None
            self.newest_step = save.step
            return Settled(save.step, True, "", save.blocking_s, save.write_s, save.num_bytes)
        if failed // 1000 == save.number:
            save.is_given_up.set()
        if cleared == save.number:
            self._save = None
            return Settled(save.step, False, os.strerror(failed % 1000), save.blocking_s, 0.0, save.num_bytes)
        return None
