"""Small synthetic videos, made with PyAV, and one packed data set shared by the tests that only read."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from shards.pack import PackOptions, PackSummary, pack

CLIPS = Path(__file__).resolve().parents[2] / "configs" / "clips"


def moving_bars(number: int, width: int, height: int) -> np.ndarray:
    """RGB frame [height, width, 3] with soft bars that move by two pixels per frame."""
    x = (np.arange(width)[None, :] + 2 * number) % 32
    y = np.arange(height)[:, None]
    return np.stack(np.broadcast_arrays(x * 7, y * 200 // height, x * 3 + y * 100 // height), axis=2).astype(np.uint8)


def write_video(
    path: Path,
    num_frames: int = 32,
    *,
    width: int = 64,
    height: int = 48,
    rate: Fraction | int = 25,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    frames: Callable[[int], Any] | None = None,
    times: Callable[[int], int] | None = None,
    time_base: Fraction | None = None,
    tags: dict[str, int] | None = None,
    rotation: int = 0,
    hflip: bool = False,
    pixel_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    with_audio: bool = False,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode frames (RGB arrays or VideoFrames by number) into a new file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container_options or {}) as container:
        container.metadata["title"] = "/".join(path.parts[-3:])  # no two files of a test have the same bytes
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.thread_count = 1
        if codec == "libx264":
            stream.options = {"preset": "ultrafast", "crf": "20", **(options or {})}
        elif options:
            stream.options = options
        if time_base is not None:
            stream.time_base = stream.codec_context.time_base = time_base
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation or hflip:
            stream.set_display_rotation(rotation, hflip=hflip)
        audio: Any = container.add_stream("aac", rate=16000, layout="mono") if with_audio else None
        for number in range(num_frames):
            made = frames(number) if frames else moving_bars(number, width, height)
            frame = made if isinstance(made, av.VideoFrame) else av.VideoFrame.from_ndarray(made, format="rgb24")
            frame.pts = times(number) if times else number
            frame.time_base = time_base or 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio is not None:
            write_silence(container, audio, num_frames / float(rate))
    return path


def write_silence(container: Any, stream: Any, duration_s: float) -> None:
    for number in range(max(1, int(duration_s * 16000 / 1024))):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, number * 1024, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


@pytest.fixture(scope="session")
def make_video() -> Callable[..., Path]:
    return write_video


@pytest.fixture(scope="session")
def clips() -> Path:
    """The folder of the three bundled films."""
    return CLIPS


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PackSummary]:
    """The bundled films packed small, two of them with labels and given splits. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("packed")
    rows = [
        {"path": str(CLIPS / "city_320x180_h264.mp4"), "label": "city", "split": "train", "group": "city"},
        {"path": str(CLIPS / "bbb_320x180_vp9.webm"), "label": "bunny", "split": "train", "group": "bbb"},
        {"path": str(CLIPS / "sintel_320x180_h264.mp4"), "split": "val", "group": "sintel"},
    ]
    listing = folder / "films.jsonl"
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PackOptions(short_side=64, max_frames=48, shard_bytes=60_000, workers=2)
    summary = pack(listing, folder / "data", options)
    return folder / "data", summary
