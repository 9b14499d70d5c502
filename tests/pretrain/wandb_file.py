"""Read back what wandb wrote: the records of its own file, with its own messages; and rows to feed a tracker."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from pretrain.track import Tracker


def train_rows(tracker: Tracker, steps: range, loss: float = 1.0) -> None:
    for step in steps:
        tracker.write({"kind": "train", "step": step, "loss": loss, "lr": 0.1, "step_s": 0.5})


def saved(tracker: Tracker, step: int) -> None:
    tracker.write({"kind": "save", "step": step, "seconds": 0.5})
    tracker.publish(step)


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
            {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in history
        ]
    return points


def training(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those on the axis of steps, without what wandb adds."""
    return [{name: point[name] for name in point if name[0] != "_"} for point in points if "step" in point]


def system(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: point[name] for name in point if name[0] != "_"} for point in points if "step" not in point]


@pytest.fixture
def no_wandb_of_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def run_dir(tmp_path: Path, no_wandb_of_the_users: None) -> Path:
    """A new run folder, in a folder whose name a shell would take apart."""
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {size: nano}\n")
    return folder
