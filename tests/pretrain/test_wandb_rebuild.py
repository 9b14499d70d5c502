"""`tubelet report --wandb`: one wandb run from the committed lineage, whatever came between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.metrics import committed_step
from pretrain.sections import TrackConfig
from pretrain.track import Tracker, rebuild_wandb
from shards.errors import UserError
from tests.pretrain.wandb_file import no_wandb_of_the_users, published, run_dir, saved, system, train_rows, training

__all__ = ["no_wandb_of_the_users", "run_dir"]  # fixtures

OFFLINE = TrackConfig(wandb="offline")


def history(run_dir: Path) -> None:
    """Killed at 9 with a checkpoint of 6; killed at 8 before any; a roll-back from 14 to 12 over step 13; at 17 now."""
    rows: list[dict[str, Any]] = []

    def attempt(number: int, start: int, steps: list[int], saves: tuple[int, ...], loss: float) -> None:
        rows.append({"kind": "start", "attempt": number, "step": start})
        for step in steps:
            rows.append({"kind": "train", "attempt": number, "step": step, "loss": loss, "lr": 0.1, "step_s": 0.2})
            rows.extend(
                {"kind": "save", "attempt": number, "step": step, "seconds": 0.1} for _ in saves if step in saves
            )

    attempt(1, 0, [*range(1, 10)], (3, 6), loss=1.0)
    attempt(2, 6, [7, 8], (), loss=2.0)
    attempt(3, 6, [*range(7, 15)], (9, 12), loss=3.0)
    rows.append({"kind": "event", "attempt": 3, "step": 14, "event": "rolled_back", "to": 12, "reason": "a spike"})
    attempt(4, 12, [14, 15, 16, 17], (15,), loss=4.0)
    with (run_dir / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps({"time": 1.79e9 + place, **row}) + "\n" for place, row in enumerate(rows))
    folder = run_dir / "checkpoints" / "step-000016"  # committed, and killed before its row was written
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"step": 16, "attempt": 4}))


EXPECTED = [*((step, 1.0) for step in range(1, 7)), *((step, 3.0) for step in range(7, 13))]


def test_rebuilt_from_the_committed_lineage(run_dir: Path) -> None:
    history(run_dir)
    for folder in ("offline-run-20260101_000000-abcd1234", "offline-run-20260102_000000-abcd1234"):
        (run_dir / "wandb" / folder).mkdir(parents=True)
        (run_dir / "wandb" / folder / "run-abcd1234.wandb").write_bytes(b"old")
    (run_dir / "wandb" / "tubelet.json").write_text('{"run_id": "abcd1234", "step": 6, "open": null}')
    line = rebuild_wandb(run_dir)
    ((folder, points),) = published(run_dir).items()
    assert line == f"wandb sync '{run_dir / 'wandb' / folder}'"
    assert folder.endswith("-abcd1234")
    steps = [(point["step"], point["train/loss"]) for point in training(points)]
    assert steps == [*EXPECTED, (14, 4.0), (15, 4.0), (16, 4.0)]  # 13 was stepped over, 17 is not yet covered
    assert [point["_step"] for point in points] == list(range(len(points)))
    live = system(points)
    assert [point["system/seconds"] for point in live] == sorted(point["system/seconds"] for point in live)
    assert sum("saves/seconds" in point for point in live) == 5
    assert sum("speed/step_s" in point for point in live) == 15
    kept = sorted(file.parent.name for file in (run_dir / "wandb" / "set-aside").glob("*/*.wandb"))
    assert kept == ["offline-run-20260101_000000-abcd1234", "offline-run-20260102_000000-abcd1234"]
    assert not list((run_dir / "wandb").glob("*/set-aside*/*.wandb"))

    # and the next start goes on from there, under the same id
    tracker = Tracker(run_dir, 5, OFFLINE, resumed_from=16)
    tracker.write({"kind": "start", "step": 16})
    train_rows(tracker, range(17, 19), loss=5.0)
    saved(tracker, 18)
    tracker.close()
    more = published(run_dir)
    assert [folder.endswith("-abcd1234") for folder in more] == [True, True]
    assert [point["step"] for points in more.values() for point in training(points)] == [
        *range(1, 13), *range(14, 19)
    ]  # fmt: skip


def test_rebuilt_under_a_new_id_where_the_server_has_the_old_one(run_dir: Path) -> None:
    history(run_dir)
    folder = run_dir / "wandb" / "offline-run-20260101_000000-abcd1234"
    folder.mkdir(parents=True)
    (folder / "run-abcd1234.wandb.synced").touch()
    (run_dir / "wandb" / "tubelet.json").write_text('{"run_id": "abcd1234", "step": 6, "open": null}')
    assert "abcd1234" not in rebuild_wandb(run_dir)


def test_nothing_to_rebuild_is_said(run_dir: Path) -> None:
    train_rows(Tracker(run_dir, 1, TrackConfig()), range(1, 4))
    with pytest.raises(UserError, match="has no metrics that a checkpoint covers"):
        rebuild_wandb(run_dir)
    assert not (run_dir / "wandb").exists()


def test_a_checkpoint_that_the_newest_start_did_not_trust_covers_nothing(run_dir: Path) -> None:
    history(run_dir)
    manifest = run_dir / "checkpoints" / "step-000016" / "manifest.json"
    assert committed_step(run_dir) == 16
    manifest.write_text(json.dumps({"step": 16, "attempt": 3}))
    assert committed_step(run_dir) == 15
    manifest.write_text("torn {")
    assert committed_step(run_dir) == 15
