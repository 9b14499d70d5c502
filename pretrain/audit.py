"""The proof: what the ledger says was consumed, against what the order and the manifest say should have been (C4).

    head ─ walk back the lineage, hash by hash ─ links, oldest first ─ segments ─ rows, a million at a time
    every clip of every step once · the sample that the order names · the checksum of the manifest · whole epochs

Order, epochs and checksums come in from outside (`Data`): this file and the loader share no code that could hide the
same mistake in both. Memory is one byte per clip of a checkpoint interval and per clip of an epoch, whatever the
length of the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pretrain.decisions import withheld_steps
from pretrain.journal import read_journal
from pretrain.ledger import (
    ROW_DTYPE,
    SUBSTITUTED,
    LineageHead,
    Link,
    Segment,
    row_crc,
    walk_lineage,
)
from pretrain.verdict import NUM_SHOWN, AuditResult, Findings
from shards.errors import UserError
from shards.layout import SOURCE_SHIFT
from shards.source import Epoch

ROWS_AT_A_TIME = 1 << 20

Ints = NDArray[np.int64]


class Data(Protocol):
    """What the audit asks of the data set (`shards.dataset.DataSet`)."""

    @property
    def num_samples(self) -> int:
        """Samples to draw from, over all sources, at the end of the run."""
        ...

    def places(self, positions_K: Ints) -> tuple[Ints, Ints]:
        """(epoch, sample) that the order names at each position."""
        ...

    def checksums(self, samples_K: Ints) -> tuple[NDArray[np.bool_], NDArray[np.uint32]]:
        """(whether there is such a sample, crc32 of its bytes)."""
        ...

    def epochs(self, begin: int, end: int) -> Iterable[Epoch]:
        """Every epoch of every source with a draw at the positions [begin, end)."""
        ...

    def selected(self, source: int, num_rows: int) -> NDArray[np.bool_]:
        """Which of the first rows of a source's index are drawn at all."""
        ...


@dataclass(frozen=True)
class Witness:
    """What should have happened, from sources the loader's bookkeeping had no part in."""

    num_steps: int
    """Steps that the checkpoint has behind it."""
    global_batch: int
    """Clips per step."""
    clips_per_video: int
    """Clips per position."""
    data: Data


def audit(run_dir: Path, head: LineageHead, witness: Witness) -> AuditResult:
    """Check the lineage that ends in `head` (stored in a checkpoint's manifest) against the witness.

    Never raises for what it finds in the run folder: what cannot be read is a violation, named in the result.
    """
    proof = _Proof(run_dir, witness)
    try:
        links = list(walk_lineage(run_dir / "ledger", head))[::-1]
    except ValueError as error:
        proof.found.wrong("lineage", f"ledger/{error}")
        return proof.result(set())
    if links[-1][1].step != witness.num_steps:
        at = f"of step {links[-1][1].step}, the checkpoint of step {witness.num_steps}"
        proof.found.wrong("lineage", f"ledger/{head.file} is {at}")
    begin = 0
    for _, link in links:
        proof.check_link(begin, link)
        begin = link.step
    proof.found.counts["attempts"] = len({link.attempt for _, link in links})
    return proof.result({segment.file for _, link in links for segment in link.segments})


class _Once:
    """Marks keys and tells which of them come again: `seen` is one byte per key, the caller's to look into."""

    def __init__(self, seen: NDArray[np.bool_]) -> None:
        self.seen = seen

    def mark(self, keys: Ints) -> NDArray[np.bool_]:
        """True where a key was marked before, in an earlier call or earlier in `keys`."""
        is_first = np.zeros(len(keys), np.bool_)
        is_first[np.unique(keys, return_index=True)[1]] = True
        again = self.seen[keys] | ~is_first
        self.seen[keys] = True
        return again


@dataclass
class _Proof:
    """The state of one audit: what was found, and which samples of the open epochs came by."""

    run_dir: Path
    witness: Witness
    found: Findings = field(default_factory=Findings)
    _due: dict[tuple[int, int], _Once] = field(default_factory=dict[tuple[int, int], "_Once"])
    """Source and epoch -> what of it was due so far; whole epochs are checked and let go."""
    _reasons: dict[tuple[int, int, int], str] = field(default_factory=dict[tuple[int, int, int], str])
    _withheld: list[tuple[int, int, str]] = field(default_factory=list[tuple[int, int, str]])
    """(first, stop, reason) of the steps that all ranks decided not to apply."""

    def __post_init__(self) -> None:
        try:
            for row in read_journal(self.run_dir / "journal"):
                self._reasons[row.position, row.wanted, row.substitute] = row.reason
            self._withheld = withheld_steps(self.run_dir / "journal")
        except UserError as error:
            self.found.wrong("journal", str(error))
        self._journal_positions: Ints = np.unique([key[0] for key in self._reasons]).astype(np.int64)

    # ------------------------------------------------------------------ one checkpoint interval

    def check_link(self, begin: int, link: Link) -> None:
        """All segments of the steps [begin, link.step): each clip once, and whole epochs."""
        witness = self.witness
        first, end = begin * witness.global_batch, link.step * witness.global_batch
        clips = _Once(np.zeros(end - first, np.bool_))
        positions = first // witness.clips_per_video, end // witness.clips_per_video
        epochs = list(witness.data.epochs(*positions))
        for epoch in epochs:
            size = epoch.num_rows * witness.clips_per_video
            self._due.setdefault((epoch.source, epoch.number), _Once(np.zeros(size, np.bool_)))
        for segment in link.segments:
            for rows in self._read(segment):
                clip, epoch_R = self._check_rows(segment, rows, first, end)
                keep = clip >= 0
                rows, clip, epoch_R = rows[keep], clip[keep], epoch_R[keep]
                again = clips.mark(clip - first)
                self._wrong_rows("repeated", "consumed again", segment, rows, again)
                twice = self._mark_due(rows[~again], epoch_R[~again])
                self._wrong_rows("epoch", "its sample was due before in this epoch", segment, rows[~again], twice)
        self.found.counts["clips"] += int(clips.seen.sum())
        self._withhold(clips, begin, link)
        self._check_missing(clips, first, begin, link)
        for epoch in epochs:
            if epoch.is_whole:
                self._check_epoch(epoch, self._due.pop((epoch.source, epoch.number)))
        self.found.counts["commits"] += 1

    def _withhold(self, clips: _Once, begin: int, link: Link) -> None:
        """Steps that were decided not to be applied: none of their clips may be here, and none is missing."""
        witness = self.witness
        steps = {s: why for a, b, why in self._withheld for s in range(max(a, begin), min(b, link.step))}
        for step, reason in sorted(steps.items()):
            clip = np.arange(step * witness.global_batch, (step + 1) * witness.global_batch)
            place = clip - begin * witness.global_batch
            if num := int(clips.seen[place].sum()):
                text = f"step {step}: {num} clips were consumed, though it was given up ({reason})"
                self.found.wrong("withheld", text, num)
            clips.seen[place] = True
            due = np.zeros(len(clip), ROW_DTYPE)
            position, due["draw"] = np.divmod(clip, witness.clips_per_video)
            epoch, due["wanted"] = witness.data.places(position)
            self._mark_due(due, epoch)
            self.found.counts["withheld"] += len(clip)
            self.found.note(f"step {step}: not applied, {len(clip)} clips withheld ({reason})")

    def _mark_due(self, rows: NDArray[np.void], epoch_R: Ints) -> NDArray[np.bool_]:
        """Mark the samples that the order asked for; True where one was due before in its epoch."""
        wanted = rows["wanted"].astype(np.int64)
        source, row = wanted >> SOURCE_SHIFT, wanted & ((1 << SOURCE_SHIFT) - 1)
        place = row * self.witness.clips_per_video + rows["draw"]
        twice = np.zeros(len(rows), np.bool_)
        for key in np.unique(np.stack([source, epoch_R]), axis=1).T.tolist():
            once = self._due.get((key[0], key[1]))
            if once is None:  # no such epoch: the order has been found wrong already
                continue
            mine = np.flatnonzero((source == key[0]) & (epoch_R == key[1]) & (place < len(once.seen)))
            twice[mine] = once.mark(place[mine])
        return twice

    def _read(self, segment: Segment) -> Iterator[NDArray[np.void]]:
        """Rows of a segment in pieces; what is wrong with the file as a whole is noted at its end."""
        self.found.counts["segments"] += 1
        if Path(segment.file).name != segment.file:
            self.found.wrong("file", f"{segment.file!r} is not a plain file name")
            return
        digest, num_rows, tail = hashlib.sha256(), 0, 0
        try:
            with (self.run_dir / "ledger" / segment.file).open("rb") as file:
                while data := file.read(ROWS_AT_A_TIME * ROW_DTYPE.itemsize):
                    digest.update(data)
                    tail = len(data) % ROW_DTYPE.itemsize
                    rows = np.frombuffer(data[: len(data) - tail], ROW_DTYPE)
                    num_rows += len(rows)
                    yield rows
        except OSError as error:
            self.found.wrong("file", f"ledger/{segment.file} cannot be read ({error.strerror})")
            return
        if num_rows != segment.num_rows or tail:
            has = f"has {num_rows} rows" + (f" and {tail} bytes" if tail else "")
            self.found.wrong("file", f"ledger/{segment.file} {has}; {segment.num_rows} rows were committed")
        elif digest.hexdigest() != segment.sha256:
            self.found.wrong("file", f"ledger/{segment.file} was changed after it was committed (its hash differs)")

    def _check_rows(self, segment: Segment, rows: NDArray[np.void], first: int, end: int) -> tuple[Ints, Ints]:
        """Every rule that one row can break. Returns clip numbers, -1 for a row that has no place here, and epochs."""
        witness = self.witness
        self.found.counts["rows"] += len(rows)
        position = rows["position"].astype(np.int64)
        wanted, sample = rows["wanted"].astype(np.int64), rows["sample"].astype(np.int64)
        clip = position * witness.clips_per_video + rows["draw"]
        is_damaged = rows["crc"] != row_crc(rows)
        self._wrong_rows("damaged", "the row fails its own checksum", segment, rows, is_damaged)
        has_place = (clip >= first) & (clip < end) & (rows["draw"] < witness.clips_per_video)
        has_place &= (position >= 0) & (position < end)
        has_place &= clip // witness.global_batch == rows["step"].astype(np.int64)
        self._wrong_rows("misplaced", "does not belong to this step and commit", segment, rows, ~has_place)
        is_expected = np.zeros(len(rows), np.bool_)
        epoch = np.zeros(len(rows), np.int64)
        epoch[has_place], expected = witness.data.places(position[has_place])
        is_expected[has_place] = expected == wanted[has_place]
        self._wrong_rows("order", "the order asks for another sample", segment, rows, has_place & ~is_expected)
        exists, checksum = witness.data.checksums(sample)
        is_same = exists & (checksum == rows["checksum"])
        self._wrong_rows("bytes", "the bytes are not those of the manifest", segment, rows, ~is_same)
        is_other = sample != wanted
        is_odd = is_other != (rows["reason"] == SUBSTITUTED)
        self._wrong_rows("damaged", "its reason contradicts its samples", segment, rows, is_odd)
        may_explain = is_other & np.isin(position, self._journal_positions)
        self._check_substitutes(segment, rows, is_other & ~may_explain, may_explain)
        return np.where(has_place, clip, -1), epoch

    def _check_substitutes(
        self,
        segment: Segment,
        rows: NDArray[np.void],
        is_unexplained: NDArray[np.bool_],
        may_explain: NDArray[np.bool_],
    ) -> None:
        """Another sample than the wanted one needs a journal row that says exactly that."""
        no_row = "no journal row allows it"
        self._wrong_rows("substitute", no_row, segment, rows, is_unexplained)
        for row in rows[may_explain]:
            reason = self._reasons.get((int(row["position"]), int(row["wanted"]), int(row["sample"])))
            if reason is None:
                self.found.wrong("substitute", f"{_where(segment, row)}: {no_row}")
                continue
            self.found.substituted[reason] += 1
            self.found.note(
                f"position {row['position']} (step {row['step']}): sample {row['wanted']} was replaced by "
                f"{row['sample']} ({reason})"
            )

    def _check_missing(self, clips: _Once, first: int, begin: int, link: Link) -> None:
        missing = np.flatnonzero(~clips.seen) + first
        for clip in missing[:NUM_SHOWN].tolist():
            position, draw = divmod(clip, self.witness.clips_per_video)
            where = f"position {position} (step {clip // self.witness.global_batch}, draw {draw})"
            self.found.wrong("missing", f"{where}: in no segment of the commit of steps {begin}..{link.step - 1}")
        if len(missing) > NUM_SHOWN:
            self.found.wrong("missing", "", num=len(missing) - NUM_SHOWN)

    def _check_epoch(self, epoch: Epoch, due: _Once) -> None:
        """A whole epoch: each selected sample was due exactly once (per draw)."""
        clips = self.witness.clips_per_video
        selected_N = self.witness.data.selected(epoch.source, epoch.num_rows)
        never = np.flatnonzero(np.repeat(selected_N, clips) & ~due.seen) // clips
        if not len(never):
            self.found.counts["epochs"] += 1
            return
        samples = ", ".join(map(str, (never[:NUM_SHOWN] + (epoch.source << SOURCE_SHIFT)).tolist()))
        of = f"epoch {epoch.number}" + (f" of source {epoch.source}" if epoch.source else "")
        self.found.wrong("epoch", f"{of}: {len(never)} clips were never due, of samples {samples}", len(never))

    def _wrong_rows(
        self, kind: str, text: str, segment: Segment, rows: NDArray[np.void], is_wrong: NDArray[np.bool_]
    ) -> None:
        if not is_wrong.any():
            return
        bad = rows[is_wrong]
        for row in bad[:NUM_SHOWN]:
            self.found.wrong(kind, f"{_where(segment, row)}: {text}")
        if len(bad) > NUM_SHOWN:
            self.found.wrong(kind, "", num=len(bad) - NUM_SHOWN)

    def result(self, committed: set[str]) -> AuditResult:
        """Count what no checkpoint stands on, and give the verdict."""
        files, rows, torn = _uncommitted(self.run_dir / "ledger", committed)
        self.found.counts.update(abandoned_files=files, abandoned_rows=rows, torn_tails=torn)
        witness = self.witness
        return self.found.result(witness.num_steps, witness.num_steps * witness.global_batch, witness.data.num_samples)


def _where(segment: Segment, row: Any) -> str:
    return (
        f"position {row['position']} (step {row['step']}, draw {row['draw']}, wanted {row['wanted']}, "
        f"sample {row['sample']}) in ledger/{segment.file}"
    )


def _uncommitted(folder: Path, committed: set[str]) -> tuple[int, int, int]:
    """(files, whole rows, torn tails) of the segments outside the lineage."""
    files = rows = torn = 0
    for file in sorted(folder.glob("*.rows")):
        if file.name in committed:
            continue
        data = np.fromfile(file, np.uint8)
        whole = data[: len(data) // ROW_DTYPE.itemsize * ROW_DTYPE.itemsize].view(ROW_DTYPE)
        is_good = whole["crc"] == row_crc(whole)
        files, rows = files + 1, rows + int(is_good.sum())
        torn += len(data) % ROW_DTYPE.itemsize != 0 or not is_good.all()
    return files, rows, torn
