"""No start outlives its starter: with the real trainer, whose ranks watch the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import local
from shards.pack import PackOptions, pack

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_killing_tubelet_alone_ends_every_rank(tmp_path: Path) -> None:
    """SIGKILL to the command a user typed, while the launchers below it live on."""
    pack(ROOT / "configs" / "clips", tmp_path / "films", PackOptions(short_side=96, max_frames=48), None)
    run = tmp_path / "run"
    words = [
        f"run.dir={run}",
        f"data.shards={tmp_path / 'films'}",
        "train.steps=100000",
        "train.global_batch=2",
        "train.micro_batch=1",
        "eval.every_steps=0",
        "track.wandb='off'",
        "track.log_every_steps=1",
    ]
    command = [sys.executable, "-m", "launch.cli", "pretrain", "configs/demo.yaml", *words, "--ranks", "2"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=pipe, stderr=pipe) as tubelet:
        try:
            until(lambda: (run / "metrics.jsonl").exists() and '"train"' in (run / "metrics.jsonl").read_text(), 120)
            mark = next(mark for mark in marks() if mark.startswith(f"{tubelet.pid}:"))
            assert len(local.marked(mark, only_ranks=True)) == 2
            tubelet.kill()  # and whoever read its output is gone with it
            for output in (tubelet.stdout, tubelet.stderr):
                assert output is not None
                output.close()
            tubelet.wait()
            until(lambda: not local.marked(mark), 60)
        finally:
            if tubelet.poll() is None:
                os.killpg(tubelet.pid, signal.SIGKILL)
    rows = (run / "metrics.jsonl").read_text()
    time.sleep(1)
    assert (run / "metrics.jsonl").read_text() == rows, "somebody still writes"


def marks() -> set[str]:
    """The marks of all starts on this machine."""
    found: set[str] = set()
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        found |= {word.partition("=")[2] for word in words if word.startswith(f"{local.MARK}=")}
    return found


def until(ready: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline_s, f"not ready after {timeout_s} s"
        time.sleep(0.1)
