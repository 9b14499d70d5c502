"""Attempts: every start of a run takes the next number, and says at its end how it went.

`attempts/0003.json` is created exclusively, so two starts never share a number; whoever holds an older number than the
newest stops before it commits, writes or deletes anything (C8). `attempts/0003.outcome.json` is what scripts decide
from (C11): exit codes of launchers lie.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from pretrain.redact import without_secrets
from shards.errors import UserError
from shards.storage import write_atomic

Kind = Literal["finished", "stopped", "failed", "rolled_back", "person"]

EXIT_CODES: dict[Kind, int] = {"finished": 0, "stopped": 75, "failed": 75, "rolled_back": 75, "person": 93}
"""75: try again, the run goes on by itself. 93: starting again would not help, a person is needed."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: at which step, and why."""

    outcome: Kind
    step: int
    reason: str
    blamed: tuple[int, ...] = ()
    """Ranks that a watchdog found at fault."""

    @property
    def exit_code(self) -> int:
        """What the process returns."""
        return EXIT_CODES[self.outcome]


class Superseded(UserError):
    """A newer attempt works on the same run."""


def newest_attempt(run_dir: Path) -> int:
    """Number of the newest attempt, 0 where there is none."""
    return max(
        (int(path.stem) for path in (run_dir / "attempts").glob("[0-9]*.json") if path.stem.isdigit()), default=0
    )


def start_token() -> str:
    """What tells this start from every other one (TUBELET_START is PID:TOKEN); empty where nobody set it."""
    return os.environ.get("TUBELET_START", "").partition(":")[2]


def attempt_of(run_dir: Path, token: str, since: int) -> int | None:
    """The newest attempt after number `since` that the start with this token took; None where it took none."""
    for number in range(newest_attempt(run_dir), since, -1):
        try:
            taken_by = json.loads((run_dir / "attempts" / f"{number:04d}.json").read_text()).get("start", "")
        except (OSError, ValueError, AttributeError):
            continue
        if taken_by == token:
            return number
    return None


def record_refusal(run_dir: Path, reason: str) -> None:
    """A start that was refused before it took a number says why, under its token: scripts decide from that (C11).

    Every rank writes it: the first one to end has the others terminated. Nothing of the run is touched. Where nobody
    set a token nobody asks, and nothing is written.
    """
    if start_token():
        (run_dir / "attempts").mkdir(parents=True, exist_ok=True)
        refusal = {"reason": without_secrets(reason), "time": time.time()}
        write_atomic(run_dir / "attempts" / f"refused-{start_token()}.json", json.dumps(refusal).encode() + b"\n")


def read_refusal(run_dir: Path, token: str) -> Outcome | None:
    """Why the start with this token was refused; None where it was not."""
    try:
        reason = json.loads((run_dir / "attempts" / f"refused-{token}.json").read_text())["reason"]
    except (OSError, ValueError, KeyError):
        return None
    return Outcome("person", 0, str(reason))


def node_name() -> str:
    """Name of the node this rank runs on: Slurm's, which knows virtual nodes apart, else the host's."""
    return os.environ.get("TUBELET_NODE") or socket.gethostname()


def take_attempt(run_dir: Path, nodes: Sequence[str]) -> int:
    """Take the next attempt number by exclusive create. `nodes`: name of the node of each rank."""
    folder = run_dir / "attempts"
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        number = newest_attempt(run_dir) + 1
        try:
            descriptor = os.open(folder / f"{number:04d}.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            continue
        start: dict[str, Any] = {"attempt": number, "time": time.time(), "world_size": len(nodes)}
        start |= {"start": start_token(), "nodes": list(nodes)}
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(start) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return number


def refuse_superseded(run_dir: Path, attempt: int) -> None:
    """Raise `Superseded` if a newer attempt exists."""
    newest = newest_attempt(run_dir)
    if newest > attempt:
        raise Superseded(
            f"attempt {attempt} of {run_dir} found attempt {newest} at work; one run has one live attempt: "
            f"this one stops, nothing of the newer one was touched: see `tubelet status {run_dir}`"
        )


def record_outcome(run_dir: Path, attempt: int, outcome: Outcome) -> bool:
    """Write how the attempt ended. The first rank to say so is believed (True): the others die of its death."""
    try:
        with (run_dir / "attempts" / f"{attempt:04d}.outcome.json").open("x") as file:
            file.write(json.dumps(without_secrets({**asdict(outcome), "time": time.time()})) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def read_outcome(run_dir: Path, attempt: int | None = None) -> Outcome | None:
    """Outcome of an attempt (default: the newest); None where it died without a word."""
    number = newest_attempt(run_dir) if attempt is None else attempt
    try:
        fields = cast(dict[str, Any], json.loads((run_dir / "attempts" / f"{number:04d}.outcome.json").read_text()))
        blamed = tuple(int(rank) for rank in fields.get("blamed", ()))
        return Outcome(fields["outcome"], int(fields["step"]), str(fields["reason"]), blamed)
    except (OSError, ValueError, KeyError):
        return None
