"""What a complete checkpoint is: files, commit, verification, choice, retention (C8).

    checkpoints/step-000200/manifest.json         what is stored where, with hashes; itself hashed
    checkpoints/step-000200/rank-00000.safetensors  slices [offset, offset + length) of named states
    checkpoints/latest                            name of the newest one, for people and scripts

Each rank writes the slices it owns; any number of ranks at any ZeRO stage reads the slices it needs. A folder has its
final name only once everything in it is on disk, so a checkpoint is complete or does not exist. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.ledger import LineageHead, Segment
from pretrain.tensorfile import write_tensors
from shards.errors import UserError
from shards.storage import write_atomic

FORMAT_VERSION = 1
NAME = "step-{:06d}"


class BrokenCheckpoint(Exception):
    """A folder that looks like a checkpoint and is none; the text names the file and what is wrong with it."""


@dataclass(frozen=True)
class SliceEntry:
    """Where elements [offset, offset + length) of a flattened state are stored."""

    offset: int
    length: int
    file: str
    key: str


@dataclass(frozen=True)
class Facts:
    """What a checkpoint knows besides tensors."""

    step: int
    """Optimizer steps of the run that are in it."""
    optimizer_steps: int
    attempt: int
    cursor: dict[str, Any]
    """State of the loader: where the data goes on."""
    config: dict[str, Any]
    shapes: dict[str, list[int]]
    """Full shape of every parameter, in the model's order."""
    versions: dict[str, str]
    changes: list[str]
    """What `--change` altered on the way, newest last."""


# ------------------------------------------------------------------------------------------------ writing


def staging_folder(run_dir: Path, step: int, attempt: int, number: int = 0) -> Path:
    """Where a save is put together. Attempt and number of the save are in its name: no two saves share a folder."""
    return run_dir / "checkpoints" / f"{NAME.format(step)}.{attempt:04d}.{number}.tmp"


def write_part(
    staging: Path, rank: int, slices: Iterable[tuple[str, str, int, Tensor]], segments: Sequence[Segment] = ()
) -> int:
    """One rank's share: its slices (name, state, offset, flat fp32 values in CPU memory) and the ledger segments it
    sealed since the last commit. Returns the bytes written; raises OSError where the disk refuses.
    """
    staging.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    entries: list[list[Any]] = []
    name = f"rank-{rank:05d}.safetensors"
    for parameter, state, offset, values_K in slices:
        key = f"{parameter}|{state}|{offset}"
        tensors[key] = values_K
        entries.append([parameter, state, offset, values_K.numel(), key])
    num_bytes, sha256 = write_tensors(staging / name, tensors)
    part = {
        "file": name,
        "bytes": num_bytes,
        "sha256": sha256,
        "slices": entries,
        "segments": [asdict(segment) for segment in segments],
    }
    write_atomic(_part(staging, rank), json.dumps(part).encode())
    return num_bytes


def _part(staging: Path, rank: int) -> Path:
    return staging / f"part-{rank:05d}.json"


def has_part(staging: Path, rank: int) -> bool:
    """Whether a rank has written its share, all of it on disk."""
    return _part(staging, rank).exists()


def read_parts(staging: Path, num_ranks: int) -> tuple[list[dict[str, Any]], list[Segment]]:
    """What the ranks wrote, once all of them have; rank 0 only."""
    parts = [json.loads(_part(staging, rank).read_text()) for rank in range(num_ranks)]
    return parts, [Segment(**segment) for part in parts for segment in part["segments"]]


def stage(staging: Path, facts: Facts, parts: Sequence[Mapping[str, Any]], lineage: LineageHead) -> None:
    """Write the manifest: after this the staged folder is a whole checkpoint but for its name. Rank 0 only."""
    slices: dict[str, dict[str, list[list[Any]]]] = {}
    for part in parts:
        for parameter, state, offset, length, key in part["slices"]:
            slices.setdefault(parameter, {}).setdefault(state, []).append([offset, length, part["file"], key])
    _check_cover(slices, facts.shapes)
    manifest: dict[str, Any] = {
        "format": FORMAT_VERSION,
        **asdict(facts),
        "lineage": asdict(lineage),
        "files": {part["file"]: {"bytes": part["bytes"], "sha256": part["sha256"]} for part in parts},
        "slices": slices,
    }
    manifest["sha256"] = _manifest_hash(manifest)
    for rank in range(len(parts)):
        _part(staging, rank).unlink()
    write_atomic(staging / "manifest.json", json.dumps(manifest).encode())


def publish(staging: Path, step: int) -> Path:
    """The commit: rename, then pointer. Rank 0 only."""
    folder = staging.parent / NAME.format(step)
    if folder.exists():  # a broken one: a whole one would have been resumed from
        discard(folder)
    staging.rename(folder)
    _fsync(folder.parent)
    write_atomic(folder.parent / "latest", f"{folder.name}\n".encode())
    return folder


def kept_steps(steps: Sequence[int], count: int, every_steps: int) -> list[int]:
    """Which checkpoints are kept, newest first: the newest `count`, and for ever the first one at or after each
    multiple of `every_steps` (0: none), since a save may begin some steps late.
    """
    oldest_first = sorted(steps)
    for_ever = {
        step
        for before, step in itertools.pairwise([0, *oldest_first])
        if every_steps and step // every_steps > before // every_steps
    }
    return [step for step in reversed(oldest_first) if step in (*oldest_first[-count:], *for_ever)]


def keep_newest(
    run_dir: Path, count: int, step: int, attempt: int, every_steps: int = 0, pinned: Collection[int] = ()
) -> None:
    """After the commit of `step`: delete all but `kept_steps` and `pinned`, and what older saves left staged.

    A checkpoint of a later step was found broken at the start, else the run would have gone on from it: it does not
    count, and goes.
    """
    folders = candidates(run_dir)
    kept = kept_steps([s for folder in folders if (s := step_of(folder)) <= step], count, every_steps)
    for folder in folders:
        if step_of(folder) not in (*kept, *pinned):
            discard(folder)
    for leftover in (run_dir / "checkpoints").glob("*.tmp"):
        owner = leftover.name.split(".")[1]
        if not owner.isdigit() or int(owner) <= attempt:
            shutil.rmtree(leftover, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a checkpoint. Rename first: never a moment in which a half-deleted folder bears a whole one's name."""
    doomed = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def step_of(folder: Path) -> int:
    """Step of a checkpoint folder, from its name."""
    return int(folder.name.removeprefix("step-"))


def _check_cover(slices: Mapping[str, Mapping[str, list[list[Any]]]], shapes: Mapping[str, Sequence[int]]) -> None:
    """Every state of every parameter is stored whole and once: else ranks disagreed, which is a bug, not a save."""
    missing = set(shapes) ^ set(slices)
    assert not missing, f"parameters without slices, or slices without parameter: {sorted(missing)}"
    for name, states in slices.items():
        numel = 1
        for extent in shapes[name]:
            numel *= extent
        for state, entries in states.items():
            end = 0
            for offset, length, _, _ in sorted(entries, key=lambda entry: entry[0]):
                assert offset == end, f"{name} {state}: gap or overlap at element {end}"
                end += length
            assert end == numel, f"{name} {state}: {end} of {numel} elements"


# ------------------------------------------------------------------------------------------------ reading


class Checkpoint:
    """An opened checkpoint folder. Opening checks the manifest; `broken_files` checks the tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = cast(dict[str, Any], json.loads((folder / "manifest.json").read_bytes()))
            stored = manifest.pop("sha256")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise BrokenCheckpoint(f"{folder / 'manifest.json'} cannot be read: {error}") from error
        if stored != _manifest_hash(manifest):
            raise BrokenCheckpoint(f"{folder / 'manifest.json'} does not match its own hash")
        if manifest["format"] != FORMAT_VERSION:
            raise UserError(
                f"{folder} has checkpoint format {manifest['format']}; this version reads {FORMAT_VERSION}: "
                "use the tubelet version that wrote it"
            )
        self.facts = Facts(**{name: manifest[name] for name in Facts.__dataclass_fields__})
        self.lineage = LineageHead(**manifest["lineage"])
        self.files: dict[str, dict[str, Any]] = manifest["files"]
        self._slices = {
            (name, state): [SliceEntry(*entry) for entry in entries]
            for name, states in manifest["slices"].items()
            for state, entries in states.items()
        }
        self._open: dict[str, Any] = {}
        stored_in = {entry.file for entries in self._slices.values() for entry in entries}
        if any(Path(name).name != name for name in self.files) or not stored_in <= self.files.keys():
            raise BrokenCheckpoint(f"{folder / 'manifest.json'} names files outside its folder")

    def broken_files(self, names: Iterable[str]) -> list[str]:
        """Which of these files are missing or not what was written, with the reason."""
        problems: list[str] = []
        for name in names:
            path, expected = self.folder / name, self.files[name]
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif path.stat().st_size != expected["bytes"]:
                problems.append(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
            elif file_sha256(path) != expected["sha256"]:
                problems.append(f"{path} does not match its hash")
        return problems

    def has(self, name: str, state: str) -> bool:
        """Whether a state of a parameter is stored."""
        return (name, state) in self._slices

    def read(self, name: str, state: str, offset: int, length: int) -> Tensor:
        """Elements [offset, offset + length) of a flattened state: fp32, one dimension. Reads only what it needs."""
        values_K = torch.empty(length)
        read = 0
        for entry in self._slices.get((name, state), ()):
            begin, end = max(offset, entry.offset), min(offset + length, entry.offset + entry.length)
            if begin < end:
                stored = self._file(entry.file).get_slice(entry.key)
                values_K[begin - offset : end - offset] = stored[begin - entry.offset : end - entry.offset]
                read += end - begin
        if read != length:
            raise BrokenCheckpoint(f"{self.folder} holds {read} of {length} elements of {name} {state}")
        return values_K

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, "pt")
            except (OSError, SafetensorError) as error:
                raise BrokenCheckpoint(f"{self.folder / name} cannot be read: {error}") from error
        return self._open[name]


def candidates(run_dir: Path) -> list[Path]:
    """Folders with a checkpoint's name, newest step first."""
    folders = [f for f in (run_dir / "checkpoints").glob("step-*") if f.name.removeprefix("step-").isdigit()]
    return sorted(folders, key=step_of, reverse=True)


def newest(run_dir: Path, at_most: int | None = None) -> Checkpoint | None:
    """The newest whole checkpoint (of step `at_most` or earlier), verified; None where the run has none."""
    broken: list[str] = []
    found = [f for f in candidates(run_dir) if at_most is None or step_of(f) <= at_most]
    for folder in found:
        try:
            checkpoint = Checkpoint(folder)
            problems = checkpoint.broken_files(checkpoint.files)
        except BrokenCheckpoint as error:
            problems = [str(error)]
        else:
            if not problems:
                return checkpoint
        broken += problems
    if broken:
        raise none_whole(run_dir, broken)
    return None


def none_whole(run_dir: Path, problems: Sequence[str]) -> UserError:
    """A run that has checkpoints never starts from zero by itself."""
    listed = "\n  ".join(problems)
    return UserError(
        f"run.dir is {run_dir}; it has checkpoints and none of them is whole:\n  {listed}\n"
        "restore one of these files; or, with checkpoint.mirror, move its folder checkpoints/ away, and it is filled "
        "from there; or start anew in another folder: run.dir=NEW"
    )


def load_parameters(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole fp32 parameters by name, and the config, of a run folder's newest checkpoint or of one checkpoint folder.

    Needs neither DeepSpeed nor a process group.
    """
    if (path / "manifest.json").is_file():
        try:
            checkpoint = Checkpoint(path)
            problems = checkpoint.broken_files(checkpoint.files)
        except BrokenCheckpoint as error:
            problems = [str(error)]
            checkpoint = None
        if problems or checkpoint is None:
            raise UserError(f"checkpoint {path} is broken: {problems[0]}; use another one of the same run")
    else:
        checkpoint = newest(path)
        if checkpoint is None:
            raise UserError(f"{path} has no checkpoint; give a run folder whose training has saved at least once")
    tensors: dict[str, Tensor] = {}
    for name, shape in checkpoint.facts.shapes.items():
        if not checkpoint.has(name, "fp32"):  # a buffer
            continue
        numel = int(torch.Size(shape).numel())
        try:
            tensors[name] = checkpoint.read(name, "fp32", 0, numel).reshape(shape)
        except BrokenCheckpoint as error:
            raise UserError(f"checkpoint {path} is broken: {error}; use another one of the same run") from error
    return tensors, checkpoint.facts.config


def file_sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
