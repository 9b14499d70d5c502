"""What a start came to: decided from the run folder, never from the exit code of a launcher (contract C11).

Launchers lie: `deepspeed` can exit 0 after losing its child, `srun` returns 143 when one rank asked for another try.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pretrain.attempt import EXIT_CODES, attempt_of, read_outcome, read_refusal

FINISHED = EXIT_CODES["finished"]
TRY_AGAIN = EXIT_CODES["failed"]
PERSON_NEEDED = EXIT_CODES["person"]

ASKED = "attempts/asked"
"""Touched when a person was asked because starts reached no new checkpoint: what was before it counts no more."""


def exit_code(run_dir: Path, *, token: str, since: int, launcher_code: int) -> int:
    """0 finished, 93 a person is needed, 75 try again: the outcome of the attempt that this start took.

    `token` tells it from other starts on the same run: one that another start has superseded needs a person, and must
    not take over again. An attempt without an outcome was killed. A start that took no attempt refused its config,
    found the run finished, or never came up: only then does the launcher's code say something, and its 0 is believed
    only beside a DONE file.
    """
    if read_refusal(run_dir, token) is not None:
        return PERSON_NEEDED
    own = attempt_of(run_dir, token, since)
    if own is not None:
        outcome = read_outcome(run_dir, own)
        return TRY_AGAIN if outcome is None else outcome.exit_code
    if launcher_code == FINISHED and (run_dir / "DONE").exists():
        return FINISHED
    return PERSON_NEEDED if launcher_code == PERSON_NEEDED else TRY_AGAIN


def starts_without_progress(run_dir: Path) -> int:
    """How many starts, with an attempt or before they took one, began after the newest checkpoint was written.

    Those before a person was asked do not count. Raises `OSError` where the run folder cannot be read.
    """
    saved = [*(run_dir / "checkpoints").glob("step-*[0-9]/manifest.json"), run_dir / ASKED]
    started = [file for file in (run_dir / "attempts").glob("*.json") if file.stem.isdigit()]
    unborn = (run_dir / "attempts").glob("unborn-*.json")
    since = max(_write_times(saved), default=0.0)
    return sum(time > since for time in _write_times([*started, *unborn]))


def _write_times(files: Iterable[Path]) -> list[float]:
    """Of those that are still there: rotation deletes checkpoints while we look."""
    found: list[float] = []
    for file in files:
        with suppress(FileNotFoundError):
            found.append(file.stat().st_mtime)
    return found
