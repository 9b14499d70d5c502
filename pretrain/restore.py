"""One checkpoint of a mirror -> a run folder without checkpoints, with everything that it stands on (C4, C8).

    manifest ─ lineage, link by link ─ segments, tensors ─ all hashed in *.mirror.tmp ─▶ ledger/ journal/ … ─▶ rename

Nothing is put into its place before all is there and whole; the rename of the checkpoint comes last, so that a restore
that was killed is done again and finds what it fetched.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pretrain import checkpoint
from pretrain.checkpoint import BrokenCheckpoint, Checkpoint
from pretrain.identity import NAME as RUN_ID
from pretrain.ledger import ROW_DTYPE, LineageHead, Segment, walk_lineage
from pretrain.mirrored import CHECKPOINTS, CONFIG, LEDGER, MANIFEST, RUN_FILES, Owner, Place, unpack_run_files
from pretrain.transfer import FETCHES, DamagedObject, Whole, fetch, in_parallel, stop_if
from shards import storage
from shards.errors import UserError
from shards.retry import bare

log = logging.getLogger(__name__)

LOCK_NAME = ".restore.lock"


def bring(url: str, place: Place, owner: Owner | None, run_dir: Path, should_stop: Callable[[], bool]) -> None:
    """Make the run folder what it was when this checkpoint was mirrored.

    Raises DamagedObject for an object that is missing or damaged: nothing is in its place then. UserError where a file
    of the run folder differs from the mirrored one.
    """
    folder = storage.join(url, place.folder)
    staging = run_dir / CHECKPOINTS / f"{checkpoint.NAME.format(place.step)}.mirror.tmp"
    rows = run_dir / CHECKPOINTS / "ledger.mirror.tmp"
    for path in (staging, rows):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    opened = _open(folder, place, staging)
    small = _run_files(folder, owner)
    links, segments = _lineage(storage.join(url, LEDGER), opened.lineage, rows, should_stop)

    wanted = [
        (storage.join(folder, name), staging / name, Whole(facts["bytes"], facts["sha256"]))
        for name, facts in opened.files.items()
    ]
    for segment in segments:
        whole = Whole(segment.num_rows * ROW_DTYPE.itemsize, segment.sha256)
        wanted.append((storage.join(url, f"{LEDGER}/{segment.file}"), rows / segment.file, whole))
    in_parallel(lambda one: fetch(*one, should_stop), wanted, FETCHES, should_stop)

    for leftover in staging.iterdir():  # of another checkpoint of this step
        if leftover.name not in opened.files and leftover.name != MANIFEST:
            leftover.unlink()
    _put_in_place(run_dir, small, [rows / name for name in (*links, *(segment.file for segment in segments))])
    checkpoint.publish(staging, place.step)
    for leftover in (run_dir / CHECKPOINTS).glob("*.mirror.tmp"):  # also of checkpoints that proved damaged
        shutil.rmtree(leftover)


@contextmanager
def alone(run_dir: Path) -> Generator[None]:
    """One restore of a run folder at a time; given back by the kernel when its holder is killed.

    A file system without locks is told of and used as it is: there two starts at the same time may fail each other.
    """
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(run_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            log.warning("%s cannot be locked (%s): start this run once at a time", run_dir, error.strerror)
        yield
    finally:
        os.close(descriptor)


def _open(folder: str, place: Place, staging: Path) -> Checkpoint:
    manifest = _read(storage.join(folder, MANIFEST))
    if not place.holds(manifest):
        raise DamagedObject(f"{bare(folder)}/{MANIFEST} is not the one that the folder is named after")
    storage.write_atomic(staging / MANIFEST, manifest)
    try:
        return Checkpoint(staging)
    except BrokenCheckpoint as error:
        raise DamagedObject(f"{bare(folder)}: {error}") from None


def _run_files(folder: str, owner: Owner | None) -> dict[str, str]:
    url = storage.join(folder, RUN_FILES)
    try:
        small = unpack_run_files(bare(url), _read(url))
    except (ValueError, KeyError) as error:
        raise DamagedObject(f"{bare(url)} is damaged: {error}") from None
    if owner is None:
        return small
    found = small.get(RUN_ID, "").strip()
    if found != owner.run:
        raise DamagedObject(f"{bare(url)} is of run {found}, the mirror belongs to run {owner.run}")
    if owner.started:  # the next start takes a number of its own, also if that attempt sent nothing else
        small.setdefault(f"attempts/{owner.attempt:04d}.json", owner.started)
    return small


def _lineage(
    url: str, head: LineageHead, rows: Path, should_stop: Callable[[], bool]
) -> tuple[list[str], list[Segment]]:
    """Fetch the lineage files one after the other, each named and hashed by the one before.

    Returns their names and the segments of all.
    """

    def bring_link(link: LineageHead) -> None:
        if Path(link.file).name != link.file:
            raise DamagedObject(f"{link.file!r} is not a plain file name")
        stop_if(should_stop)
        data = _read(storage.join(url, link.file))
        if hashlib.sha256(data).hexdigest() != link.sha256:
            raise DamagedObject(f"{bare(url)}/{link.file} does not match its hash")
        storage.write_atomic(rows / link.file, data)

    links: list[str] = []
    segments: list[Segment] = []
    bring_link(head)
    try:
        for at, link in walk_lineage(rows, head):  # reads the next file only when asked for it
            links.append(at.file)
            segments += link.segments
            if link.previous is not None:
                bring_link(link.previous)
    except ValueError as error:
        raise DamagedObject(f"{bare(url)}: {error}") from None
    odd = [segment.file for segment in segments if Path(segment.file).name != segment.file]
    if odd:
        raise DamagedObject(f"{odd[0]!r} is not a plain file name")
    return links, segments


def _put_in_place(run_dir: Path, small: Mapping[str, str], rows: Sequence[Path]) -> None:
    """What differs is found before anything is written."""
    ledger = run_dir / LEDGER
    for name, text in small.items():
        if not _may_stay(run_dir / name, text.encode()):
            raise _differs(run_dir / name)
    for path in rows:
        there = ledger / path.name
        if there.exists() and there.read_bytes() != path.read_bytes():
            raise _differs(there)
    ledger.mkdir(mode=0o700, exist_ok=True)
    for path in rows:
        path.replace(ledger / path.name)
    storage.fsync_folder(ledger)
    for name, text in small.items():
        path = run_dir / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            storage.write_atomic(path, text.encode())


def _may_stay(path: Path, data: bytes) -> bool:
    """Whether a local file may stay as it is: it is the same, or says more than the mirror knows."""
    if not path.exists() or path.name == CONFIG:  # every start writes the config anew
        return True
    there = path.read_bytes()
    return there == data or (path.suffix == ".jsonl" and there.startswith(data))


def _differs(path: Path) -> UserError:
    return UserError(
        f"{path} differs from the file of that name in checkpoint.mirror; a restore never overwrites: restore into an "
        "empty folder (run.dir=NEW), or move this file away"
    )


def _read(url: str) -> bytes:
    try:
        return storage.read_bytes(url)
    except FileNotFoundError:
        raise DamagedObject(f"{bare(url)} is missing") from None


def candidates(places: Iterable[Place], latest: Place | None) -> list[Place]:
    """What to try, best first: `latest`, then older ones.

    None that came after it (not committed), and none of a step that a newer attempt took again: that one was given up.
    """
    line = [] if latest is None else [latest]
    for place in sorted(places, reverse=True):
        if not line or (place < line[-1] and place.step < line[-1].step):
            line.append(place)
    return line
