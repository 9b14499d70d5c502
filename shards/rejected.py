"""rejected.jsonl: what a data set does not hold, and why. Nothing is left out without a row here.

{"path": "b/broken.mp4", "reason": "damaged", "detail": "..."}                    a file that gave no sample
{"path": "b/again.mp4", "reason": "duplicate", "detail": "...", "part": "0003-of-0016",
 "samples": [["parts/0003-of-0016/train-000000.tar", 1536]]}                      samples that lie in a tar, unused
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

from shards import storage
from shards.errors import UserError
from shards.layout import REJECTED_NAME, Place

DUPLICATE = "duplicate"
LOST = "lost"
"""Its bytes are damaged or gone: the file may be packed again."""
WITHDRAWN = "withdrawn"
"""Lost likewise, but `tubelet forget` had withdrawn it: the file must not be packed again."""


@dataclass(frozen=True)
class Rejection:
    """One file, or some of its samples, that the data set does not use."""

    path: str
    """The source's name; "" where it is not known any more."""
    reason: str
    detail: str
    part: str = ""
    """The folder below parts/ that it came with."""
    samples: tuple[Place, ...] = ()
    """Samples that lie in tars of the data set but are not in its index."""

    def to_json(self) -> str:
        """One line of the file."""
        return json.dumps({name: value for name, value in asdict(self).items() if value or name in REQUIRED})


REQUIRED = ("path", "reason", "detail")


def read_rejected(folder: str) -> list[Rejection]:
    """Every row of a data set's rejected.jsonl; none where there is no such file. Raises UserError if it is damaged."""
    url = storage.join(folder, REJECTED_NAME)
    try:
        lines = storage.read_bytes(url).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows: list[Rejection] = []
    for number, line in enumerate(lines, 1):
        try:
            row = cast("dict[str, Any]", json.loads(line))
            samples = tuple((str(tar), int(offset)) for tar, offset in row.get("samples", []))
            rows.append(Rejection(row["path"], row["reason"], row["detail"], row.get("part", ""), samples))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{url} line {number} is {line[:80]!r}; it must be a JSON row with path, reason and detail: mend it"
            ) from error
    return rows


def rejected_text(rows: Iterable[Rejection]) -> bytes:
    """The file: every row once, in the order given."""
    return "".join(f"{row.to_json()}\n" for row in dict.fromkeys(rows)).encode()
