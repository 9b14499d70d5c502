"""Progress of long work, on stderr: a bar on a terminal, plain lines now and then elsewhere, nothing for JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.foreign import IndexProgress
    from shards.staging import PackProgress, Report

LINE_EVERY_S = 10.0


@contextmanager
def packing_progress(*, quiet: bool) -> Generator[Report | None]:
    """Gives what packing reports to: how far it is, and how long it will still take."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        yield from _bar()
    else:
        yield _plain_lines()


@contextmanager
def counted_progress(name: str, *, quiet: bool) -> Generator[Callable[[int, int], None] | None]:
    """Gives what is told how many of how many are done: a bar on a terminal, nothing elsewhere (it is short)."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda num_done, num_total: bar.update(task, completed=num_done, total=num_total)


@contextmanager
def index_progress(*, quiet: bool) -> Generator[Callable[[IndexProgress], None] | None]:
    """Gives what indexing tars reports to: a bar on a terminal, a line now and then elsewhere."""
    with counted_progress("tars", quiet=quiet) as bar:
        last_s = time.monotonic()

        def update(progress: IndexProgress) -> None:
            nonlocal last_s
            if bar is not None:
                bar(progress.num_done, progress.num_total)
            elif time.monotonic() - last_s >= LINE_EVERY_S:
                last_s = time.monotonic()
                print(
                    f"tars {progress.num_done}/{progress.num_total}  {progress.num_samples} samples  "
                    f"{progress.num_rejected} rejected",
                    file=sys.stderr,
                    flush=True,
                )

        yield None if quiet else update


def shard_lines(*, quiet: bool) -> Callable[[str], None] | None:
    """Gives what `shards.verify.verify` reports to: a line per tar."""
    return None if quiet else lambda name: print(f"checking {name}", file=sys.stderr, flush=True)


def _bar() -> Generator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        names = {"convert": "videos", "write": "shards", "upload": "upload"}
        tasks = {
            phase: bar.add_task(name, total=None, note="", left="", visible=False) for phase, name in names.items()
        }
        remaining = Remaining()

        def update(progress: PackProgress) -> None:
            bar.update(
                tasks[progress.phase],
                completed=progress.num_done,
                total=progress.num_total,
                left=remaining.words(progress),
                note=f"{progress.num_samples} samples"
                + f", {progress.num_rejected} rejected" * bool(progress.num_rejected),
                visible=True,
            )

        yield update


def _plain_lines() -> Report:
    last_s = time.monotonic()
    remaining = Remaining()

    def update(progress: PackProgress) -> None:
        nonlocal last_s
        left = remaining.words(progress)
        if time.monotonic() - last_s < LINE_EVERY_S:
            return
        last_s = time.monotonic()
        print(
            f"{progress.phase} {progress.num_done}/{progress.num_total}  {left}  {progress.num_samples} samples  "
            f"{progress.num_rejected} rejected",
            file=sys.stderr,
            flush=True,
        )

    return update


class Remaining:
    """How long a phase will still take at the pace so far; what was there when it began does not count as done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = ""
        self._start_s = 0.0
        self._start_done = 0

    def words(self, progress: PackProgress) -> str:
        """Such as `12 min left`; `? left` before anything was done."""
        by_bytes = progress.total_bytes > 0
        done = progress.done_bytes if by_bytes else progress.num_done
        total = progress.total_bytes if by_bytes else progress.num_total
        if progress.phase != self._phase:
            self._phase, self._start_s, self._start_done = progress.phase, self._clock(), done
        if done >= total:
            return "done"
        if done <= self._start_done:
            return "? left"
        return f"{duration((self._clock() - self._start_s) * (total - done) / (done - self._start_done))} left"


def duration(seconds: float) -> str:
    """A time span as a person says it: the two units that matter."""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes:.0f} min"
    hours, minutes = divmod(round(minutes), 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"
