"""Frames -> a small H.264 mp4 that any player opens. One of the owner files of PyAV.

Legend: T frames, H, W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError


def write_mp4(frames_HW3: Iterable[NDArray[np.uint8]], path: Path, *, rate: float) -> None:
    """Encode RGB frames as H.264 (yuv420p, crf 18, BT.601 limited range, tagged as such).

    Written to a temporary name beside `path` and renamed, so that a file of that name is always whole. Odd sizes are
    padded by one row or column of black, as yuv420p has half the colour resolution.

    Args:
        frames_HW3: RGB frames, uint8, all of one size.
        path: Ends in .mp4; the folder is created.
        rate: Frames per second.

    Raises:
        UserError: `path` does not end in .mp4, or cannot be written.
    """
    if path.suffix.lower() != ".mp4":
        name = path.with_suffix(".mp4") if path.name.strip(".") else path / "NAME.mp4"
        raise UserError(f"output is {path}; it must end in .mp4: use {name}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _encode(frames_HW3, temporary, rate)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output {path} cannot be written ({error.strerror}); give a writable place") from error


def _encode(frames_HW3: Iterable[NDArray[np.uint8]], file: Path, rate: float) -> None:
    stream: Any = None
    container: Any = av.open(str(file), "w", format="mp4")
    with container:
        for frame_HW3 in frames_HW3:
            height, width = frame_HW3.shape[0] + frame_HW3.shape[0] % 2, frame_HW3.shape[1] + frame_HW3.shape[1] % 2
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.options = {"crf": "18", "preset": "veryfast"}
                stream.codec_context.colorspace = 5  # bt470bg, the BT.601 matrix that reformat uses by default
                stream.codec_context.color_range = 1  # limited
            padded_HW3 = np.zeros((height, width, 3), np.uint8)
            padded_HW3[: frame_HW3.shape[0], : frame_HW3.shape[1]] = frame_HW3
            frame = av.VideoFrame.from_ndarray(padded_HW3, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
            for packet in stream.encode(frame):
                container.mux(packet)
        if stream is not None:
            for packet in stream.encode(None):
                container.mux(packet)
