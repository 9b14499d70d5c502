"""Videos become a packed data set: convert each file in a child, choose splits, shuffle, write tars, index them.

    DST.partial/staging/ID/    the samples of one file; kept when packing is interrupted, used when it is started again
    DST.partial/out/           the finished folder, renamed to DST as the last step

So DST is there whole or not at all. The same files and options give the same bytes, whatever the number of workers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from shards import storage
from shards.convert import OUTCOME_NAME, Job, Outcome, Piece, converters
from shards.encode import Encoding
from shards.errors import UserError
from shards.layout import REJECTED_NAME, Manifest, sample_key, shard_name
from shards.manifest import build_manifest
from shards.probe import Limits
from shards.sources import Listing, Source, list_sources
from shards.splits import SplitRule, choose_splits

CODE_VERSION = 1
"""Raised when the same options would give other samples: staged ones of an interrupted packing are then not used."""
PACKAGES = ("shards", "pretrain", "launch")


@dataclass(frozen=True)
class PackOptions:
    """How to pack. `preset` train encodes for training, copy stores each file as it is, as one sample."""

    preset: Literal["train", "copy"] = "train"
    short_side: int = 256
    max_frames: int = 128
    max_rate: float = 30.0
    stride: int = 4
    min_frames: int = 16
    val_fraction: float = 0.1
    shard_bytes: int = 256_000_000
    workers: int = 0
    """0 = one per processor."""
    seed: int = 0
    limits: Limits = field(default_factory=Limits)

    @property
    def encoding(self) -> Encoding:
        """The part that decides what a sample looks like."""
        return Encoding(self.short_side, self.max_frames, self.max_rate, self.stride, self.min_frames)

    def check(self) -> None:
        """Raise UserError for values that cannot work, all of them at once."""
        rules = {
            f"pack.preset is {self.preset!r}; it must be train or copy": self.preset in ("train", "copy"),
            f"pack.short_side is {self.short_side}; it must be at least 32": self.short_side >= 32,
            f"pack.stride is {self.stride}; it must be at least 1": self.stride >= 1,
            f"pack.min_frames is {self.min_frames}; it must be at least 2": self.min_frames >= 2,
            f"pack.max_frames is {self.max_frames}; it must be at least twice pack.min_frames ({self.min_frames})": (
                self.max_frames >= 2 * self.min_frames
            ),
            f"pack.max_rate is {self.max_rate:g}; it must lie above 0, at most 240": 0 < self.max_rate <= 240,
            f"pack.val_fraction is {self.val_fraction:g}; it must lie in [0, 1)": 0 <= self.val_fraction < 1,
            f"pack.shard_bytes is {self.shard_bytes}; it must be at least 1000": self.shard_bytes >= 1000,
            f"pack.workers is {self.workers}; it must be at least 0": self.workers >= 0,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise UserError("; ".join(broken) + ": change that")


@dataclass(frozen=True)
class PackProgress:
    """How far it is: files are converted first, then tars are written."""

    phase: Literal["convert", "write"]
    num_done: int
    num_total: int
    num_samples: int
    num_rejected: int


@dataclass(frozen=True)
class PackSummary:
    """What was packed. `lines()` says it in words."""

    manifest: Manifest
    num_files: int
    num_ignored_files: int
    num_reused: int
    rejected: dict[str, int]
    """Reason -> number of files."""
    rule: SplitRule
    warnings: tuple[str, ...]

    @property
    def num_rejected(self) -> int:
        """Files that gave no sample."""
        return sum(self.rejected.values())

    @property
    def num_samples(self) -> int:
        """Samples over all splits."""
        return sum(split.num_samples for split in self.manifest.splits.values())

    def lines(self) -> list[str]:
        """For people: counts, the split rule, rejections by reason, warnings."""
        lines = [f"packed {self.num_files - self.num_rejected} of {self.num_files} files"]
        if self.num_reused:
            lines[0] += f" ({self.num_reused} of them converted before the interruption)"
        if self.num_ignored_files:
            lines[0] += f"; {self.num_ignored_files} other files in the folder are no videos"
        for name, split in sorted(self.manifest.splits.items()):
            num_bytes = sum(shard.num_bytes for shard in split.shards)
            lines.append(
                f"  {name}: {split.num_samples} samples, {split.num_frames} frames ({split.min_frames} to "
                f"{split.max_frames} each), {num_bytes / 1e6:.1f} MB in {len(split.shards)} tars"
            )
        lines.append(self.rule.text)
        if "val" not in self.manifest.splits:
            lines.append(
                "nothing is held out, so training will not evaluate; to hold something out, pack two source files or "
                "more with --val-fraction above 0, or give splits (folders train/ and val/, or a column split)"
            )
        if self.manifest.labels:
            lines.append(f"labels: {len(self.manifest.labels)}")
        if self.rejected:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.rejected.items()))
            lines.append(f"rejected {self.num_rejected}: {reasons} ({REJECTED_NAME} names each file and why)")
        return lines + [f"warning: {warning}" for warning in self.warnings]


@dataclass(frozen=True)
class Item:
    """One sample on its way into a tar."""

    source: Source
    number: int
    """Of the piece within its file."""
    piece: Piece


def pack(
    src: Path, dst: Path, options: PackOptions, progress: Callable[[PackProgress], None] | None = None
) -> PackSummary:
    """Pack a folder of videos, a CSV or JSONL list of them, or one video into the new folder `dst`.

    Raises UserError for what the user must mend (nothing to pack, nothing readable, `dst` not usable). Files that
    cannot be used are not errors: they are listed with the reason in rejected.jsonl and counted in the summary.
    """
    options.check()
    _check_destination(dst)
    place = dst.resolve()  # a link is followed, so that the last rename stays on one file system
    partial = place.with_name(place.name + ".partial")
    listing = list_sources(src, exclude=(place, partial))
    report = progress or _say_nothing
    with _partial_folder(partial, dst):
        outcomes, num_reused = _convert_all(listing, partial / "staging", options, report)
        rejected = {name: outcome for name, outcome in outcomes.items() if outcome.reason}
        if len(rejected) == len(outcomes):
            name, outcome = next(iter(rejected.items()))
            reasons = Counter(outcome.reason for outcome in rejected.values())
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
            shutil.rmtree(partial)
            raise UserError(
                f"{src} holds no usable video: all {len(outcomes)} files were rejected ({counts}; for example "
                f"{_printable(name)}: {outcome.reason}, {outcome.detail}); mend or replace them"
            )
        used = [source for source in listing.sources if source.name not in rejected]
        rule = choose_splits(used, options.val_fraction)
        items = [
            Item(source, number, piece) for source in used for number, piece in enumerate(outcomes[source.name].pieces)
        ]
        out = partial / "out"
        shutil.rmtree(out, ignore_errors=True)
        try:
            out.mkdir()
            _write_tars(out, items, rule, options, len(rejected), report)
            manifest = build_manifest(out, options.preset)
            rows = [
                {"path": _printable(name), "reason": outcome.reason, "detail": outcome.detail}
                for name, outcome in sorted(rejected.items())
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            storage.write_atomic(out / REJECTED_NAME, text.encode())
            out.rename(place)
            storage.fsync_folder(place.parent)
        except OSError as error:
            raise UserError(
                f"{dst} cannot be written ({error}); it must be in a place with room that you may write to: choose "
                "another, or free some space and start again (finished files are kept)"
            ) from error
        shutil.rmtree(partial)
    return PackSummary(
        manifest=manifest,
        num_files=len(listing.sources),
        num_ignored_files=listing.num_ignored_files,
        num_reused=num_reused,
        rejected=dict(Counter(outcome.reason for outcome in rejected.values())),
        rule=rule,
        warnings=tuple(_warnings(listing, rejected, rule, manifest)),
    )


def _say_nothing(progress: PackProgress) -> None:
    """For callers that show no progress."""


def _check_destination(dst: Path) -> None:
    real = dst.resolve()
    if not real.name or real == Path.cwd():
        raise UserError(f"{dst} cannot be packed into; the destination must be a new folder: name one, like data/NAME")
    if _printable(str(real)) != str(real):
        raise UserError(
            f"{_printable(str(dst))} is not a name in UTF-8; the destination must have one, as configs name it: "
            "choose another"
        )
    root = Path(__file__).resolve().parent.parent
    for package in PACKAGES:
        if real == root / package or (root / package) in real.parents:
            raise UserError(
                f"{dst} lies inside the code package {package}/; packed data must lie elsewhere: use data/NAME"
            )
    if dst.exists() and not dst.is_dir():
        raise UserError(f"{dst} is a file; the destination must be a new folder: choose another name")
    if dst.is_dir() and any(dst.iterdir()):
        raise UserError(
            f"{dst} exists and is not empty; packing never overwrites: choose another folder or remove that one"
        )


@contextmanager
def _partial_folder(partial: Path, dst: Path) -> Generator[None]:
    """The working folder beside the destination, held by one process at a time."""
    try:
        (partial / "staging").mkdir(parents=True, exist_ok=True)
        lock = (partial / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"{dst} cannot be written ({error}); its parent must be a folder you may write to: choose another place"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{dst} is being packed by another process; wait for it or choose another name") from error
        yield


def _convert_all(
    listing: Listing, staging: Path, options: PackOptions, report: Callable[[PackProgress], None]
) -> tuple[dict[str, Outcome], int]:
    """Outcome by source name, in the order of the listing, and how many were there already."""
    outcomes: dict[str, Outcome] = {}
    jobs: list[tuple[Source, Job]] = []
    num_reused = 0
    for source in listing.sources:
        if (fault := _name_fault(source)) is not None:
            outcomes[source.name] = Outcome(reason="name", detail=fault)
            continue
        folder = staging / _staging_id(source, options)
        found = _staged_outcome(folder)
        if found is not None:
            num_reused += 1
            outcomes[source.name] = found
        else:
            job = Job(str(source.path.absolute()), str(folder), options.preset, options.encoding, options.limits)
            jobs.append((source, job))

    def tell() -> None:
        num_samples = sum(len(outcome.pieces) for outcome in outcomes.values())
        num_rejected = sum(bool(outcome.reason) for outcome in outcomes.values())
        report(PackProgress("convert", len(outcomes), len(listing.sources), num_samples, num_rejected))

    tell()
    with converters(min(options.workers or _num_cores(), len(jobs))) as submit:
        waiting: dict[Future[Outcome], Source] = {submit(job): source for source, job in jobs}
        while waiting:
            finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                outcomes[waiting.pop(future).name] = future.result()
            tell()
    return {source.name: outcomes[source.name] for source in listing.sources}, num_reused


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _name_fault(source: Source) -> str | None:
    """Why this file cannot be named in a tar, None if it can: file systems take any bytes, tars and JSON take text."""
    for text in (source.name, source.group, source.label or ""):
        if "\0" in text or _printable(text) != text:
            return f"{_printable(text)!r} is not a name in UTF-8: rename it"
    return None


def _printable(name: str) -> str:
    """A name as it can be written down: what is not UTF-8 becomes a backslash and a number."""
    return name.encode("utf-8", "backslashreplace").decode()


def _staging_id(source: Source, options: PackOptions) -> str:
    """Names the samples of one file: the same while file and options are the same."""
    try:
        facts = source.path.stat()
        state: list[Any] = [facts.st_size, facts.st_mtime_ns]
    except OSError:
        state = []
    parts = [CODE_VERSION, source.name, state, options.preset, asdict(options.encoding), asdict(options.limits)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _staged_outcome(folder: Path) -> Outcome | None:
    try:
        return Outcome.from_json((folder / OUTCOME_NAME).read_text())
    except FileNotFoundError:
        return None


def _write_tars(
    out: Path,
    items: list[Item],
    rule: SplitRule,
    options: PackOptions,
    num_rejected: int,
    report: Callable[[PackProgress], None],
) -> None:
    """Samples in shuffled order, so that neighbours are not of one film; tars of a split are about equally large."""
    num_done = 0
    for split in sorted(set(rule.split_of.values())):
        chosen = [item for item in items if rule.split_of[item.source.name] == split]
        chosen.sort(key=lambda item: _shuffle_key(options.seed, item))
        sizes = [Path(item.piece.file).stat().st_size for item in chosen]
        first = 0
        for shard, end in enumerate(shard_ends(sizes, options.shard_bytes)):
            _write_tar(out / shard_name(split, shard), split, first, chosen[first:end])
            num_done += end - first
            first = end
            report(PackProgress("write", num_done, len(items), len(items), num_rejected))


def shard_ends(sizes: list[int], shard_bytes: int) -> list[int]:
    """Where each tar ends when samples of these sizes go into the fewest tars of about `shard_bytes`, evenly."""
    total = sum(sizes)
    num_shards = min(max(1, -(-total // shard_bytes)), len(sizes))
    ends: list[int] = []
    filled = 0
    for number, size in enumerate(sizes, 1):
        filled += size
        if filled * num_shards >= total * (len(ends) + 1):
            ends.append(number)
    return ends


def _write_tar(path: Path, split: str, first: int, items: list[Item]) -> None:
    # Imports torch, so not at the top of a module.
    from webdataset.writer import TarWriter  # pyright: ignore[reportUnknownVariableType]  # no stubs

    with path.open("wb") as file:
        tar: Any = TarWriter(file, encoder=False, mtime=0, user="", group="")
        for number, item in enumerate(items, first):
            key = sample_key(split, number)
            video = Path(item.piece.file)
            tar.write({"__key__": key, video.suffix[1:].lower(): video.read_bytes()})
            tar.write({"__key__": key, "json": json.dumps(_describe(item, split), sort_keys=True).encode()})
        tar.close()
        file.flush()
        os.fsync(file.fileno())


def _describe(item: Item, split: str) -> dict[str, Any]:
    """KEY.json: all that the index is made from, and where the sample comes from."""
    source = item.source
    facts = {name: value for name, value in vars(item.piece).items() if name != "file"}
    return {**facts, "label": source.label, "split": split, "group": source.group, "source": source.name}


def _shuffle_key(seed: int, item: Item) -> bytes:
    return hashlib.blake2b(f"{seed}:{item.number}:{item.source.name}".encode(), digest_size=16).digest()


def _warnings(listing: Listing, rejected: dict[str, Outcome], rule: SplitRule, manifest: Manifest) -> Iterator[str]:
    if listing.ignored_columns:
        yield f"columns that mean nothing here were ignored: {', '.join(listing.ignored_columns)}"
    by_label: dict[str, list[Source]] = {}
    for source in listing.sources:
        if source.label is not None:
            by_label.setdefault(source.label, []).append(source)
    for label, sources in sorted(by_label.items()):
        if all(source.name in rejected for source in sources):
            yield f"class {label!r} has nothing readable ({len(sources)} files rejected) and is not among the labels"
    yield from rule.warnings
    num_samples = {name: split.num_samples for name, split in manifest.splits.items()}
    if num_samples.get("val", 0) > num_samples.get("train", 0):
        yield (
            f"val holds more samples ({num_samples['val']}) than train ({num_samples.get('train', 0)}): give splits "
            "(folders train/ and val/, or a column split) to choose what is held out"
        )
