"""Ranks that stream clips and prove it, without a model: a server that forks them, and what one rank does.

`python -m tests.pretrain.data.stream_ranks` imports everything once, then forks the ranks of one attempt for every
line of its input, in a process group of their own: an attempt starts in milliseconds, and dies as a whole by killpg.
It answers with the group's number, and, when the last rank ended, with their exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.audit import Witness, audit
from pretrain.data.loader import ClipLoader
from pretrain.data.source import open_dataset
from pretrain.journal import Journal, read_growth
from pretrain.ledger import ROW_DTYPE, Ledger, LineageHead, Segment, commit_lineage, walk_lineage
from pretrain.sections import DataConfig
from pretrain.verdict import AuditResult
from shards.errors import SampleError
from shards.reader import SplitReader
from shards.storage import write_atomic

WAIT_S = 60.0


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    run_dir: str
    data: dict[str, Any]
    number: int
    world: int
    seed: int
    global_batch: int
    micro_batch: int | None
    every_steps: int
    until_step: int
    """Ends there by itself."""
    unreadable: tuple[int, ...] = ()
    """Samples that storage does not give during this attempt: only the journal can tell later ones."""


@dataclass(frozen=True)
class Cursor:
    """What a checkpoint would hold."""

    step: int
    state: dict[str, Any]
    head: LineageHead

    def write(self, run_dir: Path) -> None:
        write_atomic(run_dir / "cursor.json", json.dumps(asdict(self)).encode())

    @staticmethod
    def read(run_dir: Path) -> Cursor | None:
        try:
            row = json.loads((run_dir / "cursor.json").read_bytes())
        except FileNotFoundError:
            return None
        return Cursor(row["step"], row["state"], LineageHead(**row["head"]))


def stream(attempt: Attempt, rank: int) -> None:
    """Take steps from where the run's cursor is, and commit every few: the way of recovery.py, without an engine."""
    run_dir, data = Path(attempt.run_dir), DataConfig.model_validate(attempt.data)
    cursor = Cursor.read(run_dir)
    step = 0 if cursor is None else cursor.step
    ledger = Ledger(run_dir / "ledger", attempt.number, rank)
    fail_to_read(attempt.unreadable)
    with ClipLoader(
        data,
        seed=attempt.seed,
        global_batch=attempt.global_batch,
        micro_batch=attempt.micro_batch,
        rank=rank,
        world_size=attempt.world,
        journal=Journal(run_dir / "journal", attempt.number, rank),
    ) as loader:
        if cursor is not None:
            loader.load_state_dict(cursor.state)
        head = None if cursor is None else cursor.head
        while step < attempt.until_step:
            ledger.record(step, [next(loader) for _ in range(loader.num_micro_steps)])
            step += 1
            if step % attempt.every_steps and step != attempt.until_step:
                continue
            hand_over(attempt, rank, step, ledger.seal())
            if rank == 0:
                segments = gather(attempt, step)
                head = commit_lineage(run_dir / "ledger", step, attempt.number, segments, head)
                Cursor(step, loader.state_dict(), head).write(run_dir)
            wait_until(lambda: (now := Cursor.read(run_dir)) is not None and now.step >= step)  # noqa: B023


def fail_to_read(unreadable: Sequence[int]) -> None:
    """In this process, which ends with the attempt."""
    plain = SplitReader.read_group

    def read_group(self: SplitReader, samples: Sequence[int]) -> list[bytes | SampleError]:
        found = plain(self, samples)
        return [
            SampleError("io", "no answer") if sample in unreadable else content
            for sample, content in zip(samples, found, strict=True)
        ]

    SplitReader.read_group = read_group


def hand_over(attempt: Attempt, rank: int, step: int, segment: Segment | None) -> None:
    file = handed(attempt, rank, step)
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, json.dumps(None if segment is None else asdict(segment)).encode())


def handed(attempt: Attempt, rank: int, step: int) -> Path:
    return Path(attempt.run_dir) / "handed" / f"a{attempt.number}-s{step}-r{rank}.json"


def gather(attempt: Attempt, step: int) -> list[Segment]:
    """What all ranks sealed, once all did."""
    files = [handed(attempt, rank, step) for rank in range(attempt.world)]
    wait_until(lambda: all(file.exists() for file in files))
    rows = [json.loads(file.read_bytes()) for file in files]
    return [Segment(**row) for row in rows if row is not None]


def wait_until(condition: Any) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s, "another rank did not come"
        time.sleep(0.002)


# ------------------------------------------------------------------ what came of it


def committed_rows(run_dir: Path, head: LineageHead) -> NDArray[np.void]:
    """Every ledger row that the lineage stands on, by position and draw."""
    files = [segment.file for _, link in walk_lineage(run_dir / "ledger", head) for segment in link.segments]
    rows = [np.fromfile(run_dir / "ledger" / file, ROW_DTYPE) for file in files]
    return np.sort(np.concatenate(rows), order=["position", "draw"])


def audit_stream(run_dir: Path, data: DataConfig, *, seed: int, global_batch: int) -> AuditResult:
    """As pretrain/witness.py does it, from the run's cursor."""
    cursor = Cursor.read(run_dir)
    assert cursor is not None
    dataset = open_dataset(data, seed=seed)
    dataset.go_on(cursor.state, cursor.state["position"], read_growth(run_dir / "journal"))
    return audit(run_dir, cursor.head, Witness(cursor.step, global_batch, data.clips_per_video, dataset))


# ------------------------------------------------------------------ the server


def serve() -> None:
    for line in sys.stdin:
        attempt = Attempt(**json.loads(line))
        pids = [fork(attempt, rank) for rank in range(attempt.world)]
        for pid in pids:
            os.setpgid(pid, pids[0])
        for pid in pids:  # none starts before all can be killed together
            os.kill(pid, signal.SIGCONT)
        print(pids[0], flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


def fork(attempt: Attempt, rank: int) -> int:
    """A rank, stopped at its first line."""
    pid = os.fork()
    if pid:
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        os.kill(os.getpid(), signal.SIGSTOP)
        stream(attempt, rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main(arguments: Sequence[str]) -> None:
    assert not arguments
    serve()


if __name__ == "__main__":
    main(sys.argv[1:])
