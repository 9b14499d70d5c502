"""The decode worker: `python -m pretrain.data.worker FD SLOT_BYTES [MEMORY_BYTES]`, started by pool.py, imports numpy
and av only.

One JSON line in, one JSON line out. Bytes do not pass through the pipe: the parent puts the video into a shared
memory slot (file descriptor FD), the worker puts the frames there in its place.

    in   {"size": bytes of the video, "frame_numbers": [...], "decoder": "pyav", "facts": {...}}
    out  {"height": ..., "width": ..., "color": ..., "num_bytes": ..., "checksum": crc32 of the video, "decode_s": ...}
         {"error": reason, "detail": text}

The worker may be killed at any moment and leaves nothing behind; it ends when its input does, or with its parent. On
Linux it may take MEMORY_BYTES more than it has when it is ready: a file that makes its decoder ask for more is answered
with "memory", and takes neither the worker nor the node down.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import sys
import time
import zlib
from typing import Any

import numpy as np

from pretrain.data.decode import VideoFacts, decode_frames
from shards.errors import SampleError

READY = b'{"ready": true}\n'
MEMORY_BYTES = 4 << 30
"""A clip of 16 frames of 8192 x 4320 pixels takes 850 MB; its decoder holds as much again."""
_PR_SET_PDEATHSIG = 1


def serve(request: dict[str, Any], slot: mmap.mmap) -> dict[str, Any]:
    """Decode the video in the slot and put the frames into the slot. Every failure becomes an answer."""
    start_s = time.perf_counter()
    try:
        video = slot[: request["size"]]
        frame_numbers = np.array(request["frame_numbers"], dtype=np.int32)
        facts = VideoFacts(**request["facts"])
        memory_N = np.frombuffer(slot, dtype=np.uint8)
        frames = decode_frames(video, frame_numbers, request["decoder"], facts, memory_N)
    except SampleError as error:
        is_short = error.reason == "decode" and not _has_room(request["facts"])
        return {"error": "memory" if is_short else error.reason, "detail": str(error)}
    except Exception as error:
        # Whatever a damaged file does to a codec library concerns this sample only; the parent counts and names it.
        return {"error": "decode", "detail": f"{type(error).__name__}: {error}"}
    return {
        "height": frames.height,
        "width": frames.width,
        "color": frames.color,
        "num_bytes": frames.planes_TN.nbytes,
        "checksum": zlib.crc32(video),
        "decode_s": time.perf_counter() - start_s,
    }


def _has_room(facts: dict[str, int]) -> bool:
    """Whether this process may still take the frames that a decoder keeps: 16 references and a few under way.

    Codecs report a frame that they could not get as damage to the file.
    """
    try:
        np.empty(20 * facts["height"] * facts["width"] * 3 // 2, dtype=np.uint8)  # asked for, never touched
    except MemoryError:
        return False
    return True


def main(arguments: list[str]) -> None:
    """Answer requests until the input ends."""
    slot_fd, slot_bytes, memory_bytes = (*map(int, arguments), MEMORY_BYTES)[:3]
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
    _limit_memory(memory_bytes)
    answers.write(READY)
    for line in sys.stdin.buffer:
        answers.write(json.dumps(serve(json.loads(line), slot)).encode() + b"\n")


def _limit_memory(more_bytes: int) -> None:
    """Let this process take so much more address space. On Linux only: elsewhere the call is refused or ignored."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            most_bytes = int(statm.read().split()[0]) * resource.getpagesize() + more_bytes
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        allowed = [most_bytes, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(allowed), hard))


if __name__ == "__main__":
    main(sys.argv[1:])
