"""Tiny videos made with PyAV, and a packed set of them and of the bundled clips."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from pretrain.sections import DataConfig
from shards.manifest import build_manifest
from shards.pack import PackOptions, pack
from tests.pretrain.data.streams import copy_samples

CLIPS = Path(__file__).parents[3] / "configs" / "clips"


def make_video(
    *,
    num_frames: int = 40,
    width: int = 64,
    height: int = 48,
    codec: str = "libx264",
    container: str = "mp4",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    times_ms: Sequence[int] | None = None,
    color: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> bytes:
    """A video of moving noise, or of one colour. `times_ms` makes the rate variable."""
    file = io.BytesIO()
    rng = np.random.default_rng(seed)
    canvas = rng.integers(0, 256, (height // 4 + num_frames, width // 4 + num_frames, 3), dtype=np.uint8)
    canvas = canvas.repeat(4, axis=0).repeat(4, axis=1)
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, 1000)
        for n in range(num_frames):
            rgb = canvas[3 * n : 3 * n + height, 2 * n : 2 * n + width] if color is None else np.empty_like(canvas)
            if color is not None:
                rgb = np.broadcast_to(np.array(color, dtype=np.uint8), (height, width, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(format=pixel_format)
            frame.time_base = Fraction(1, 1000)
            frame.pts = 40 * n if times_ms is None else times_ms[n]
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def decode_everything(video: bytes) -> NDArray[np.uint8]:
    """Every frame as I420 rows [frames, bytes], by the plainest way there is."""
    with av.open(io.BytesIO(video)) as container:
        frames = sorted(container.decode(video=0), key=lambda frame: frame.pts or 0)
        return np.stack([frame.to_ndarray(format="yuv420p").reshape(-1) for frame in frames])


@pytest.fixture(scope="session", name="make_video")
def make_video_fixture() -> Callable[..., bytes]:
    return make_video


@pytest.fixture(scope="session", name="decode_everything")
def decode_everything_fixture() -> Callable[[bytes], NDArray[np.uint8]]:
    return decode_everything


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of three sizes and at most 24 frames, one of 10 frames; in several tars; one split."""
    folder = tmp_path_factory.mktemp("packed")
    films = folder / "films"
    shutil.copytree(CLIPS, films)
    (films / "square.mp4").write_bytes(make_video(num_frames=48, width=64, height=64))
    (films / "tall.mp4").write_bytes(make_video(num_frames=10, width=48, height=80, seed=1))
    options = PackOptions(short_side=48, max_frames=24, min_frames=8, val_fraction=0.0, shard_bytes=60_000, workers=1)
    pack(films, folder / "set", options, None)
    return folder / "set"


@pytest.fixture
def packed_copy(packed: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@pytest.fixture(scope="session")
def data(packed: Path) -> Callable[..., DataConfig]:
    """Make a data section for the packed set: small clips, in-process decoding, unless told otherwise."""

    def make(**values: Any) -> DataConfig:
        defaults: dict[str, Any] = {"shards": str(packed), "frames": 4, "stride": 4, "size": 32, "workers": 0}
        return DataConfig(**{**defaults, "flip": True, **values})

    return make


@pytest.fixture(scope="session")
def twelve_made(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twelve") / "set"
    copy_samples(packed, folder, 0, range(12))
    build_manifest(folder, "train")
    return folder


@pytest.fixture
def twelve(twelve_made: Path, tmp_path: Path) -> Path:
    """Twelve samples in one tar, to change at will."""
    folder = tmp_path / "twelve"
    folder.mkdir()
    for path in twelve_made.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
