from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.decode import VideoFacts, decode_frames
from pretrain.data.worker import READY

MakeVideo = Callable[..., bytes]
Ask = Callable[[bytes, list[int], VideoFacts], dict[str, Any]]
ROOT = Path(__file__).parents[3]
SLOT_BYTES = 4 << 20
SMALL = VideoFacts(num_frames=40, height=48, width=64)


@contextmanager
def running(*arguments: int) -> Generator[tuple[Ask, mmap.mmap]]:
    with tempfile.TemporaryFile() as file:
        file.truncate(SLOT_BYTES)
        slot = mmap.mmap(file.fileno(), SLOT_BYTES)
        command = [sys.executable, "-m", "pretrain.data.worker", str(file.fileno()), str(SLOT_BYTES)]
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(file.fileno(),),
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def ask(video: bytes, frame_numbers: list[int], facts: VideoFacts) -> dict[str, Any]:
            slot[: len(video)] = video
            request = {"size": len(video), "frame_numbers": frame_numbers, "decoder": "pyav", "facts": asdict(facts)}
            requests.write(json.dumps(request).encode() + b"\n")
            requests.flush()
            return json.loads(answers.readline())

        try:
            assert answers.readline() == READY
            yield ask, slot
            requests.close()
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            answers.close()


def test_frames_lie_in_the_slot(make_video: MakeVideo) -> None:
    video = make_video()
    expected = decode_frames(video, np.array([3, 30], np.int32), "pyav", SMALL)
    with running() as (ask, slot):
        answer = ask(video, [3, 30], SMALL)
        assert (answer["height"], answer["width"], answer["color"]) == (48, 64, 0)
        assert answer["checksum"] == zlib.crc32(video)
        assert answer["num_bytes"] == expected.planes_TN.size
        assert slot[: answer["num_bytes"]] == expected.planes_TN.tobytes()


def test_frames_that_the_slot_cannot_hold_are_refused(make_video: MakeVideo) -> None:
    with running() as (ask, _):
        video = make_video(width=640, height=480, num_frames=16, color=(90, 90, 90))
        answer = ask(video, list(range(16)), VideoFacts(num_frames=16, height=480, width=640))
        assert answer["error"] == "decode"
        assert "room for" in answer["detail"]


def test_a_video_that_needs_too_much_memory_takes_nothing_down(make_video: MakeVideo) -> None:
    """Frames of 2048 x 1152 do not fit into 10 MiB; the worker says so and goes on."""
    large = make_video(width=2048, height=1152, num_frames=2, color=(90, 90, 90))
    facts = VideoFacts(num_frames=2, height=1152, width=2048)
    assert len(large) < SLOT_BYTES
    video = make_video()
    with running(10 << 20) as (ask, _):
        for _ in range(3):
            answer = ask(large, [0], facts)
            assert answer == {"error": "memory", "detail": answer["detail"]}
            assert "num_bytes" in ask(video, [3], SMALL)
    with running() as (ask, _):
        assert ask(large, [0], facts)["num_bytes"] == 2048 * 1152 * 3 // 2
