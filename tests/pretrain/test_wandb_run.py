"""What reaches wandb's own file, over kills and roll-backs; and what must never reach it."""

from __future__ import annotations

import itertools
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image

from pretrain.metrics import read_metrics
from pretrain.sections import TrackConfig
from pretrain.track import GROUPS, Tracker, split_row
from tests.pretrain.wandb_file import (
    no_wandb_of_the_users,
    published,
    records,
    run_dir,
    saved,
    system,
    train_rows,
    training,
)

__all__ = ["no_wandb_of_the_users", "run_dir"]  # fixtures

OFFLINE = TrackConfig(wandb="offline")


def test_training_waits_for_a_checkpoint_and_the_system_does_not(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(run_dir, 1, OFFLINE)
    tracker.write({"kind": "start", "step": 0, "world_size": 2})
    train_rows(tracker, range(1, 6))
    tracker.write({"kind": "eval", "step": 4, "loss": 3.0, "mfu": None})
    saved(tracker, 4)
    tracker.write({"kind": "event", "step": 5, "event": "save_failed", "reason": "disk full", "seconds": 3.0})
    tracker.close()  # killed before a checkpoint covers step 5
    (points,) = published(run_dir).values()
    assert [point["_step"] for point in points] == list(range(len(points)))  # wandb drops nothing
    assert training(points) == [
        *({"step": step, "train/loss": 1.0, "optimizer/lr": 0.1} for step in (1, 2, 3)),
        {"step": 4, "train/loss": 1.0, "optimizer/lr": 0.1, "eval/loss": 3.0},
    ]
    live = system(points)
    seconds = [point.pop("system/seconds") for point in live]
    assert seconds == sorted(seconds)
    assert live == [
        {"start/world_size": 2},
        *[{"speed/step_s": 0.5}] * 5,
        {"saves/seconds": 0.5},
        {"events/save_failed": 1},
    ]
    (file,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    metrics = [record.metric for record in records(file) if record.WhichOneof("record_type") == "metric"]
    axes = {metric.name: metric.step_metric for metric in metrics}
    assert (axes["train/loss"], axes["eval/loss"], axes["speed/step_s"]) == ("step", "step", "system/seconds")
    assert not [metric.glob_name for metric in metrics if metric.glob_name]
    assert f"wandb sync '{file.parent}'" in capsys.readouterr().out
    assert tracker.num_wandb_failures == 0


def test_run_keeps_its_id_and_goes_on_where_publication_stopped(run_dir: Path) -> None:
    first = Tracker(run_dir, 1, OFFLINE)
    train_rows(first, range(1, 7))
    first.publish(3)
    first.close()
    # a checkpoint of step 5 was committed, and nobody told wandb
    second = Tracker(run_dir, 2, OFFLINE, resumed_from=5)
    second.write({"kind": "start", "step": 5})
    train_rows(second, range(6, 9), loss=7.0)
    saved(second, 7)
    second.close()
    runs = published(run_dir)
    assert len({folder.rpartition("-")[2] for folder in runs}) == 1  # the run id ends the folder's name
    steps = [[(point["step"], point["train/loss"]) for point in training(points)] for points in runs.values()]
    assert steps == [[(1, 1.0), (2, 1.0), (3, 1.0)], [(4, 1.0), (5, 1.0), (6, 7.0), (7, 7.0)]]
    both = list(itertools.chain(*runs.values()))
    assert [point["_step"] for point in both] == list(range(len(both)))  # also where both are synced into one run
    assert len([point for point in system(both) if "speed/step_s" in point]) == 9  # each measurement once


def test_roll_back_in_one_process_takes_back_nothing_it_sent(run_dir: Path) -> None:
    first = Tracker(run_dir, 1, OFFLINE)
    first.write({"kind": "start", "step": 0})
    train_rows(first, range(1, 5))
    saved(first, 4)
    train_rows(first, range(5, 9), loss=99.0)
    first.write({"kind": "event", "step": 8, "event": "rolled_back", "to": 4, "reason": "a spike"})
    first.close()
    second = Tracker(run_dir, 2, OFFLINE, resumed_from=4)
    second.write({"kind": "start", "step": 4})
    train_rows(second, range(7, 10))
    saved(second, 9)
    second.close()
    points = list(itertools.chain(*published(run_dir).values()))
    assert [(point["step"], point["train/loss"]) for point in training(points)] == [
        (step, 1.0) for step in (1, 2, 3, 4, 7, 8, 9)
    ]
    assert [name for point in system(points) for name in point if name.startswith("events/")] == ["events/rolled_back"]


def test_nothing_is_lost_to_a_kill_and_nothing_sent_twice(run_dir: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pretrain.sections import TrackConfig; from pretrain.track import Tracker\n"
        "tracker = Tracker(Path(sys.argv[1]), 1, TrackConfig(wandb='offline'))\n"
        "[tracker.write({'kind': 'train', 'step': step, 'loss': 1.0, 'lr': 1.0, 'mfu': 1.0}) for step in range(1, 7)]\n"
        "tracker.publish(4)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run_dir)], check=False)
    assert done.returncode == -signal.SIGKILL
    second = Tracker(run_dir, 2, OFFLINE, resumed_from=4)
    second.close()
    (points,) = published(run_dir).values()  # the killed attempt's half-written file is not offered to `wandb sync`
    assert [point["step"] for point in training(points)] == [1, 2, 3, 4]
    assert len(system(points)) == 6


def test_every_panel_has_a_group_of_its_own_name() -> None:
    row = {name: 1 for group in GROUPS.values() for panel in group.panels for name in panel.names}
    assert len(row) == sum(len(panel.names) for group in GROUPS.values() for panel in group.panels)
    of_training, of_system = split_row({"kind": "train", **row, "ranks/compute_s": [1, 2], "substituted/io": 1})
    assert {"optimizer/lr", "optimizer/grad_norm"} <= of_training.keys()
    assert {"speed/clips_per_s", "memory/memory_bytes", "data/requests", "data/substituted/io"} <= of_system.keys()
    assert split_row({"kind": "save", "step": 1, "write_s": 2.0})[1] == {"saves/write_s": 2.0}
    assert split_row({"kind": "train", "step": 1, "masked_frame/tube": 2.0})[0] == {"masked_frame/tube": 2.0}


# ---- trouble


def test_online_without_a_key_stays_offline(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(run_dir, 1, TrackConfig(wandb="online"))
    train_rows(tracker, range(1, 2))
    tracker.publish(1)
    tracker.close()
    assert "there is no key" in caplog.text
    assert len(published(run_dir)) == 1


def test_wandb_trouble_never_stops_training(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class BrokenRun:
        dir = str(run_dir / "wandb" / "offline-run-broken" / "files")

        def define_metric(self, *_names: str, **_options: str) -> None: ...

        def log(self, _point: object, step: int) -> None:
            raise OSError(f"cannot send point {step} to https://name:canary@host/path?token=canary")

    def broken_init(**_options: object) -> BrokenRun:
        return BrokenRun()

    monkeypatch.setattr(wandb, "init", broken_init)
    tracker = Tracker(run_dir, 1, OFFLINE)
    with caplog.at_level(logging.WARNING):
        train_rows(tracker, range(1, 4))
        tracker.publish(2)
        tracker.publish(3)
        tracker.close()
    assert tracker.num_wandb_failures == 1
    assert "cannot send point 0 to https://host/path" in caplog.text
    assert "canary" not in caplog.text
    assert len(read_metrics(run_dir)) == 3

    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "offline")
    again = Tracker(run_dir, 2, OFFLINE, resumed_from=3)  # the next attempt gives wandb what it missed
    again.close()
    steps = [point["step"] for points in published(run_dir).values() for point in training(points)]
    assert steps == [1, 2, 3]


def test_wandb_that_does_not_start_is_counted_and_offline_is_tried(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[object] = []

    def broken_init(**options: object) -> None:
        modes.append(options["mode"])
        raise wandb.errors.CommError("no answer")

    monkeypatch.setattr(wandb, "init", broken_init)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    tracker = Tracker(run_dir, 1, TrackConfig(wandb="online"))
    train_rows(tracker, range(1, 3))
    tracker.publish(2)
    tracker.close()
    assert modes == ["online", "offline"]
    assert tracker.num_wandb_failures == 2


def test_online_run_goes_on_from_what_the_server_has(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, dict[str, Any]]] = []

    class OnlineRun:
        dir = str(run_dir / "wandb" / "run-1" / "files")
        starting_step = 40
        summary: dict[str, float]

        def define_metric(self, *_names: str, **_options: str) -> None: ...

        def log(self, point: dict[str, Any], step: int) -> None:
            sent.append((step, point))

        def finish(self) -> None: ...

    train_rows(Tracker(run_dir, 1, TrackConfig()), range(1, 6))
    rows = read_metrics(run_dir)
    OnlineRun.summary = {"step": 3, "system/seconds": rows[3]["time"] - rows[0]["time"]}
    monkeypatch.setattr(wandb, "init", lambda **_options: OnlineRun())
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    tracker = Tracker(run_dir, 2, TrackConfig(wandb="online"), resumed_from=5)
    tracker.close()
    assert [step for step, _ in sent] == [40, 41, 42]
    assert [point.get("step") for _, point in sent] == [None, 4, 5]
    assert tracker.num_wandb_failures == 0


# ---- pictures and code


def test_pictures_and_code_only_when_asked(run_dir: Path) -> None:
    (run_dir / "pictures").mkdir()
    Image.new("RGB", (8, 8), "red").save(run_dir / "pictures" / "held-out-0.png")
    plain = Tracker(run_dir, 1, OFFLINE)
    train_rows(plain, range(1, 2))
    plain.publish(1)
    plain.close()
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert not [file for file in folder.rglob("*") if file.suffix in (".png", ".py")]
    asked = TrackConfig(wandb="offline", wandb_pictures=True, wandb_code=True)
    for attempt in (2, 3):
        Tracker(run_dir, attempt, asked).close()
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert [len(list(folder.rglob("*.png"))) for folder in folders] == [0, 1, 0]  # each picture once
    assert [(folder / "files" / "code" / "pretrain" / "track.py").is_file() for folder in folders] == [
        False,
        True,
        True,
    ]
    files = [record.files for record in records(next(folders[1].glob("*.wandb"))) if record.HasField("files")]
    assert "code/pretrain/track.py" in [file.path for part in files for file in part.files]


# ---- C14


def test_nothing_leaks_into_the_run_folder(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "canary0123456789" * 3
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "WANDB_EMAIL", "WANDB_USERNAME", "WANDB_HOST"):
        monkeypatch.setenv(name, canary)
    monkeypatch.setattr("sys.argv", ["tubelet", f"--token={canary}"])
    config = run_dir / "config.yaml"
    config.write_text(f"data: {{shards: ['https://me:{canary}@host/data?key={canary}']}}\n")
    tracker = Tracker(run_dir, 1, OFFLINE)
    tracker.write({"kind": "start", "step": 0, "from": f"s3://me:{canary}@bucket/x#{canary}"})
    train_rows(tracker, range(1, 3))
    tracker.publish(2)
    tracker.close()
    config.unlink()
    files = [file for file in run_dir.rglob("*") if file.is_file()]
    assert len(files) > 3
    for file in files:
        assert b"canary0123456789" not in file.read_bytes(), file
    assert b"https://host/data" in next(run_dir.rglob("*.wandb")).read_bytes()
