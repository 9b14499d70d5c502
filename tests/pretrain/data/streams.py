"""What the tests of the stream share: small packed sets to change at will, and what all ranks are handed."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.loader import ClipLoader
from pretrain.data.source import open_dataset
from pretrain.journal import Journal
from pretrain.ledger import Ledger, commit_lineage
from pretrain.sections import CacheConfig, DataConfig
from shards.layout import MANIFEST_NAME, Manifest
from shards.manifest import build_manifest
from shards.reader import open_split
from shards.withdraw import Withdrawal, withdrawn_url
from tests.pretrain.data.stream_ranks import Cursor
from tests.pretrain.data.test_loader import rows_of, take

Data = Callable[..., DataConfig]
Sequenced = list[tuple[Any, ...]]
SEED = 3


def copy_samples(packed: Path, folder: Path, number: int, samples: Sequence[int]) -> None:
    """A tar with some samples of the packed set."""
    reader = open_split(str(packed), "train")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"train-{number:06d}.tar", "w") as target:
        for sample in samples:
            with tarfile.open(packed / reader.split.shards[int(reader.records[sample]["shard"])].name) as tar:
                key = reader.key(sample)
                for extension in ("mp4", "json"):
                    content = tar.extractfile(f"{key}.{extension}")
                    assert content is not None
                    member = tar.getmember(f"{key}.{extension}")
                    target.addfile(member, io.BytesIO(content.read()))


def append(packed: Path, folder: Path, samples: Sequence[int]) -> None:
    """Another tar; the manifest remembers what it was (as shards/merge.py writes it)."""
    before = Manifest.from_json((folder / MANIFEST_NAME).read_text(), str(folder))
    copy_samples(packed, folder, len(before.splits["train"].shards), samples)
    after = build_manifest(folder, "train")
    history = (*before.history, before.version())
    grown = Manifest.make(preset="train", labels=after.labels, splits=after.splits, history=history)
    (folder / MANIFEST_NAME).write_text(grown.to_json())


def withdraw(folder: Path, *samples: int) -> None:
    rows = [Withdrawal("train", sample, f"train-{sample:09d}", "2026-01-01T00:00:00Z") for sample in samples]
    Path(withdrawn_url(str(folder))).write_text("".join(f"{row.to_json()}\n" for row in rows))


def damage(folder: Path, *samples: int) -> None:
    """Flip bytes in the middle of samples inside their tars."""
    reader = open_split(str(folder), "train")
    for sample in samples:
        record = reader.records[sample]
        with (folder / reader.split.shards[int(record["shard"])].name).open("r+b") as tar:
            tar.seek(int(record["offset"]) + int(record["size"]) // 2)
            flipped = bytes(byte ^ 0xFF for byte in tar.read(20))
            tar.seek(-20, io.SEEK_CUR)
            tar.write(flipped)


def all_rows(data: DataConfig, *, batch: int, num_clips: int, world: int = 1, **named: Any) -> Sequenced:
    """What all ranks are handed, by position and draw."""
    rows: Sequenced = []
    for rank in range(world):
        with ClipLoader(
            data, seed=SEED, global_batch=batch, rank=rank, world_size=world, num_clips=num_clips, **named
        ) as loader:
            rows += rows_of(loader)
    return sorted(rows)


def kept(tmp_path: Path, max_bytes: int = 1 << 20) -> CacheConfig:
    return CacheConfig(dir=str(tmp_path / "cache"), max_bytes=max_bytes)


def order_of(folder: Path, num: int, **named: Any) -> list[int]:
    """Samples by position."""
    config = DataConfig(shards=str(folder), frames=4, **named)
    return open_dataset(config, seed=SEED).places(np.arange(num))[1].tolist()


class Streamed:
    """Ranks one after the other in this process, with journal, ledger and commits."""

    def __init__(self, run_dir: Path, config: DataConfig, *, batch: int) -> None:
        self.run_dir, self.config, self.batch = run_dir, config, batch
        self.attempt = 0

    def run(self, until_step: int, *, world: int = 1) -> Sequenced:
        """One attempt: from the cursor to a step, committed there."""
        self.attempt += 1
        cursor = Cursor.read(self.run_dir)
        begin = 0 if cursor is None else cursor.step
        rows: Sequenced = []
        segments, states = [], []
        for rank in reversed(range(world)):
            journal = Journal(self.run_dir / "journal", self.attempt, rank)
            ledger = Ledger(self.run_dir / "ledger", self.attempt, rank)
            with ClipLoader(
                self.config, seed=SEED, global_batch=self.batch, rank=rank, world_size=world, journal=journal
            ) as loader:
                if cursor is not None:
                    loader.load_state_dict(cursor.state)
                for step in range(begin, until_step):
                    batches = take(loader, 1)
                    ledger.record(step, batches)
                    rows += rows_of(batches)
                states.append(loader.state_dict())
            segments.append(ledger.seal())
        head = commit_lineage(
            self.run_dir / "ledger",
            until_step,
            self.attempt,
            [segment for segment in segments if segment is not None],
            None if cursor is None else cursor.head,
        )
        Cursor(until_step, states[-1], head).write(self.run_dir)
        assert all({**state, "journal_digest": ""} == {**states[0], "journal_digest": ""} for state in states)
        return sorted(rows)
