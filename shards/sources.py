"""What to pack: a folder of videos, or a list of them, becomes rows of (file, label, split, group)."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from shards.errors import UserError

VIDEO_SUFFIXES = (
    *(".3g2", ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg"),
    *(".mts", ".ogg", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
COLUMNS = ("path", "label", "split", "group")
SPLIT_NAME = re.compile(r"[A-Za-z0-9_]{1,40}")


@dataclass(frozen=True)
class Source:
    """One file to pack."""

    path: Path
    name: str
    """Relative, with forward slashes: what is stored, reported, and by default the group."""
    label: str | None
    split: str | None
    group: str


@dataclass(frozen=True)
class Listing:
    """All files to pack, sorted by name, and what was left aside while looking."""

    sources: tuple[Source, ...]
    num_ignored_files: int = 0
    ignored_columns: tuple[str, ...] = ()


def list_sources(src: Path, exclude: tuple[Path, ...] = ()) -> Listing:
    """The files of a folder, of a CSV or JSONL list, or one video. Raises UserError if there is nothing to pack."""
    if src.is_dir():
        listing = _list_folder(src, exclude)
        if not listing.sources:
            raise UserError(
                f"{src} holds no video file ({listing.num_ignored_files} other files); it must hold files named "
                f"like {', '.join(VIDEO_SUFFIXES[:12])} ...: name the folder that does"
            )
    elif src.suffix.lower() in (".csv", ".jsonl") and src.is_file():
        listing = _read_list(src)
        if not listing.sources:
            raise UserError(f"{src} lists no file; it must have at least one row below its header: add some")
    elif src.suffix.lower() in VIDEO_SUFFIXES and src.is_file():
        listing = Listing((Source(src, src.name, None, None, src.name),))
    elif src.exists():
        raise UserError(f"{src} is not packed; it must be a folder, a .csv or .jsonl list, or a video: name one")
    else:
        raise UserError(f"{src} does not exist; check the path")
    return listing


def _list_folder(root: Path, exclude: tuple[Path, ...]) -> Listing:
    names: list[PurePosixPath] = []
    num_ignored = 0
    for path in _walk(root, {folder.resolve() for folder in exclude}):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            names.append(PurePosixPath(path.relative_to(root).as_posix()))
        else:
            num_ignored += 1
    # `train` may as well be a class (of vehicles): only where every video lies under such a name are these splits.
    is_split = all(len(name.parts) > 1 and name.parts[0].lower() in SPLIT_FOLDERS for name in names)
    sources: list[Source] = []
    for name in sorted(names):
        folders = name.parts[1:-1] if is_split else name.parts[:-1]
        split = SPLIT_FOLDERS[name.parts[0].lower()] if is_split else None
        label = folders[0] if folders else None
        sources.append(Source(root / name, str(name), label, split, str(name)))
    return Listing(tuple(sources), num_ignored)


def _walk(root: Path, exclude: set[Path]) -> Iterator[Path]:
    """Regular files below a folder; links are followed once, hidden names passed over."""
    seen: set[Path] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in seen or real in exclude:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (
            path for name in sorted(files) if not name.startswith(".") and (path := Path(folder, name)).is_file()
        )


def _read_list(path: Path) -> Listing:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); it must be a UTF-8 text file") from error
    rows = list(_csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text))
    outside = [Path(row["path"]) for _, row in rows if not _is_inside(row["path"])]
    roots = [(path.parent / file).resolve().parent for file in outside]
    common = Path(os.path.commonpath(roots)) if roots else path.parent
    sources: dict[str, Source] = {}
    columns: set[str] = set()
    for line, row in rows:
        columns.update(row)
        source = _row_source(path, line, row, common)
        if source.name in sources:
            raise UserError(f"{path} line {line} lists {row['path']} again; every file must be listed once: remove one")
        sources[source.name] = source
    ignored = tuple(sorted(columns.difference(COLUMNS)))
    return Listing(tuple(sources[name] for name in sorted(sources)), 0, ignored)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if "path" not in (reader.fieldnames or []):
        raise UserError(
            f"{path} has the columns {reader.fieldnames or []}; it must have a header with the column path "
            "(and may have label, split, group): name them so"
        )
    for row in reader:
        if not (row["path"] or "").strip():
            raise UserError(f"{path} line {reader.line_num} has no path; every row must name a file: fill it in")
        yield reader.line_num, {str(name): value or "" for name, value in row.items() if name}


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    for line, part in enumerate(text.splitlines(), 1):
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except ValueError as error:
            raise UserError(
                f"{path} line {line} is no JSON ({error}); every line must be one object: mend it"
            ) from error
        row = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
        if not isinstance(row.get("path"), str) or not row["path"].strip():
            raise UserError(f'{path} line {line} has no path; it must look like {{"path": "a.mp4"}}: mend it')
        yield line, {name: "" if field is None else str(field) for name, field in row.items()}


def _row_source(listing: Path, line: int, row: dict[str, str], common: Path) -> Source:
    text = row["path"].strip()
    if "://" in text:
        raise UserError(f"{listing} line {line} names {text}; files must be local to be packed: copy or mount them")
    path = listing.parent / text
    if _is_inside(text):
        name = str(PurePosixPath(os.path.normpath(text)))
    else:
        name = path.resolve().relative_to(common).as_posix()
    split = row.get("split", "").strip() or None
    if split is not None and not SPLIT_NAME.fullmatch(split):
        raise UserError(
            f"{listing} line {line} has the split {split!r}; it must be a word of letters, digits and _: rename it"
        )
    group = row.get("group", "").strip() or name
    return Source(path, name, row.get("label", "").strip() or None, split, group)


def _is_inside(text: str) -> bool:
    """Whether a listed path stays below the folder of its list."""
    normal = os.path.normpath(text.strip())
    return not os.path.isabs(normal) and not normal.startswith("..")
