"""Which run this is: a random word, made by its first start, carried along wherever the run folder goes."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from shards.errors import UserError
from shards.storage import fsync_folder

NAME = "run_id"


def run_id(run_dir: Path) -> str:
    """The id in RUN/run_id. The first caller makes it; of several at the same time one wins, and all get its id.

    Raises OSError where the folder cannot be written.
    """
    path = run_dir / NAME
    if not path.exists():
        _create(path)
    found = known_run_id(run_dir)
    if found is None:
        raise UserError(
            f"{path} is empty; it must hold the id of the run: write the one that checkpoint.mirror's object `owner` "
            "names into it, or delete it if the run has no mirror"
        )
    return found


def known_run_id(run_dir: Path) -> str | None:
    """The id, None where no start has made one yet."""
    try:
        return (run_dir / NAME).read_text().strip() or None
    except FileNotFoundError:
        return None


def _create(path: Path) -> None:
    """Filled first, then linked: nobody ever sees it empty, and nobody's is replaced."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{NAME}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x") as file:
            file.write(secrets.token_hex(8) + "\n")
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(temporary)
    except FileExistsError:
        return
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)
