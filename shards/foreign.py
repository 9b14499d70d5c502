"""Tars of videos made by others become a data set where they are: an index and a manifest, nothing is copied.

    URL ─ list_tars ─ scan_tar (one pass over each, several at a time) ─ DIR/staging/ID ─ SPLIT.index, manifest.json

A tar that was finished is not read again after a kill. Where DIR holds an index already, the tars that it lists stay
as they are, rows and numbers, and new ones follow: the old index is the beginning of the new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from shards import storage
from shards.convert import converters
from shards.errors import UserError
from shards.foreignset import PRESET, Grown, write_set
from shards.layout import MANIFEST_NAME, Manifest, is_url
from shards.manifest import load_manifest
from shards.probe import Limits
from shards.sources import SPLIT_NAME
from shards.tarlist import is_local, list_tars
from shards.tarscan import StoppedError, Submit, Tar, TarScan, scan_tar
from shards.tarstream import BrokenTarError

CODE_VERSION = 1
"""Raised when the same tar would give other rows: staged ones of an interrupted run are then not used."""
STAGING_NAME = "staging"
TARS_PER_CORE = 2
NUM_SHOWN = 5


@dataclass(frozen=True)
class IndexOptions:
    """How to index. `to` is the folder of the index; None puts it beside local tars."""

    to: Path | None = None
    probe: Literal["header", "packets", "decode"] = "packets"
    split: str = "train"
    val_fraction: float = 0.0
    """Share of the groups that become the split val."""
    workers: int = 0
    """Tars at a time, and children that look into videos; 0 = two per core."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class IndexProgress:
    """How far it is."""

    num_done: int
    num_total: int
    """Tars."""
    num_samples: int
    num_rejected: int


@dataclass(frozen=True)
class IndexSummary:
    """What was indexed. `lines()` says it in words."""

    folder: Path
    manifest: Manifest
    num_tars: int
    num_known: int
    """Tars that the folder's index listed before."""
    num_reused: int
    """Tars that an interrupted run had finished."""
    rejected: dict[str, int]
    """Reason -> number of samples, of all tars of the index."""
    num_ignored: int
    num_unread: int

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "folder": str(self.folder),
            "manifest": json.loads(self.manifest.to_json()),
            "num_tars": self.num_tars,
            "rejected": self.rejected,
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"indexed {self.num_tars} tars"]
        if self.num_known:
            lines[0] += f" ({self.num_known} of them were in the index before)"
        if self.num_reused:
            lines[0] += f" ({self.num_reused} of them before the interruption)"
        for name, split in sorted(self.manifest.splits.items()):
            lines.append(
                f"  {name}: {split.num_samples} samples, {split.num_frames} frames ({split.min_frames} to "
                f"{split.max_frames} each) in {len(split.shards)} tars"
            )
        if self.manifest.labels:
            lines.append(f"labels: {len(self.manifest.labels)}")
        if self.rejected:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.rejected.items()))
            lines.append(f"rejected {sum(self.rejected.values())}: {reasons} (rejected.jsonl names each and why)")
        if self.num_ignored:
            lines.append(f"members that belong to no sample: {self.num_ignored}")
        if self.num_unread:
            lines.append(f"labels or descriptions that could not be read: {self.num_unread}")
        return lines


def index_foreign(
    url: str, options: IndexOptions, progress: Callable[[IndexProgress], None] | None = None
) -> IndexSummary:
    """Index the WebDataset tars of a folder, one tar, or a brace pattern of URLs.

    Raises UserError for what the user must mend, naming it: no tars, a tar that is cut off or changed, tars that left
    an existing index, no place to write. Samples that cannot be used are listed in rejected.jsonl with the reason.
    """
    _check(options)
    tars = list_tars(url)
    folder = _destination(url, tars, options)
    _known(folder, tars)  # what is refused leaves nothing behind
    with _locked(folder) as staging:
        grown = _known(folder, tars)
        new = [tar for tar in tars if tar.url not in grown.urls]
        _check_changed(tars, grown)
        num_reused = _scan_all(new, staging, options, progress)
        try:
            written = write_set(
                folder,
                grown,
                new,
                lambda tar: TarScan.from_bytes(_staged(staging, tar, options).read_bytes()),
                split=options.split,
                val_fraction=options.val_fraction,
            )
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error}); free some space and start again") from error
        shutil.rmtree(staging)
    return IndexSummary(
        folder=folder,
        manifest=written.manifest,
        num_tars=len(grown.urls) + len(new),
        num_known=len(grown.urls),
        num_reused=num_reused,
        rejected=written.rejected,
        num_ignored=written.num_ignored,
        num_unread=written.num_unread,
    )


def _check(options: IndexOptions) -> None:
    if not SPLIT_NAME.fullmatch(options.split):
        raise UserError(f"--split is {options.split!r}; it must be a word of letters, digits and _: rename it")
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val-fraction is {options.val_fraction}; it must be at least 0 and below 1: change it")
    if options.val_fraction and options.split == "val":
        raise UserError("--split is val; with --val-fraction it must be another, as that share becomes val: choose one")


def _destination(url: str, tars: list[Tar], options: IndexOptions) -> Path:
    """The folder of the index: `--to`, or that of local tars."""
    folder = options.to
    if folder is None:
        parents = {Path(tar.url).parent for tar in tars} if is_local(tars) else set[Path]()
        if len(parents) != 1 or not os.access(next(iter(parents)), os.W_OK):
            raise UserError(f"{url} is no local folder that can be written to; the index needs one: say --to data/NAME")
        (folder,) = parents
    if "://" in str(folder):
        raise UserError(f"--to is {folder}; it must be a local folder: index there, then upload the folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the index needs a folder: choose another name")
    return folder.absolute()


@contextmanager
def _locked(folder: Path) -> Generator[Path]:
    """The staging folder, held by one process at a time."""
    staging = folder / STAGING_NAME
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = (staging / "lock").open("w")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}); choose another place: --to data/NAME") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder} is being indexed by another process; wait for it") from error
        yield staging


def _known(folder: Path, tars: list[Tar]) -> Grown:
    """What an earlier index of this folder lists."""
    if not (folder / MANIFEST_NAME).exists():
        return Grown(None, {})
    manifest = load_manifest(str(folder))
    if manifest.preset != PRESET:
        raise UserError(
            f"{folder} is a packed data set already; an index of tars made by others needs a folder of its own: "
            "say --to data/NAME"
        )
    shards = {shard.name: shard for split in manifest.splits.values() for shard in split.shards}
    urls = {_plain(name, folder): shard for name, shard in shards.items()}
    gone = sorted(urls.keys() - {tar.url for tar in tars})
    if gone:
        raise UserError(
            f"{folder} holds an index that lists {gone[0]} ({len(gone)} such tars), which this call leaves out; an "
            "index may only grow: name those tars too, or choose another folder with --to"
        )
    return Grown(manifest, urls)


def _plain(name: str, folder: Path) -> str:
    """The URL of a tar as `list_tars` gives it."""
    return name.removeprefix("file://") if is_url(name) else str(folder / name)


def _check_changed(tars: list[Tar], grown: Grown) -> None:
    for tar in tars:
        shard = grown.urls.get(tar.url)
        if shard is not None and (tar.num_bytes != shard.num_bytes or (shard.tag and tar.tag != shard.tag)):
            raise UserError(
                f"{tar.url} is not the tar that was indexed (size or etag differ); indexed tars must stay as they "
                "are: put it back, or index anew into another folder with --to"
            )


def _scan_all(
    tars: list[Tar], staging: Path, options: IndexOptions, progress: Callable[[IndexProgress], None] | None
) -> int:
    """Stage every tar that is not staged yet. Returns how many were."""
    todo = [tar for tar in tars if not _staged(staging, tar, options).exists()]
    counts = [len(tars) - len(todo), 0, 0]  # tars, samples, rejected

    def tell() -> None:
        if progress is not None:
            progress(IndexProgress(counts[0], len(tars), counts[1], counts[2]))

    tell()
    broken: list[str] = []
    for tar, outcome in _scans(todo, options):
        if isinstance(outcome, str):
            broken.append(outcome)
            continue
        try:
            storage.write_atomic(_staged(staging, tar, options), outcome.to_bytes())
        except OSError as error:
            raise UserError(
                f"{staging} cannot be written ({error}); free some space and start again (finished tars are kept)"
            ) from error
        counts = [counts[0] + 1, counts[1] + len(outcome.rows), counts[2] + len(outcome.refusals)]
        tell()
    if broken:
        more = f" (and {len(broken) - NUM_SHOWN} more)" if len(broken) > NUM_SHOWN else ""
        raise UserError(
            f"{len(broken)} of {len(tars)} tars cannot be indexed: {'; '.join(sorted(broken)[:NUM_SHOWN])}{more}. "
            "Copy them again or leave them out, then start again: the others are kept"
        )
    return len(tars) - len(todo)


def _scans(tars: list[Tar], options: IndexOptions) -> Iterator[tuple[Tar, TarScan | str]]:
    """Every tar with what it holds, or with what is wrong, as they get finished."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_children = options.workers or TARS_PER_CORE * cores
    num_tars = max(min(num_children, len(tars)), 1)
    num_ahead = max(2, -(-num_children // num_tars) + 1)
    stopped = threading.Event()
    with (
        tempfile.TemporaryDirectory(prefix="tubelet-index-") as scratch,
        converters(num_children if tars else 0) as submit,
    ):
        pool = ThreadPoolExecutor(num_tars, thread_name_prefix="scan")

        def scan(tar: Tar) -> TarScan | str:
            return _scan(tar, options, submit, Path(scratch), num_ahead, stopped)

        try:
            waiting: dict[Future[TarScan | str], Tar] = {}
            left = iter(tars)
            while True:
                # no more than a few results wait for the disk, however many tars there are
                while len(waiting) < 2 * num_tars and (tar := next(left, None)) is not None:
                    waiting[pool.submit(scan, tar)] = tar
                if not waiting:
                    return
                finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield waiting.pop(future), future.result()
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)


def _scan(
    tar: Tar, options: IndexOptions, submit: Submit, scratch: Path, num_ahead: int, stopped: threading.Event
) -> TarScan | str:
    try:
        return scan_tar(
            tar,
            options.probe,
            options.limits,
            submit=submit,
            scratch=scratch,
            num_ahead=num_ahead,
            stopped=stopped,
        )
    except BrokenTarError as error:
        return str(error)
    except StoppedError:
        return f"{tar.url}: given up"
    except OSError as error:
        raise UserError(f"{scratch} cannot be written ({error}); free some space or set TMPDIR") from error


def _staged(staging: Path, tar: Tar, options: IndexOptions) -> Path:
    parts = [CODE_VERSION, asdict(tar), options.probe, asdict(options.limits)]
    return staging / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
