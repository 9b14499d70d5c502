"""Where a packed folder goes once it is whole: renamed into place on a disk, or sent to a URL, manifest last.

Either way it is there whole or not at all, and it never overwrites. Sending is resumed after a kill: what was sent is
noted with the tag that the store gave it, and passed over where the store still has just that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards import storage
from shards.errors import UserError
from shards.layout import CONTENT_NAME, MANIFEST_NAME, PACKED_NAME, REJECTED_NAME, Manifest
from shards.manifest import load_manifest
from shards.staging import PackProgress, Report, printable

PACKAGES = ("shards", "pretrain", "launch")
UPLOADS = 8
"""Files sent at the same time."""
BESIDES = (CONTENT_NAME, REJECTED_NAME, PACKED_NAME)
UPLOADED_NAME = "uploaded.jsonl"


@dataclass(frozen=True)
class Destination:
    """One packed folder to be made. `work` is the local folder in which it is made."""

    url: str
    work: Path

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return storage.local_path(self.url) is not None

    @property
    def place(self) -> Path:
        """The folder itself, where it is local."""
        path = storage.local_path(self.url)
        assert path is not None
        return path.resolve()  # a link is followed, so that the last rename stays on one file system

    def manifest(self) -> Manifest | None:
        """Of what is complete there, None if nothing is."""
        return load_manifest(self.url) if storage.exists(storage.join(self.url, MANIFEST_NAME)) else None

    def packed(self) -> dict[str, Any] | None:
        """How what is complete there was packed, None if that is not known."""
        url = storage.join(self.url, PACKED_NAME)
        return json.loads(storage.read_bytes(url)) if storage.exists(url) else None

    def check_free(self) -> None:
        """Raise UserError if there is something already; what an earlier try sent before it was killed is fine.

        A manifest is not: that data set is whole, and another than the one to be made.
        """
        if self.is_local:
            taken = self.place.is_dir() and any(self.place.iterdir())
        else:
            ours = {row["name"] for row in self._notes()} - {MANIFEST_NAME}
            taken = any(file.name not in ours for file in storage.list_files(self.url))
        if taken:
            raise UserError(
                f"{self.url} exists and is not empty; packing never overwrites: choose another folder or remove that "
                "one (to add to a data set: --append)"
            )

    def take(self, out: Path, manifest: Manifest, report: Report) -> None:
        """Put a finished folder in its place. Raises OSError where that is impossible."""
        if self.is_local:
            out.rename(self.place)
            storage.fsync_folder(self.place.parent)
        else:
            self._send(out, manifest, report)

    def _send(self, out: Path, manifest: Manifest, report: Report) -> None:
        """Tars first, then what describes them, the manifest last: it is what makes a data set."""
        hashes = {shard.name: shard.sha256 for split in manifest.splits.values() for shard in split.shards}
        sizes = {name: (out / name).stat().st_size for name in hashes}
        there = {file.name: (file.num_bytes, file.tag) for file in storage.list_files(self.url)}
        sent = self._sent()
        todo = [name for name in hashes if sent.get(name) != (hashes[name], *there.get(name, (-1, "")))]
        done_bytes = sum(sizes.values()) - sum(sizes[name] for name in todo)
        num_done = len(hashes) - len(todo)
        num_samples = sum(split.num_samples for split in manifest.splits.values())

        def tell() -> None:
            report(PackProgress("upload", num_done, len(hashes), num_samples, 0, done_bytes, sum(sizes.values())))

        others = (*(split.index for split in manifest.splits.values()), *BESIDES, MANIFEST_NAME)
        self._note(*({"name": name} for name in (*todo, *others)))
        tell()
        pool = ThreadPoolExecutor(UPLOADS, thread_name_prefix="upload")
        try:
            for future in as_completed({pool.submit(self._send_one, out, name, hashes[name]): name for name in todo}):
                done_bytes += sizes[future.result()]
                num_done += 1
                tell()
        finally:
            pool.shutdown(cancel_futures=True)
        for name in others:
            storage.upload(out / name, storage.join(self.url, name))
        for name in {row["name"] for row in self._notes()}.difference(hashes, others):
            storage.remove(storage.join(self.url, name))  # sent before the files or options were changed

    def _send_one(self, out: Path, name: str, sha256: str) -> str:
        url = storage.join(self.url, name)
        storage.upload(out / name, url)
        num_bytes, tag = storage.size_and_tag(url)
        self._note({"name": name, "sha256": sha256, "num_bytes": num_bytes, "tag": tag})
        return name

    def _note(self, *rows: dict[str, Any]) -> None:
        """What is about to be sent (its name), and what was (all of it)."""
        with (self.work / UPLOADED_NAME).open("a") as file:  # one write: whole lines also from several threads
            file.write("".join(json.dumps({"to": self.url, **row}) + "\n" for row in rows))

    def _notes(self) -> list[dict[str, Any]]:
        """Of what was sent here: another URL that ends with the same name has the same working folder."""
        return [row for row in _rows(self.work / UPLOADED_NAME) if row["to"] == self.url]

    def _sent(self) -> dict[str, tuple[str, int, str]]:
        """(sha256, size, tag) by name, of what was sent from this working folder."""
        rows = [row for row in self._notes() if "tag" in row]
        return {row["name"]: (row["sha256"], row["num_bytes"], row["tag"]) for row in rows}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue  # half a line, cut by a kill: that file is sent again


def destination(dst: str, work: Path | None, part: str) -> Destination:
    """Where `dst`, or one part of it, is put, and where it is made. Raises UserError for a place that is of no use."""
    path = storage.local_path(dst)
    if path is None:
        name = "-".join(filter(None, [dst.rstrip("/").rpartition("/")[2], part]))
        folder = (work or Path.cwd()) / f"{name}.partial"
        return Destination(storage.join(dst, f"parts/{part}") if part else dst.rstrip("/"), folder.absolute())
    if work is not None:
        raise UserError(f"--work is {work}; it is for URLs only, a folder is made beside its place: leave it out")
    _check_local(path)
    place = path.resolve()
    place = place / "parts" / part if part else place
    return Destination(str(path / "parts" / part if part else path), place.with_name(place.name + ".partial"))


def _check_local(dst: Path) -> None:
    real = dst.resolve()
    if not real.name or real == Path.cwd():
        raise UserError(f"{dst} cannot be packed into; the destination must be a new folder: name one, like data/NAME")
    if printable(str(real)) != str(real):
        raise UserError(
            f"{printable(str(dst))} is not a name in UTF-8; the destination must have one, as configs name it: "
            "choose another"
        )
    root = Path(__file__).resolve().parent.parent
    for package in PACKAGES:
        if real == root / package or (root / package) in real.parents:
            raise UserError(
                f"{dst} lies inside the code package {package}/; packed data must lie elsewhere: use data/NAME"
            )
    if dst.exists() and not dst.is_dir():
        raise UserError(f"{dst} is a file; the destination must be a new folder: choose another name")
