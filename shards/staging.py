"""The working folder of a packing: samples of finished files wait there, and survive a kill at any moment.

    WORK/staging/ID/      the samples of one file, and `outcome.json` once they are all there
    WORK/out/             the packed folder; whole once it has packed.json, then it is only put in its place
    WORK/lock             held by the one process that packs here

It is removed when the packed folder is in its place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from shards.convert import OUTCOME_NAME, Job, Outcome, converters
from shards.errors import UserError
from shards.options import PackOptions
from shards.sources import Source

CODE_VERSION = 2
"""Raised when the same options would give other samples: staged ones of an interrupted packing are then not used."""
JOBS_PER_WORKER = 4


@dataclass(frozen=True)
class PackProgress:
    """How far it is: files are converted first, then tars are written, then sent where they go to a URL."""

    phase: Literal["convert", "write", "upload"]
    num_done: int
    num_total: int
    num_samples: int
    num_rejected: int
    done_bytes: int = 0
    """Of `total_bytes`, where bytes tell better than numbers how much is left."""
    total_bytes: int = 0


Report = Callable[[PackProgress], None]


@contextmanager
def working_folder(work: Path, shown: str) -> Generator[None]:
    """Make the working folder, and hold it for this process alone. `shown` is the destination that errors name."""
    try:
        (work / "staging").mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"{shown} cannot be written ({error}); its parent must be a folder you may write to: choose another place"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{shown} is being packed by another process; wait for it or choose another name"
            ) from error
        yield


def staging_id(source: Source, options: PackOptions) -> tuple[str, int]:
    """Names the samples of one file, the same while file and options are the same; and the size of the file."""
    state: list[int] = []
    try:
        facts = source.path.stat()
        state = [facts.st_size, facts.st_mtime_ns]
    except OSError:
        pass  # it is rejected when it is opened
    parts = [CODE_VERSION, source.name, state, options.preset, asdict(options.encoding), asdict(options.limits)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24], state[0] if state else 0


def convert_all(
    sources: Sequence[Source], staged: dict[str, tuple[str, int]], work: Path, options: PackOptions, report: Report
) -> tuple[dict[str, Outcome], int]:
    """Outcome by source name, in the order of the sources, and how many were there already.

    `staged` gives `staging_id` by source name; a source without one cannot be named in a tar and is rejected.
    """
    outcomes: dict[str, Outcome] = {}
    todo: list[tuple[Source, Job]] = []
    for source in sources:
        if (fault := name_fault(source)) is not None:
            outcomes[source.name] = Outcome(reason="name", detail=fault)
            continue
        folder = work / "staging" / staged[source.name][0]
        found = _staged_outcome(folder)
        if found is not None:
            outcomes[source.name] = found
        else:
            job = Job(str(source.path.absolute()), str(folder), options.preset, options.encoding, options.limits)
            todo.append((source, job))
    num_reused = sum(outcome.reason != "name" for outcome in outcomes.values())
    total_bytes = sum(num_bytes for _, num_bytes in staged.values())
    done_bytes = total_bytes - sum(staged[source.name][1] for source, _ in todo)
    num_samples = sum(len(outcome.pieces) for outcome in outcomes.values())
    num_rejected = sum(bool(outcome.reason) for outcome in outcomes.values())

    def tell() -> None:
        counts = (len(outcomes), len(sources), num_samples, num_rejected)
        report(PackProgress("convert", *counts, done_bytes, total_bytes))

    tell()
    num_workers = min(options.workers or _num_cores(), len(todo))
    todo.reverse()
    with converters(num_workers) as submit:
        waiting: dict[Future[Outcome], Source] = {}
        while todo or waiting:
            while todo and len(waiting) < JOBS_PER_WORKER * num_workers:  # not all at once: there may be millions
                source, job = todo.pop()
                waiting[submit(job)] = source
            finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                source, outcome = waiting.pop(future), future.result()
                outcomes[source.name] = outcome
                done_bytes += staged[source.name][1]
                num_samples += len(outcome.pieces)
                num_rejected += bool(outcome.reason)
            tell()
    return {source.name: outcomes[source.name] for source in sources}, num_reused


def name_fault(source: Source) -> str | None:
    """Why this file cannot be named in a tar, None if it can: file systems take any bytes, tars and JSON take text."""
    for text in (source.name, source.group, source.label or ""):
        if "\0" in text or printable(text) != text:
            return f"{printable(text)!r} is not a name in UTF-8: rename it"
    return None


def printable(name: str) -> str:
    """A name as it can be written down: what is not UTF-8 becomes a backslash and a number."""
    return name.encode("utf-8", "backslashreplace").decode()


def _staged_outcome(folder: Path) -> Outcome | None:
    try:
        return Outcome.from_json((folder / OUTCOME_NAME).read_text())
    except FileNotFoundError:
        return None


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
