"""The decode worker: `python -m pretrain.data.worker FD SLOT_BYTES`, started by pool.py, imports numpy and av only.

One JSON line in, one JSON line out. Bytes do not pass through the pipe: the parent puts the video into a shared
memory slot (file descriptor FD), the worker puts the frames there in its place.

    in   {"size": bytes of the video, "frame_numbers": [...], "decoder": "pyav", "facts": {...}}
    out  {"height": ..., "width": ..., "color": ..., "num_bytes": ..., "checksum": crc32 of the video, "decode_s": ...}
         {"error": reason, "detail": text}

The worker may be killed at any moment and leaves nothing behind; it ends when its input does, or with its parent.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import time
import zlib
from typing import Any

import numpy as np

from pretrain.data.decode import VideoFacts, decode_frames
from shards.errors import SampleError

READY = b'{"ready": true}\n'
_PR_SET_PDEATHSIG = 1


def serve(request: dict[str, Any], slot: mmap.mmap) -> dict[str, Any]:
    """Decode the video in the slot and put the frames into the slot. Every failure becomes an answer."""
    start_s = time.perf_counter()
    try:
        video = slot[: request["size"]]
        frame_numbers = np.array(request["frame_numbers"], dtype=np.int32)
        frames = decode_frames(video, frame_numbers, request["decoder"], VideoFacts(**request["facts"]))
        num_bytes = frames.planes_TN.nbytes
        if num_bytes > len(slot):
            raise SampleError("decode", f"{num_bytes} bytes of frames, the index promised at most {len(slot)}")
        np.frombuffer(slot, dtype=np.uint8)[:num_bytes] = frames.planes_TN.reshape(-1)
    except SampleError as error:
        return {"error": error.reason, "detail": str(error)}
    except Exception as error:
        # Whatever a damaged file does to a codec library concerns this sample only; the parent counts and names it.
        return {"error": "decode", "detail": f"{type(error).__name__}: {error}"}
    return {
        "height": frames.height,
        "width": frames.width,
        "color": frames.color,
        "num_bytes": num_bytes,
        "checksum": zlib.crc32(video),
        "decode_s": time.perf_counter() - start_s,
    }


def main(arguments: list[str]) -> None:
    """Answer requests until the input ends."""
    slot_fd, slot_bytes = int(arguments[0]), int(arguments[1])
    # Signals for the trainer reach its whole process group; the trainer alone decides what they mean. The parent
    # started us with them blocked, so that none could strike before this line.
    stop_signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    for number in stop_signals:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals)
    if sys.platform == "linux":
        # A codec that hangs never sees the end of its input: have the kernel end us with the parent.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    slot = mmap.mmap(slot_fd, slot_bytes)
    answers.write(READY)
    for line in sys.stdin.buffer:
        answers.write(json.dumps(serve(json.loads(line), slot)).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
