"""The code and the config of a job, kept in RUN/code/NNN: what is edited while it waits does not change it.

RUN/code/001/{shards,pretrain,launch,configs,slurm}/   tracked files as they are; all files where git does not know
RUN/code/001/config.yaml                               the config with its overrides
RUN/code/001/code.json                                 revision, whether anything was not committed; the job
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain.config import Config
from pretrain.redact import without_secrets
from shards.errors import UserError
from shards.storage import write_atomic

FOLDERS = ("shards", "pretrain", "launch", "configs", "slurm")
ROOT = Path(__file__).resolve().parents[1]
_LEFT_OUT = ("__pycache__", ".pyc")


@dataclass(frozen=True)
class Revision:
    """What git says about the code; None outside of a checkout."""

    commit: str | None
    is_dirty: bool | None

    def __str__(self) -> str:
        if self.commit is None:
            return "not a git checkout"
        return self.commit[:12] + (" with changes that are not committed" if self.is_dirty else "")


def settings_of(config: Config) -> dict[str, Any]:
    """What a config sets, file and overrides together, without the defaults: it reads back as the same config.

    Raises `UserError` where a URL carries credentials: everybody who may see the run folder could read them (C14).
    """
    settings: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    if without_secrets(settings) != settings:
        raise UserError(
            "a URL of the config has user info or a query; it must be bare, because the run folder keeps it: leave "
            "credentials to the variables and files of AWS, which the job inherits"
        )
    return settings


def revision(root: Path = ROOT) -> Revision:
    """Commit and cleanliness of the folders that are copied."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None or not _tracked(root):
        return Revision(None, None)
    return Revision(commit.strip(), bool(_git(root, "status", "--porcelain", "--", *FOLDERS)))


def take_snapshot(run_dir: Path, config: Config, *, root: Path = ROOT) -> Path:
    """Copy code and config into the next free RUN/code/NNN; returns that folder."""
    folder = _next_folder(run_dir / "code")
    files = _tracked(root) or _all_files(root)
    for file in files:
        if (root / file).is_file():  # a tracked file may have been deleted and not committed
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / file, folder / file)
    write_atomic(folder / "config.yaml", yaml.safe_dump(settings_of(config), sort_keys=False).encode())
    known = revision(root)
    note(folder, {"commit": known.commit, "is_dirty": known.is_dirty, "time": time.time()})
    return folder


def note(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add facts to the snapshot's code.json."""
    file = folder / "code.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    write_atomic(file, json.dumps({**known, **facts}, indent=1).encode() + b"\n")


def _next_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(folder.name) for folder in parent.iterdir() if folder.name.isdigit()), default=0)
    while True:
        number += 1
        try:
            (parent / f"{number:03d}").mkdir()
        except FileExistsError:
            continue
        return parent / f"{number:03d}"


def _tracked(root: Path) -> list[Path]:
    """Files that git tracks there; empty where it is no checkout, or the packages are installed in one and ignored.

    With them modules that nobody has added yet: tracked ones may import them. What else lies about stays behind.
    """
    tracked = _git(root, "ls-files", "-z", "--", *FOLDERS)
    new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *FOLDERS) if tracked else ""
    names = [*(tracked or "").split("\0"), *(name for name in (new or "").split("\0") if name.endswith(".py"))]
    return [Path(name) for name in names if name]


def _all_files(root: Path) -> list[Path]:
    return sorted(
        file.relative_to(root)
        for name in FOLDERS
        for file in (root / name).rglob("*")
        if file.is_file() and not any(part.endswith(_LEFT_OUT) for part in file.relative_to(root).parts)
    )


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
