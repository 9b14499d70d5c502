"""One tar of videos made by others -> rows of the index, in one pass over its bytes.

    member ─ crc32, copied to a temporary file ─ described in a child ─ row
    members with one stem are a sample: the first video (others are refused, reason `second_video`), its label (.cls,
    else .json), its group (.json, else the stem)

What cannot be used is a `Refusal` with its reason; a tar that is not whole is a BrokenTarError.
"""

from __future__ import annotations

import json
import re
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np

from shards import storage
from shards.claims import LEVELS
from shards.convert import Job, Outcome, Piece
from shards.encode import Encoding
from shards.layout import RECORD_DTYPE, Records, group_number
from shards.probe import Limits
from shards.sources import VIDEO_SUFFIXES
from shards.tarstream import BrokenTarError, Member, TarStream, changed

MAX_VIDEO_BYTES = 2**32 - 1
MAX_TEXT_BYTES = 1 << 20
STEM = re.compile(r"(?:\./)*((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
"""WebDataset's rule: folders count, the base name up to its first dot; `./` before it says nothing."""
Submit = Callable[[Job], "Future[Outcome]"]
_file_numbers = count()


class StoppedError(Exception):
    """The work was given up from outside; nothing is said about the tar."""


@dataclass(frozen=True)
class Tar:
    """One tar to index."""

    url: str
    num_bytes: int
    tag: str


@dataclass(frozen=True)
class Refusal:
    """A sample that is not used, and why."""

    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class TarScan:
    """What one tar holds. Rows in the order of the videos; `shard` is 0, `label` a number in `labels`."""

    sha256: str
    labels: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    num_ignored: int
    """Members that belong to no sample: folders, hidden files, names without an extension."""
    num_unread: int
    """Labels and descriptions that could not be read."""
    names: tuple[tuple[str, ...], ...]
    """Of each row: its key, then its group and its source where the description names them."""
    rows: Records = field(repr=False)

    def to_bytes(self) -> bytes:
        """For a staging file: a line of JSON, then the rows."""
        head = {name: getattr(self, name) for name in ("sha256", "labels", "num_ignored", "num_unread", "names")}
        return (
            json.dumps({**head, "refusals": [asdict(r) for r in self.refusals]}).encode() + b"\n" + self.rows.tobytes()
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> TarScan:
        """Read a staging file."""
        line, _, rows = data.partition(b"\n")
        head = json.loads(line)
        head.update(labels=tuple(head["labels"]), names=tuple(tuple(names) for names in head["names"]))
        head.update(refusals=tuple(Refusal(**row) for row in head["refusals"]))
        return cls(**head, rows=np.frombuffer(rows, RECORD_DTYPE))


@dataclass
class _Sample:
    """What is known so far of the members with one stem."""

    video: Member | None = None
    checksum: int = 0
    outcome: Outcome | None = None
    class_label: str | None = None
    label: str | None = None
    group: str | None = None
    source: str | None = None
    refusal: tuple[str, str] | None = None


def scan_tar(
    tar: Tar,
    level: str,
    limits: Limits,
    *,
    submit: Submit,
    scratch: Path,
    num_ahead: int = 2,
    stopped: threading.Event | None = None,
) -> TarScan:
    """Read a tar once and describe its videos at `level` (of `LEVELS`).

    `submit` describes a file in a child; at most `num_ahead` files wait for it in `scratch`. Raises BrokenTarError,
    OSError if `scratch` cannot be written, StoppedError once `stopped` is set.
    """
    return _Scan(tar, level, limits, submit, scratch, num_ahead, stopped or threading.Event()).run()


class _Scan:
    def __init__(
        self,
        tar: Tar,
        level: str,
        limits: Limits,
        submit: Submit,
        scratch: Path,
        num_ahead: int,
        stopped: threading.Event,
    ) -> None:
        self._tar, self._level, self._limits = tar, level, limits
        self._submit, self._scratch, self._num_ahead, self._stopped = submit, scratch, num_ahead, stopped
        self._samples: dict[str, _Sample] = {}
        self._names: set[str] = set()
        self._waiting: deque[tuple[_Sample, Path, Future[Outcome]]] = deque()
        self._refusals: list[Refusal] = []
        self._num_ignored = self._num_unread = 0

    def run(self) -> TarScan:
        try:
            with TarStream(self._tar.url, self._tar.num_bytes, self._tar.tag) as stream:
                for member in stream:
                    if self._stopped.is_set():
                        raise StoppedError
                    self._take(member, stream)
                self._finish(0)
                sha256 = stream.sha256
        finally:
            for _, path, future in self._waiting:
                future.cancel()
                path.unlink(missing_ok=True)
        self._check_same()
        return self._result(sha256)

    def _take(self, member: Member, stream: TarStream) -> None:
        found = STEM.fullmatch(member.name)
        if member.kind == "other" or found is None:
            self._num_ignored += 1
            return
        key, extension = found.groups()
        suffix = "." + extension.rpartition(".")[2].lower()
        if member.name in self._names:
            self._refusals.append(Refusal(_text(key), "duplicate", f"{_text(member.name)} is there a second time"))
            return
        self._names.add(member.name)
        sample = self._samples.setdefault(key, _Sample())
        if suffix in VIDEO_SUFFIXES:
            if sample.video is None:
                self._take_video(sample, member, suffix, stream)
            else:
                what = f"{_text(member.name)} is not used: its sample has {_text(sample.video.name)}, which comes first"
                self._refusals.append(Refusal(_text(key), "second_video", what))
        elif extension in ("cls", "json") and member.kind == "file":
            self._take_words(sample, extension, member, stream)

    def _take_video(self, sample: _Sample, member: Member, suffix: str, stream: TarStream) -> None:
        sample.video = member
        if member.kind != "file":
            sample.refusal = (member.kind, "a tar entry of this kind has no bytes of its own in one piece")
        elif member.size > MAX_VIDEO_BYTES:
            sample.refusal = ("too_large", f"{member.size} bytes; a video must have less than 4 GiB")
        elif _text(member.name) != member.name:
            sample.refusal = ("name", f"{_text(member.name)} is no name in UTF-8")
        if sample.refusal is not None:
            return
        path = self._scratch / f"{next(_file_numbers):09d}{suffix}"
        with path.open("wb") as file:
            for part in stream.body():
                sample.checksum = zlib.crc32(part, sample.checksum)
                file.write(part)
        self._waiting.append((sample, path, self._submit(Job(str(path), "", self._level, Encoding(), self._limits))))
        self._finish(self._num_ahead - 1)

    def _finish(self, num_left: int) -> None:
        """Wait for the oldest outcomes until only so many are left."""
        while len(self._waiting) > num_left:
            sample, path, future = self._waiting[0]
            sample.outcome = future.result()
            self._waiting.popleft()
            path.unlink()
            if sample.outcome.reason == "stopped":
                raise StoppedError

    def _take_words(self, sample: _Sample, extension: str, member: Member, stream: TarStream) -> None:
        """The label or the description of a sample; what cannot be read is counted, the video is used all the same."""
        try:
            if member.size > MAX_TEXT_BYTES:
                raise ValueError("too long")
            text = b"".join(bytes(part) for part in stream.body()).decode()
            if extension == "cls":
                sample.class_label = text.strip() or None
                return
            row = cast("dict[str, Any]", json.loads(text))
            sample.label = _word(row.get("label"))
            sample.group, sample.source = _word(row.get("group")), _word(row.get("source"))
        except (ValueError, AttributeError, RecursionError):
            self._num_unread += 1

    def _check_same(self) -> None:
        """Not every store compares tags with each read."""
        try:
            size, tag = storage.size_and_tag(self._tar.url)
        except OSError as error:
            raise BrokenTarError(f"{self._tar.url} cannot be read any more: {error}") from error
        if (size, tag) != (self._tar.num_bytes, self._tar.tag):
            raise changed(self._tar.url)

    def _result(self, sha256: str) -> TarScan:
        rows: list[tuple[str, _Sample, Piece]] = []
        for key, sample in self._samples.items():
            reason, detail = sample.refusal or ("", "")
            if sample.video is None:
                reason, detail = "no_video", "none of its members is a video by its name"
            elif sample.outcome is not None:
                reason, detail = sample.outcome.reason, sample.outcome.detail
            if reason:
                self._refusals.append(Refusal(_text(key), reason, detail))
            elif sample.outcome is not None:
                rows.append((key, sample, sample.outcome.pieces[0]))
        labels = {_label(sample): 0 for _, sample, _ in rows if _label(sample) is not None}
        numbers = {label: number for number, label in enumerate(labels)}
        records = np.zeros(len(rows), RECORD_DTYPE)
        for record, (key, sample, piece) in zip(records, rows, strict=True):
            assert sample.video is not None
            record["offset"], record["size"] = sample.video.offset, sample.video.size
            record["checksum"], record["level"] = sample.checksum, LEVELS[self._level]
            record["label"] = numbers.get(_label(sample), -1)
            record["group"] = group_number(sample.group or sample.source or key)
            for name in ("num_frames", "rate", "width", "height", "motion", "matrix", "full_range"):
                record[name] = getattr(piece, name)
        return TarScan(
            sha256=sha256,
            labels=tuple(str(label) for label in labels),
            refusals=tuple(self._refusals),
            num_ignored=self._num_ignored,
            num_unread=self._num_unread,
            names=tuple((key, *filter(None, (sample.group, sample.source))) for key, sample, _ in rows),
            rows=records,
        )


def count_reasons(refusals: Iterable[Refusal], counts: dict[str, int]) -> None:
    """Add refusals to counts by reason."""
    for refusal in refusals:
        counts[refusal.reason] = counts.get(refusal.reason, 0) + 1


def _label(sample: _Sample) -> str | None:
    return sample.class_label if sample.class_label is not None else sample.label


def _word(value: object) -> str | None:
    """A text or a number of a description; whatever else is there does not name anything."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return None
    return _text(str(value))


def _text(name: str) -> str:
    """A name as it can be written down."""
    return name.encode("utf-8", "backslashreplace").decode()
