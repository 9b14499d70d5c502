"""Progress of long work, on stderr: a bar on a terminal, plain lines now and then elsewhere, nothing for JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.pack import PackProgress

LINE_EVERY_S = 10.0


@contextmanager
def packing_progress(*, quiet: bool) -> Generator[Callable[[PackProgress], None] | None]:
    """Gives what `shards.pack.pack` reports to."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        yield from _bar()
    else:
        yield _plain_lines()


def shard_lines(*, quiet: bool) -> Callable[[str], None] | None:
    """Gives what `shards.verify.verify` reports to: a line per tar."""
    return None if quiet else lambda name: print(f"checking {name}", file=sys.stderr, flush=True)


def _bar() -> Generator[Callable[[PackProgress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {
            "convert": bar.add_task("videos", total=None, note="", visible=False),
            "write": bar.add_task("shards", total=None, note="", visible=False),
        }

        def update(progress: PackProgress) -> None:
            note = f"{progress.num_samples} samples" + (
                f", {progress.num_rejected} rejected" * bool(progress.num_rejected)
            )
            bar.update(
                tasks[progress.phase],
                completed=progress.num_done,
                total=progress.num_total,
                note=note,
                visible=True,
            )

        yield update


def _plain_lines() -> Callable[[PackProgress], None]:
    last_s = time.monotonic()

    def update(progress: PackProgress) -> None:
        nonlocal last_s
        if time.monotonic() - last_s < LINE_EVERY_S:
            return
        last_s = time.monotonic()
        print(
            f"{progress.phase} {progress.num_done}/{progress.num_total}  {progress.num_samples} samples  "
            f"{progress.num_rejected} rejected",
            file=sys.stderr,
            flush=True,
        )

    return update
