"""A second home of a run at a URL: each checkpoint with everything it stands on, so that a lost disk costs no run (C8).

    send     ledger, tensors ─ each proved ─ run.json ─ manifest.json ─ `latest`     killed anywhere: `latest` holds
    keep     of a checkpoint to be deleted the manifest goes first                   half a one is none
    restore  `latest`, else an older one, into a run folder without checkpoints      see pretrain/restore.py

What lies there and under which names: pretrain/mirrored.py. All functions block, may be called from any one thread at
a time, and raise what storage raises: OSError for trouble that may pass, UserError for what a person must mend.

S3 has no lock, and no condition on a write is asked for here (not every store knows one): `owner` and `latest` are
read again right before they are written. Two starts that do so in the same instant on two disks are told apart at the
next send of either, not at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain import checkpoint
from pretrain.attempt import Superseded, newest_attempt, refuse_superseded
from pretrain.checkpoint import BrokenCheckpoint, Checkpoint
from pretrain.identity import known_run_id, run_id
from pretrain.ledger import ROW_DTYPE, LineageHead, walk_lineage
from pretrain.mirrored import (
    CHECKPOINTS,
    LEDGER,
    MANIFEST,
    OWNER,
    POINTER,
    RUN_FILES,
    Owner,
    Place,
    Pointer,
    pack_run_files,
    pointer_to,
    seal,
    unseal,
)
from pretrain.restore import alone, bring, candidates
from pretrain.transfer import SENDS, DamagedObject, Whole, in_parallel, send, stop_if
from pretrain.transfer import Stopped as Stopped
from shards import storage
from shards.errors import UserError
from shards.retry import bare

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MirrorReport:
    """What one `send` sent; what was there already is not counted."""

    num_files: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class _File:
    name: str
    """Below the mirror."""
    path: Path
    whole: Whole


def never() -> bool:
    """Nobody asks to stop."""
    return False


class Mirror:
    """The mirror of one run, as one attempt of it sees it."""

    def __init__(self, url: str, run_dir: Path, attempt: int | None = None) -> None:
        """`attempt`: the number this start took; default: the newest there is in the run folder."""
        path = storage.local_path(url)
        if path is not None and run_dir.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(
                f"checkpoint.mirror is {url}; it must lie outside the run folder {run_dir}: name a place on other disks"
            )
        self.url, self.run_dir = url.rstrip("/"), run_dir
        self.attempt = newest_attempt(run_dir) if attempt is None else attempt
        self._line: dict[LineageHead, tuple[int, int]] = {}
        """Lineage files that are there with all they name: (step, attempt) of the checkpoint of each."""
        self._is_ledger_known = False
        """Nothing is in the mirror's ledger that `_line` does not name: the last send got through."""

    def send(self, step: int, should_stop: Callable[[], bool] = never) -> MirrorReport:
        """Copy the checkpoint of `step` with all that it stands on; `latest` names it at the end.

        Not where `latest` names a later one: one that was left out before may be sent afterwards. Of every object it is
        proved that it is what was sent (pretrain/transfer.py). Raises Stopped once `should_stop` says so between two
        files; OSError, also where the local checkpoint is gone or broken; UserError where the mirror is another run's,
        Superseded where a newer attempt is at work.
        """
        start_s = time.monotonic()
        opened, manifest = self._open(step)
        self._claim()
        place = Place.of(opened.facts.attempt, step, manifest)
        line = dict(self._new_links(opened.lineage))
        files = [*self._ledger_files(line), *self._tensor_files(opened, place)]
        seen = self._seen(place.folder) if self._is_ledger_known else self._seen(place.folder, LEDGER)
        self._is_ledger_known = False

        def send_one(file: _File) -> int:
            is_sent = send(file.path, self._at(file.name), file.whole, seen.get(file.name))
            return file.whole.num_bytes if is_sent else 0

        sent = in_parallel(send_one, files, SENDS, should_stop)
        sent.append(self._put(f"{place.folder}/{RUN_FILES}", pack_run_files(self.run_dir)))
        sent.append(self._put(f"{place.folder}/{MANIFEST}", manifest))
        stop_if(should_stop)
        sent.append(self._point(place, manifest))
        self._line |= {head: (link_step, attempt) for head, (link_step, attempt, _) in line.items()}
        self._is_ledger_known = True
        return MirrorReport(sum(num > 0 for num in sent), sum(sent), time.monotonic() - start_s)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints that are there, newest first.

        Once this process has sent one: without those that the run does not stand on (given up, rolled back).
        """
        latest = self._pointer()
        line = candidates(self._whole(self._places()), None if latest is None else latest.place)
        return [place.step for place in line if self._is_in_line(place)]

    def newest_step(self) -> int | None:
        """Step that `latest` names; None where there is no such object, or a damaged one."""
        latest = self._pointer()
        return None if latest is None else latest.step

    def keep(self, steps: Sequence[int], should_stop: Callable[[], bool] = never) -> None:
        """Delete the checkpoints of all other steps, and those that the run does not stand on.

        Never the one that `latest` names, and nothing where `latest` cannot be read. The ledger stays: all stand on it.
        """
        self._claim()
        latest = self._pointer()
        if latest is None:
            return
        for place, names in self._places().items():
            if place == latest.place or (place.step in steps and self._is_in_line(place)):
                continue
            for name in sorted(names, key=lambda name: name != MANIFEST):
                stop_if(should_stop)
                storage.remove(self._at(f"{place.folder}/{name}"))

    def restore(self, should_stop: Callable[[], bool] = never) -> int | None:
        """Fill a run folder without checkpoints. Returns the step it is at then; None where the mirror is empty.

        A damaged checkpoint is passed over for an older one. Trouble of storage is raised and never a reason to go
        back. Raises UserError where the run folder has checkpoints or is another run's, and where no checkpoint of the
        mirror is whole: a run that has checkpoints never starts from zero by itself.
        """
        if checkpoint.candidates(self.run_dir):
            raise UserError(
                f"run.dir is {self.run_dir}; it has checkpoints, and a restore never overwrites: train on from them, "
                "or move its folder checkpoints/ away first"
            )
        latest = self._pointer()
        line = candidates(self._whole(self._places()), None if latest is None else latest.place)
        if not line:
            return None
        owner = self._owner_to_restore()
        problems: list[str] = []
        with alone(self.run_dir):
            found = checkpoint.candidates(self.run_dir)
            if found:  # another start restored while this one waited
                return checkpoint.step_of(found[0])
            for place in line:
                try:
                    bring(self.url, place, owner, self.run_dir, should_stop)
                except DamagedObject as error:
                    log.warning("the mirrored checkpoint of step %d is not whole: %s", place.step, error)
                    problems.append(str(error))
                else:
                    log.info("restored step %d from %s", place.step, bare(self.url))
                    return place.step
        listed = "\n  ".join(problems)
        raise UserError(
            f"checkpoint.mirror is {bare(self.url)}; it has checkpoints and none of them is whole:\n  {listed}\n"
            "restore one of these objects, or start anew: run.dir=NEW checkpoint.mirror=NEW"
        )

    # ------------------------------------------------------------------------------------------ what is sent

    def _open(self, step: int) -> tuple[Checkpoint, bytes]:
        folder = self.run_dir / CHECKPOINTS / checkpoint.NAME.format(step)
        try:
            manifest = (folder / MANIFEST).read_bytes()
            opened = Checkpoint(folder)
        except BrokenCheckpoint as error:
            raise OSError(f"not mirrored: {error}") from error
        return opened, manifest

    def _new_links(self, head: LineageHead) -> Iterator[tuple[LineageHead, tuple[int, int, list[_File]]]]:
        """Lineage files down to one that this process has sent: (step, attempt, the file itself and its segments)."""
        folder = self.run_dir / LEDGER
        try:
            for at, link in walk_lineage(folder, head):
                if at in self._line:
                    return
                path = folder / at.file
                files = [_File(f"{LEDGER}/{at.file}", path, Whole(path.stat().st_size, at.sha256))]
                for segment in link.segments:
                    if Path(segment.file).name != segment.file:
                        raise ValueError(f"{segment.file!r} is not a plain file name")
                    whole = Whole(segment.num_rows * ROW_DTYPE.itemsize, segment.sha256)
                    files.append(_File(f"{LEDGER}/{segment.file}", folder / segment.file, whole))
                yield at, (link.step, link.attempt, files)
        except ValueError as error:
            raise OSError(f"not mirrored: {folder}/{error}") from error

    @staticmethod
    def _ledger_files(line: dict[LineageHead, tuple[int, int, list[_File]]]) -> Iterator[_File]:
        for _, _, files in line.values():
            yield from files

    @staticmethod
    def _tensor_files(opened: Checkpoint, place: Place) -> Iterator[_File]:
        for name, facts in opened.files.items():
            yield _File(f"{place.folder}/{name}", opened.folder / name, Whole(facts["bytes"], facts["sha256"]))

    # ------------------------------------------------------------------------------------------ what is there

    def _at(self, name: str) -> str:
        return storage.join(self.url, name)

    def _seen(self, *folders: str) -> dict[str, storage.FileFacts]:
        """What these folders hold, by name below the mirror."""
        return {f"{folder}/{file.name}": file for folder in folders for file in storage.list_files(self._at(folder))}

    def _places(self) -> dict[Place, list[str]]:
        """Names of the files of each checkpoint that is there, or was begun."""
        places: dict[Place, list[str]] = {}
        for file in storage.list_files(self._at(CHECKPOINTS)):
            folder, _, name = file.name.partition("/")
            place = Place.named(folder)
            if place is not None:
                places.setdefault(place, []).append(name)
        return places

    @staticmethod
    def _whole(places: dict[Place, list[str]]) -> list[Place]:
        return [place for place, names in places.items() if MANIFEST in names]

    def _is_in_line(self, place: Place) -> bool:
        return not self._line or (place.step, place.attempt) in self._line.values()

    def _put(self, name: str, data: bytes) -> int:
        """Write a small object unless it is there, and read it back. Returns the bytes sent."""
        if self._read(name) == data:
            return 0
        storage.write_bytes(self._at(name), data)
        if self._read(name) != data:
            raise OSError(f"{bare(self._at(name))} is not what was written, though the store took it without a word")
        return len(data)

    def _read(self, name: str) -> bytes | None:
        try:
            return storage.read_bytes(self._at(name))
        except FileNotFoundError:
            return None

    # ------------------------------------------------------------------------------------------ whose it is

    def _claim(self) -> None:
        """The mirror belongs to this run, and no newer attempt writes to it. Asked before anything is changed."""
        refuse_superseded(self.run_dir, self.attempt)
        mine = self._me()
        there = self._owner()
        if there is not None:
            self._refuse_other_run(there, mine.run)
            if there.attempt > mine.attempt or (there.attempt == mine.attempt and there.started != mine.started):
                raise Superseded(
                    f"attempt {mine.attempt} of run {mine.run} found attempt {there.attempt} of another start at work "
                    f"in {bare(self.url)}: this one stops, nothing of the other one was touched"
                )
        if there != mine:
            path = storage.local_path(self.url)
            if path is not None:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)  # as the run folder
            self._put(OWNER, seal(asdict(mine)))

    def _me(self) -> Owner:
        started = self.run_dir / "attempts" / f"{self.attempt:04d}.json"
        return Owner(run_id(self.run_dir), self.attempt, started.read_text() if started.exists() else "")

    def _owner(self) -> Owner | None:
        data = self._read(OWNER)
        if data is None:
            return None
        try:
            return Owner(**unseal(bare(self._at(OWNER)), data))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{bare(self._at(OWNER))} is damaged ({error}); it must say which run the mirror belongs to: delete it "
                f"if that is the run in {self.run_dir}, else choose another checkpoint.mirror"
            ) from error

    def _owner_to_restore(self) -> Owner | None:
        try:
            owner = self._owner()
        except UserError as error:  # each checkpoint says itself which run it is of
            log.warning("%s", error)
            return None
        mine = known_run_id(self.run_dir)
        if owner is not None and mine is not None:
            self._refuse_other_run(owner, mine)
        return owner

    def _refuse_other_run(self, there: Owner, mine: str) -> None:
        if there.run != mine:
            raise UserError(
                f"checkpoint.mirror is {bare(self.url)}; it belongs to run {there.run}, and {self.run_dir} is run "
                f"{mine}: give every run a mirror of its own"
            )

    # ------------------------------------------------------------------------------------------ `latest`

    def _pointer(self) -> Pointer | None:
        data = self._read(POINTER)
        try:
            return None if data is None else Pointer(**unseal(bare(self._at(POINTER)), data))
        except (ValueError, TypeError) as error:
            log.warning("%s is damaged: %s", bare(self._at(POINTER)), error)
            return None

    def _point(self, place: Place, manifest: bytes) -> int:
        """Move `latest` there, unless it names what came after."""
        self._claim()
        latest = self._pointer()
        if latest is not None and (latest.attempt, latest.step) > (place.attempt, place.step):
            return 0
        return self._put(POINTER, pointer_to(place, manifest))
