"""Samples that must not be used any more (consent, takedown): DST/withdrawn.jsonl, beside the manifest.

    {"split": "train", "sample": 17, "key": "train-000000017", "time": "2026-01-31T12:00:00Z"}     one row per sample

Not part of the manifest's hash: withdrawing a sample changes no order and no number. A loader that starts after a row
was written replaces the sample and says so in journal and ledger (reason `withdrawn`).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from shards import storage
from shards.errors import UserError
from shards.manifest import manifest_url

if TYPE_CHECKING:
    from shards.keys import Found

WITHDRAWN_NAME = "withdrawn.jsonl"


@dataclass(frozen=True)
class Withdrawal:
    """One withdrawn sample."""

    split: str
    sample: int
    key: str
    time: str
    """UTC, ISO 8601."""

    def to_json(self) -> str:
        """One line of the file."""
        return json.dumps(asdict(self))


def withdrawn_url(url: str) -> str:
    """Where the withdrawals of a data set are written down, given its folder or its manifest."""
    return storage.join(storage.parent(manifest_url(url)), WITHDRAWN_NAME)


def read_withdrawals(url: str, *, attempt_s: float = 30.0, deadline_s: float = 300.0) -> list[Withdrawal]:
    """Every row, in the order in which they were written; none where nothing was withdrawn. Raises UserError."""
    where = withdrawn_url(url)
    try:
        data = storage.read_bytes(where, attempt_s=attempt_s, deadline_s=deadline_s)
    except FileNotFoundError:
        return []
    except PermissionError as error:  # never taken for none
        raise UserError(
            f"{storage.bare(where)} cannot be read ({error}); whether samples were withdrawn must be known: get the "
            "permission to (S3 also says 403 of a file that is not there to whoever lacks s3:ListBucket)"
        ) from error
    rows: list[Withdrawal] = []
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        try:
            row = cast("dict[str, Any]", json.loads(line))
            rows.append(Withdrawal(str(row["split"]), int(row["sample"]), str(row["key"]), str(row["time"])))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{where} line {number} is {line[:80]!r}; it must be a JSON row with split, sample, key and time: "
                "mend the line (nothing that was withdrawn is read before that)"
            ) from error
    return rows


def withdrawn(url: str, split: str, *, attempt_s: float = 30.0, deadline_s: float = 300.0) -> frozenset[int]:
    """Numbers of the samples of a split that must not be used. Raises UserError if the list is there but damaged."""
    rows = read_withdrawals(url, attempt_s=attempt_s, deadline_s=deadline_s)
    return frozenset(row.sample for row in rows if row.split == split)


def withdraw(url: str, found: Iterable[Found]) -> list[Withdrawal]:
    """Write down that these samples must not be used any more. Returns the rows that are new.

    All or nothing; what was withdrawn before stays as it is. Raises UserError where it cannot be written.
    """
    where = withdrawn_url(url)
    with _alone(where):
        rows = read_withdrawals(url)
        known = {(row.split, row.sample) for row in rows}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        new = [
            Withdrawal(sample.split, sample.sample, sample.key, now)
            for sample in sorted(set(found))
            if (sample.split, sample.sample) not in known
        ]
        if new:
            text = "".join(f"{row.to_json()}\n" for row in [*rows, *new])
            try:
                storage.write_bytes(where, text.encode())
            except OSError as error:
                raise UserError(
                    f"{where} cannot be written ({error}): get the permission to, then try again"
                ) from error
            if not set(new) <= set(read_withdrawals(url)):
                raise UserError(f"{where} was written by another process at the same time: run the command again")
    return new


@contextmanager
def _alone(where: str) -> Generator[None]:
    """One writer at a time, where the data set is local."""
    path = storage.local_path(where)
    if path is None:
        yield
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
