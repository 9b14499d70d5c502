from __future__ import annotations

import json
import logging
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from pretrain.redact import without_secrets
from pretrain.sections import TrackConfig
from pretrain.track import Tracker, read_metrics, read_rows

OFF = TrackConfig()
OFFLINE = TrackConfig(wandb="offline")


def train_rows(tracker: Tracker, steps: range, loss: float = 1.0) -> None:
    for step in steps:
        tracker.write({"kind": "train", "step": step, "loss": loss, "lr": 0.1})


# ---- metrics.jsonl


def test_rows_are_on_disk_at_once_with_attempt_and_time(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 3, OFF)
    tracker.write({"kind": "train", "step": 1, "loss": 2.5})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (row["kind"], row["step"], row["loss"], row["attempt"]) == ("train", 1, 2.5, 3)
    assert row["time"] > 1e9
    tracker.saved(1, seconds=0.5)
    assert [row["kind"] for row in read_rows(tmp_path)] == ["train", "save"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 1, OFFLINE, is_first=False)
    train_rows(tracker, range(1, 3))
    tracker.saved(2, 0.1)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_line_torn_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    train_rows(Tracker(tmp_path, 1, OFF), range(1, 4))
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    train_rows(Tracker(tmp_path, 2, OFF), range(3, 5))
    assert [(row["attempt"], row["step"]) for row in read_rows(tmp_path)] == [(1, 1), (1, 2), (2, 3), (2, 4)]


def test_numbers_that_are_not_finite_stay_valid_json_and_are_named(tmp_path: Path) -> None:
    Tracker(tmp_path, 1, OFF).write({"kind": "train", "step": 1, "loss": float("nan"), "lr": 0.1, "grad": float("inf")})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["loss"], row["grad"], row["lr"]) == (None, None, 0.1)
    assert row["not_finite"] == ["loss", "grad"]


def test_unwritable_file_is_told_once_counted_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    tracker = Tracker(tmp_path, 1, OFF)
    with caplog.at_level(logging.WARNING):
        train_rows(tracker, range(1, 4))
    assert tracker.num_unwritten == 3
    assert [record.message for record in caplog.records] == [
        "metrics.jsonl cannot be written (Is a directory); training goes on, rows are lost"
    ]


def test_later_attempt_wins_where_steps_were_done_again(tmp_path: Path) -> None:
    first = Tracker(tmp_path, 1, OFF)
    first.write({"kind": "start", "step": 0})
    train_rows(first, range(1, 7), loss=1.0)
    first.write({"kind": "eval", "step": 4, "loss": 9.0})
    second = Tracker(tmp_path, 2, OFF)
    second.write({"kind": "start", "step": 4})
    train_rows(second, range(5, 6), loss=2.0)
    rows = [row for row in read_metrics(tmp_path) if row["kind"] == "train"]
    # steps 5, 6 of the first attempt were abandoned; 6 was not yet reached again
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0)]
    assert [row["kind"] for row in read_metrics(tmp_path) if row["kind"] != "train"] == ["start", "eval", "start"]


def test_no_metrics_is_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


# ---- wandb


def records(file: Path) -> list[Any]:
    """The records of a .wandb file: a LevelDB log (7 bytes of header, blocks of 32 KiB) of wandb's own messages."""
    data, place, whole, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        _crc, size, kind = struct.unpack("<IHB", data[place : place + 7])
        if left < 7 or kind == 0:
            place += left
            continue
        whole, place = whole + data[place + 7 : place + 7 + size], place + 7 + size
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


def published(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """History points by offline folder, the oldest first."""
    points: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        history = [record.history for record in records(file) if record.WhichOneof("record_type") == "history"]
        points[file.parent.name] = [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in history
        ]
    return points


@pytest.fixture(autouse=True)
def _no_wandb_of_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {size: nano}\n")
    return folder


def spread_folders(run_dir: Path) -> None:
    """wandb names folders by the second: make the next one differ."""
    for folder in (run_dir / "wandb").glob("offline-run-2*"):
        folder.rename(folder.with_name(folder.name.replace("offline-run-2", "offline-run-1")))


def test_wandb_gets_steps_once_a_checkpoint_covers_them(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(run_dir, 1, OFFLINE)
    tracker.write({"kind": "start", "step": 0})
    train_rows(tracker, range(1, 6))
    tracker.write({"kind": "eval", "step": 4, "loss": 3.0, "mfu": None})
    tracker.saved(4, seconds=0.5)
    tracker.close()  # killed before a checkpoint covers step 5
    (points,) = published(run_dir).values()
    assert [(point["step"], point["_step"]) for point in points] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    last = {key: value for key, value in points[-1].items() if not key.startswith("_")}
    assert last == {"step": 4, "loss": 1.0, "lr": 0.1, "eval/loss": 3.0, "save/seconds": 0.5}
    (file,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    metrics = [record.metric for record in records(file) if record.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in metrics]
    assert f"wandb sync '{file.parent}'" in capsys.readouterr().out
    assert tracker.num_wandb_failures == 0


def test_wandb_run_keeps_its_id_and_goes_on_where_publication_stopped(run_dir: Path) -> None:
    first = Tracker(run_dir, 1, OFFLINE)
    first.write({"kind": "start", "step": 0})
    train_rows(first, range(1, 7))
    first.publish(3)
    first.close()
    spread_folders(run_dir)
    # a checkpoint of step 5 was committed, and nobody told wandb
    second = Tracker(run_dir, 2, OFFLINE, resumed_from=5)
    second.write({"kind": "start", "step": 5})
    train_rows(second, range(6, 9), loss=7.0)
    second.saved(7, 0.1)
    second.close()
    runs = published(run_dir)
    assert len({folder.rpartition("-")[2] for folder in runs}) == 1  # the run id ends the folder's name
    steps = [[(point["step"], point["loss"]) for point in points] for points in runs.values()]
    assert steps == [[(1, 1.0), (2, 1.0), (3, 1.0)], [(4, 1.0), (5, 1.0), (6, 7.0), (7, 7.0)]]


def test_wandb_loses_nothing_to_a_kill_and_gets_nothing_twice(run_dir: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pretrain.sections import TrackConfig; from pretrain.track import Tracker\n"
        "tracker = Tracker(Path(sys.argv[1]), 1, TrackConfig(wandb='offline'))\n"
        "[tracker.write({'kind': 'train', 'step': step, 'loss': 1.0}) for step in range(1, 7)]\n"
        "tracker.publish(4)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run_dir)], check=False)
    assert done.returncode == -signal.SIGKILL
    spread_folders(run_dir)
    state = run_dir / "wandb" / "tubelet.json"
    state.write_text(state.read_text().replace("offline-run-2", "offline-run-1"))
    second = Tracker(run_dir, 2, OFFLINE, resumed_from=4)
    second.close()
    (points,) = published(run_dir).values()  # the killed attempt's half-written file is not offered to `wandb sync`
    assert [point["step"] for point in points] == [1, 2, 3, 4]


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
            raise OSError(f"cannot send step {step} to https://name:canary@host/path?token=canary")

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
    assert "cannot send step 1 to https://host/path" in caplog.text
    assert "canary" not in caplog.text
    assert len(read_metrics(run_dir)) == 3

    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "offline")
    again = Tracker(run_dir, 2, OFFLINE, resumed_from=3)  # the next attempt gives wandb what it missed
    again.close()
    assert [point["step"] for points in published(run_dir).values() for point in points] == [1, 2, 3]


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


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("s3://bucket/a/{000..009}.tar", "s3://bucket/a/{000..009}.tar"),
        ("https://me:secret@host:8443/a/b?X-Signature=1&b#c", "https://host:8443/a/b"),
        ("see https://u:p@h/x?y, or /local/path?not=a&url", "see https://h/x or /local/path?not=a&url"),
        ("https://u:p@[broken/x", "https://…"),
        ("no url", "no url"),
    ],
)
def test_urls_lose_their_secrets(text: str, bare: str) -> None:
    assert without_secrets(text) == bare
    assert without_secrets({"a": [text, 1, None], "b": {"c": (text,)}}) == {"a": [bare, 1, None], "b": {"c": [bare]}}
