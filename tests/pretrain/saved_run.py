"""A run folder as training leaves it, in milliseconds: real checkpoint, ledger, journal and attempt files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from pretrain import checkpoint
from pretrain.attempt import take_attempt
from pretrain.checkpoint import Checkpoint, Facts
from pretrain.journal import Journal, JournalRow
from pretrain.ledger import ROW_DTYPE, LineageHead, Segment, commit_lineage

SHAPES = {"a.weight": [3, 4], "b.bias": [5]}
NUM_RANKS = 2


class SavedRun:
    """start() takes an attempt number, save(step) commits a checkpoint on top of the one before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.attempt = 0
        self.head: LineageHead | None = None

    def start(self) -> int:
        self.attempt = take_attempt(self.folder, ["node-a"] * NUM_RANKS)
        (self.folder / "config.yaml").write_text("model: {size: nano}\n")
        return self.attempt

    def save(self, step: int, *, numel: int = 12) -> Path:
        """`numel`: elements of the larger parameter. A row goes into the journal of each rank."""
        shapes = {**SHAPES, "a.weight": [numel]}
        staging = checkpoint.staging_folder(self.folder, step, self.attempt)
        for rank in range(NUM_RANKS):
            Journal(self.folder / "journal", self.attempt, rank).add(JournalRow(step * 10 + rank, 1, 2, "checksum"))
            slices = []
            for name, shape in shapes.items():
                values = torch.arange(float(torch.Size(shape).numel())) + step + 1000 * self.attempt
                begin, end = len(values) * rank // NUM_RANKS, len(values) * (rank + 1) // NUM_RANKS
                slices.append((name, "fp32", begin, values[begin:end]))
            checkpoint.write_part(staging, rank, slices, [self._segment(step, rank)])
        parts, segments = checkpoint.read_parts(staging, NUM_RANKS)
        self.head = commit_lineage(self.folder / "ledger", step, self.attempt, segments, self.head)
        facts = Facts(
            step=step, optimizer_steps=step, attempt=self.attempt, cursor={"position": step}, shapes=shapes,
            config={"model": {"size": "nano"}}, versions={}, changes=[],
        )  # fmt: skip
        checkpoint.stage(staging, facts, parts, self.head)
        return checkpoint.publish(staging, step)

    def go_back_to(self, step: int) -> None:
        """The checkpoints after `step` proved broken or were rolled back: what comes next stands on that one."""
        for folder in checkpoint.candidates(self.folder):
            if checkpoint.step_of(folder) > step:
                checkpoint.discard(folder)
        self.head = Checkpoint(self.folder / "checkpoints" / checkpoint.NAME.format(step)).lineage

    def _segment(self, step: int, rank: int) -> Segment:
        folder = self.folder / "ledger"
        folder.mkdir(exist_ok=True)
        name = f"a{self.attempt:04d}-s{step:08d}-r{rank:05d}.rows"
        data = json.dumps([self.attempt, step, rank]).encode().ljust(3 * ROW_DTYPE.itemsize, b".")
        (folder / name).write_bytes(data)
        return Segment(name, 3, hashlib.sha256(data).hexdigest())


def content(folder: Path) -> dict[str, bytes]:
    """Every file by its name; locks left out, as they are empty."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """The last byte is missing."""
    path.write_bytes(path.read_bytes()[:-1])
