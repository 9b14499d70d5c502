"""The training encode: short side, at most so many frames/s, and a stride grid that decodes without its neighbours.

A training clip takes every `stride`-th frame. The encode makes just those frames references (between two of them lie
B frames that nothing refers to), in closed groups whose length is a multiple of the stride, so a decoder that is given
the frames of this grid alone decodes a quarter of all frames at stride 4 and still gets bit-identical pictures. Whether
that came true is checked on the bytes written, not assumed: a sample that fails is refused. One encoder thread: x264
writes other bytes with two.

For clips of so many frames a second, whatever the source (`for_rate`), frames are written at the largest multiple of
that rate that source and `max_rate` allow, at most 8 times it, and that multiple is the grid.

Frames are written evenly spaced at the rate usual in the sample, as 8-bit BT.601 or BT.709 4:2:0 in limited range, with
tags, rotation and pixel aspect applied, even sizes.
"""

from __future__ import annotations

import io
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream
from numpy.typing import NDArray

from shards.cadence import Cadence, find_cadence
from shards.layout import MATRIX_BT709
from shards.mp4 import read_table
from shards.probe import Facts, Limits, Rejected, read_frames

CRF = 23
LONGEST_GOP = 64
LUMA_BLOCK = 8
SWS_SPACE = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
"""AVColorSpace tag -> swscale's name for the matrix."""
SWS_BT601, SWS_BT709 = 5, 1
SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
PLANAR_420 = ("yuv420p", "yuvj420p")


def _x264_cpu() -> dict[str, str]:
    """Keep x264 from AVX-512: with it the same frames give other bytes now and then (seen with the x264 in PyAV's
    wheels: poison the heap with MALLOC_PERTURB_ and compare; only with mbtree). Other processors are left alone.
    """
    path = Path("/proc/cpuinfo")
    return {"asm": "AVX2"} if path.exists() and " avx512f" in path.read_text() else {}


X264_CPU = _x264_cpu()


@dataclass(frozen=True)
class Encoding:
    """How samples are cut and written."""

    short_side: int = 256
    max_frames: int = 128
    max_rate: float = 30.0
    stride: int = 4
    min_frames: int = 16
    for_rate: float | None = None
    """Frames/s of the clips that will be taken; sets the grid instead of `stride`. Slower sources keep their rate."""


@dataclass(frozen=True)
class Sample:
    """One encoded piece of a file, with what its record needs."""

    video: bytes
    start_s: float
    num_frames: int
    rate: float
    width: int
    height: int
    grid: int
    motion: float
    matrix: int
    full_range: bool


def encode_file(
    path: Path, facts: Facts, encoding: Encoding, limits: Limits, on_frame: Callable[[], None]
) -> Iterator[Sample]:
    """The samples of a probed file, in order of time. Raises Rejected if it is too short or does not decode again."""
    cadence = find_cadence(facts, max_rate=encoding.max_rate, stride=encoding.stride, for_rate=encoding.for_rate)
    kept = cadence.kept
    check_length(len(kept), encoding)
    times_s = [facts.times_s[number] for number in kept]
    bounds = piece_bounds(len(kept), encoding.max_frames)
    coded_size, transform = _coded_size(facts, encoding.short_side), facts.transform
    wanted = iter(kept)
    next_kept = next(wanted, None)
    writer: _Writer | None = None
    done = 0
    for number, (frame, _) in enumerate(read_frames(path, limits)):
        on_frame()
        if number != next_kept:
            continue
        next_kept = next(wanted, None)
        if writer is None:
            start, end = bounds[0]
            rate = cadence.rate_between(facts.times_s, kept[start], kept[end - 1])
            writer = _Writer(_shown_size(coded_size, transform), rate, cadence, facts)
        writer.add(_picture(frame, facts, coded_size))
        done += 1
        if done == bounds[0][1]:
            start, end = bounds.pop(0)
            yield writer.finish(times_s[start], end - start)
            writer = None
    if done != len(kept):
        raise Rejected("damaged", f"{len(kept)} frames to keep, {done} came the second time")


def check_length(num_frames: int, encoding: Encoding) -> None:
    """Raise Rejected if so few frames make no sample."""
    if num_frames < encoding.min_frames:
        raise Rejected("too_short", f"{num_frames} frames; pack.min_frames is {encoding.min_frames}")


def piece_bounds(num_frames: int, max_frames: int) -> list[tuple[int, int]]:
    """Cut a film into the fewest pieces of at most `max_frames`, as equal as can be: no short rest, nothing lost."""
    num_pieces = -(-num_frames // max_frames)
    edges = [num_frames * piece // num_pieces for piece in range(num_pieces + 1)]
    return list(itertools.pairwise(edges))


def luma_blocks(frame: VideoFrame) -> NDArray[np.float32]:
    """Mean luma of 8x8 pixel blocks, [rows, columns]: coarse enough to ignore noise, fine enough to see motion."""
    if frame.format.name not in PLANAR_420:
        frame = frame.reformat(format="yuv420p")
    plane = frame.planes[0]
    luma = np.frombuffer(cast("Any", plane), np.uint8).reshape(-1, plane.line_size)
    rows, columns = max(frame.height // LUMA_BLOCK, 1), max(frame.width // LUMA_BLOCK, 1)
    tall, wide = min(frame.height, LUMA_BLOCK), min(frame.width, LUMA_BLOCK)
    blocks = luma[: rows * tall, : columns * wide].reshape(rows, tall, columns, wide)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


class Motion:
    """Mean absolute change of luma between frames a stride apart, in grey levels."""

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self._last: NDArray[np.float32] | None = None
        self._sum = 0.0
        self._count = 0

    def add(self, frame: VideoFrame, number: int) -> None:
        """Look at frame `number` of the video."""
        if number % self._stride:
            return
        luma = luma_blocks(frame)
        if self._last is not None:
            self._sum += float(np.abs(luma - self._last).mean())
            self._count += 1
        self._last = luma

    @property
    def score(self) -> float:
        """The mean so far, 0 if there was nothing to compare."""
        return self._sum / self._count if self._count else 0.0


class _Writer:
    """One mp4 in memory."""

    def __init__(self, size: tuple[int, int], rate: Fraction, cadence: Cadence, facts: Facts) -> None:
        self._rate = rate
        self._stride, self._grid = cadence.stride, cadence.grid
        self._matrix = facts.matrix
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4", options={"fflags": "+bitexact"})
        output = cast("Any", self._container)  # its stubs leave **kwargs and packet types unknown
        self._mux: Callable[[Any], None] = output.mux
        self._stream: VideoStream = output.add_stream("libx264", rate=rate)
        self._encode: Callable[[VideoFrame | None], Any] = cast("Any", self._stream).encode
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"
        self._stream.time_base = 1 / rate
        context = self._stream.codec_context
        context.time_base = 1 / rate
        context.thread_count = 1
        context.color_range = 1
        if facts.matrix == MATRIX_BT709:
            context.colorspace, default = 1, 1
        else:
            context.colorspace, default = (5 if facts.colorspace == 5 else 6), 6
        context.color_primaries = facts.primaries if _is_tagged(facts.primaries) else default
        context.color_trc = facts.transfer if _is_tagged(facts.transfer) else default
        context.options = {"crf": str(CRF), "x264-params": self._x264_params()}
        self._tags = (context.colorspace, context.color_range)
        self._count = 0

    def _x264_params(self) -> str:
        gop = max(LONGEST_GOP // self._grid, 1) * self._grid
        words = {
            "threads": 1,
            "keyint": gop,
            "min-keyint": gop,
            "scenecut": 0,
            "open-gop": 0,
            "bframes": self._grid - 1,
            "b-adapt": 0,
            "b-pyramid": "none",
            "cabac": 0,
            "no-deblock": 1,
            **X264_CPU,
        }
        return ":".join(f"{name}={value}" for name, value in words.items())

    def add(self, frame: VideoFrame) -> None:
        frame.pts = self._count
        frame.time_base = 1 / self._rate
        frame.pict_type = PictureType.NONE  # a type left from decoding would be forced on the encoder
        frame.colorspace, frame.color_range = self._tags
        self._count += 1
        self._mux(self._encode(frame))

    def finish(self, start_s: float, num_frames: int) -> Sample:
        self._mux(self._encode(None))
        self._container.close()
        video = self._buffer.getvalue()
        motion = inspect(video, num_frames, grid=self._grid, stride=self._stride)
        return Sample(
            video=video,
            start_s=start_s,
            num_frames=num_frames,
            rate=float(self._rate),
            width=self._stream.width,
            height=self._stream.height,
            grid=self._grid,
            motion=motion,
            matrix=self._matrix,
            full_range=False,
        )


def inspect(video: bytes, num_frames: int, *, grid: int, stride: int) -> float:
    """Decode an encoded sample and return its motion score.

    Raises Rejected unless exactly `num_frames` frames decode, and those on the grid are references that decode bit for
    bit alike when the decoder is given nothing else.
    """
    motion = Motion(stride)
    all_pts: list[int] = []
    checksums: list[int] = []
    for frame in _decode_again(video, skip=False):
        motion.add(frame, len(all_pts))
        if len(all_pts) % grid == 0:
            checksums.append(_checksum(frame))
        all_pts.append(cast("int", frame.pts))
    if len(all_pts) != num_frames:
        raise Rejected("encode", f"{num_frames} frames were encoded, {len(all_pts)} decode")
    references = {frame.pts for frame in _decode_again(video, skip=True)}
    if not references.issuperset(all_pts[::grid]):
        raise Rejected("encode", f"not every frame on the grid of {grid} is a reference")
    if [_checksum(frame) for frame in _decode_grid(video, num_frames, grid)] != checksums:
        raise Rejected("encode", f"the frames on the grid of {grid} decode otherwise without the frames between them")
    return motion.score


def _checksum(frame: VideoFrame) -> int:
    return zlib.crc32(frame.to_ndarray().tobytes())


def _decode_again(video: bytes, *, skip: bool) -> Iterator[VideoFrame]:
    try:
        with av.open(io.BytesIO(video), mode="r", format="mov", options={"err_detect": "explode"}) as container:
            stream = container.streams.video[0]
            context: VideoCodecContext = stream.codec_context
            context.thread_count = 1
            context.options = {"err_detect": "explode"}
            context.skip_frame = "NONREF" if skip else "DEFAULT"
            yield from container.decode(stream)
    except FFmpegError as error:
        raise Rejected("encode", f"the encoded sample does not decode: {error}") from error


def _decode_grid(video: bytes, num_frames: int, grid: int) -> Iterator[VideoFrame]:
    """The frames on the grid, from their packets alone."""
    table = read_table(video, num_frames)
    if table is None:
        raise Rejected("encode", "the encoded sample has tables of another kind than expected")
    context = VideoCodecContext.create("h264", "r")
    context.extradata = table.config
    context.thread_count = 1
    numbers = np.arange(0, num_frames, grid, dtype=np.int32)
    packets = [Packet(cast("Any", content)) for content, _ in table.packets(video, numbers, grid)]
    try:
        for packet in [*packets, None]:
            yield from cast("Any", context).decode(packet)
    except FFmpegError as error:
        raise Rejected("encode", f"the frames on the grid do not decode alone: {error}") from error


def _coded_size(facts: Facts, short_side: int) -> tuple[int, int]:
    """Width and height to scale to, before rotation: square pixels, short side at most `short_side`, even."""
    width, height = facts.width * facts.pixel_aspect, float(facts.height)
    factor = min(1.0, short_side / min(width, height))
    return max(2, 2 * round(width * factor / 2)), max(2, 2 * round(height * factor / 2))


def _shown_size(coded_size: tuple[int, int], transform: tuple[int, int, int, int]) -> tuple[int, int]:
    width, height = coded_size
    return (width, height) if transform[0] else (height, width)


def _picture(frame: VideoFrame, facts: Facts, coded_size: tuple[int, int]) -> VideoFrame:
    """The frame as it is shown and stored."""
    target = SWS_BT709 if facts.matrix == MATRIX_BT709 else SWS_BT601
    converted = frame.reformat(
        width=coded_size[0],
        height=coded_size[1],
        format="yuv420p",
        src_colorspace=SWS_SPACE.get(facts.colorspace, target),
        dst_colorspace=target,
        interpolation=int(SCALER),
        src_color_range=2 if facts.full_range else 1,
        dst_color_range=1,
        threads=1,
    )
    if facts.transform == (1, 0, 0, 1):
        return converted
    width, height = coded_size
    planes = cast("NDArray[np.uint8]", converted.to_ndarray()).reshape(-1)
    num_luma = width * height
    luma = turned(planes[:num_luma].reshape(height, width), facts.transform)
    chroma = planes[num_luma:].reshape(2, height // 2, width // 2)
    parts = [luma, *(turned(plane, facts.transform) for plane in chroma)]
    flat = np.concatenate([part.reshape(-1) for part in parts])
    return VideoFrame.from_ndarray(flat.reshape(-1, luma.shape[1]), format="yuv420p")


def turned(plane: NDArray[np.uint8], transform: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """A plane [rows, columns] as its display matrix (a, b, c, d) shows it: x' = ax + cy, y' = bx + dy."""
    a, b, c, d = transform
    across, down = (a, d) if a else (c, b)
    shown = plane if a else plane.T
    return shown[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def _is_tagged(value: int) -> bool:
    return value not in (0, 2)
