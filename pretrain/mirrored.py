"""What lies in a mirror: names, and the small objects that say of themselves whether they are whole.

    owner                                   the run it belongs to, and the newest attempt that writes to it
    latest                                  the checkpoint to restore: written last
    checkpoints/step-000200-a0003-HASH/     one folder per checkpoint, named after its manifest: never written over
        rank-00000.safetensors …  run.json  manifest.json (after all others: makes it a checkpoint)
    ledger/                                 segments and lineage files, each sent once

run.json holds the small files of the run folder as they were then: config.yaml, run_id, attempts/, journal/ (whole
lines only). They grow between checkpoints; as one object per checkpoint they always fit to it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from pretrain.identity import NAME as RUN_ID
from shards.errors import UserError

FORMAT_VERSION = 1
OWNER, POINTER, RUN_FILES, MANIFEST = "owner", "latest", "run.json", "manifest.json"
CONFIG = "config.yaml"
CHECKPOINTS, LEDGER = "checkpoints", "ledger"
_SMALL_FOLDERS = {"attempts": "[0-9]*.json", "journal": "*.jsonl"}
_FOLDER = re.compile(r"step-(\d{6,})-a(\d{4,})-([0-9a-f]{16})")


@dataclass(frozen=True, order=True)
class Place:
    """A checkpoint's folder in the mirror. In order: a newer attempt stands on what it found, so it comes after."""

    attempt: int
    """The one that wrote the checkpoint."""
    step: int
    digest: str
    """Of its manifest.json, the first 16 digits."""

    @staticmethod
    def of(attempt: int, step: int, manifest: bytes) -> Place:
        """Where the checkpoint with this manifest goes."""
        return Place(attempt, step, hashlib.sha256(manifest).hexdigest()[:16])

    @staticmethod
    def named(folder: str) -> Place | None:
        """The place with that folder name; None for a name that is none of ours."""
        match = _FOLDER.fullmatch(folder)
        return None if match is None else Place(int(match[2]), int(match[1]), match[3])

    @property
    def folder(self) -> str:
        """Below the mirror."""
        return f"{CHECKPOINTS}/step-{self.step:06d}-a{self.attempt:04d}-{self.digest}"

    def holds(self, manifest: bytes) -> bool:
        """Whether this is the manifest it is named after."""
        return hashlib.sha256(manifest).hexdigest()[:16] == self.digest


@dataclass(frozen=True)
class Pointer:
    """Content of `latest`."""

    step: int
    attempt: int
    folder: str
    manifest_sha256: str

    @property
    def place(self) -> Place:
        """Where it points to."""
        return Place(self.attempt, self.step, self.manifest_sha256[:16])


@dataclass(frozen=True)
class Owner:
    """Content of `owner`."""

    run: str
    attempt: int
    started: str
    """Text of RUN/attempts/NNNN.json: two starts with one number on two disks differ in it."""


def seal(fields: Mapping[str, Any]) -> bytes:
    """A small object with its own hash in it."""
    content = {"format": FORMAT_VERSION, **fields}
    return json.dumps({**content, "sha256": _hash(content)}, indent=1).encode()  # no newline: each byte counts


def unseal(url: str, data: bytes) -> dict[str, Any]:
    """Fields of such an object. Raises ValueError if it is damaged, UserError if another version wrote it."""
    content: Any = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    fields = cast("dict[str, Any]", content)
    if fields.pop("sha256", None) != _hash(fields):
        raise ValueError("does not match its own hash")
    version = fields.pop("format")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{url} has mirror format {version}; this version reads {FORMAT_VERSION}: use the tubelet version that "
            "wrote it"
        )
    return fields


def pointer_to(place: Place, manifest: bytes) -> bytes:
    """Content of `latest`."""
    sha256 = hashlib.sha256(manifest).hexdigest()
    return seal(asdict(Pointer(place.step, place.attempt, place.folder, sha256)))


def pack_run_files(run_dir: Path) -> bytes:
    """run.json of the run folder as it is now."""
    paths = [run_dir / CONFIG, run_dir / RUN_ID]
    for folder, pattern in _SMALL_FOLDERS.items():
        paths += sorted((run_dir / folder).glob(pattern))
    files: dict[str, str] = {}
    for path in paths:
        if path.is_file():
            text = path.read_text()
            # A line that is being appended right now is no decision yet.
            text = text[: text.rfind("\n") + 1] if path.suffix == ".jsonl" else text
            files[path.relative_to(run_dir).as_posix()] = text
    return seal({"files": files})


def unpack_run_files(url: str, data: bytes) -> dict[str, str]:
    """Texts by name, relative to the run folder. Raises ValueError if it is damaged or names other files."""
    files = cast("dict[str, str]", unseal(url, data)["files"])
    for name in files:
        path = PurePosixPath(name)
        is_small = len(path.parts) == 2 and path.parts[0] in _SMALL_FOLDERS and not path.name.startswith(".")
        if str(path) != name or not (is_small or name in (CONFIG, RUN_ID)):
            raise ValueError(f"it names {name!r}, which is none of its files")
    return files


def _hash(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
