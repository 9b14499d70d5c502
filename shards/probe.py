"""Decode a video file once, fully: its facts, or the reason why it is rejected.

A decode that "worked" proves little (flipped bytes decode to the right number of frames without a word), so errors are
made fatal, times must rise, and the frames that came are compared with what the container claims. A file is opened with
the demuxer that its first bytes name, from a list of containers: a playlist, which could name other files, has none.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from shards.layout import MATRIX_BT601, MATRIX_BT709

COUNT_TOLERANCE = 0.02
BT709_MIN_HEIGHT = 720
"""Untagged video of at least this height is taken as BT.709, smaller as BT.601, as players do."""
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
UNTAGGED = (0, 2)
BT2020 = 9
"""Number of its primaries and of its non-constant matrix."""
NO_PLAIN_MATRIX = {10: "BT.2020 constant-luminance", 13: "constant-luminance", 14: "ICtCp"}
"""Matrices for which no product of three numbers gives the colours back."""
TAGGED_BT601 = (4, 5, 6)
TAGGED_BT709 = (1, 7, 9, 10)
"""SMPTE 240M and BT.2020 have matrices of their own; the training encode converts them to BT.709."""
GAP_SLACK = 0.98
TIMESTAMP_JITTER_S = 0.0006
"""Matroska rounds times to milliseconds."""


class Rejected(Exception):  # an outcome, not a failure of ours
    """This file is not used. `reason` is a short word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Limits:
    """What one file may cost. Set before anything is decoded."""

    max_pixels: int = 8192 * 4320
    max_duration_s: float = 6 * 3600.0
    max_frames: int = 3_000_000
    max_streams: int = 32
    memory_bytes: int = 4 << 30
    """Address space of the child process, beyond what it has before it opens a file."""
    stall_cpu_s: int = 60
    """CPU seconds without a further frame before the child is ended."""


@dataclass(frozen=True)
class Facts:
    """What one full decode showed. Sizes are as coded, before `transform` and pixel aspect are applied."""

    demuxer: str
    codec: str
    pixel_format: str
    width: int
    height: int
    pixel_aspect: float
    transform: tuple[int, int, int, int]
    """2x2 display matrix (a, b, c, d) of -1, 0, 1: where the coded x and y axes point on the screen."""
    colorspace: int
    """As tagged (AVColorSpace); 2 where the file is silent."""
    primaries: int
    transfer: int
    matrix: int
    full_range: bool
    nominal_rate: float
    """Frames per second that the container claims, 0 for unknown."""
    is_first_video: bool
    times_s: list[float] = field(repr=False)
    """When each frame is shown, rising, from 0 on."""

    @property
    def num_frames(self) -> int:
        """Frames that really decode."""
        return len(self.times_s)


MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftyp", "mov"),
    (4, b"moov", "mov"),
    (4, b"mdat", "mov"),
    (4, b"wide", "mov"),
    (4, b"free", "mov"),
    (4, b"skip", "mov"),
    (0, b"\x1aE\xdf\xa3", "matroska"),
    (8, b"AVI ", "avi"),
    (0, b"\x00\x00\x01\xba", "mpeg"),
    (0, b"OggS", "ogg"),
    (0, b"FLV\x01", "flv"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
)
TS_PACKETS = ((0, 188), (4, 192))
"""(offset of the sync byte, packet length) of MPEG-TS and of its Blu-ray form."""


def sniff(head: bytes) -> str | None:
    """The demuxer for a file that begins with these bytes (600 are enough), None if it is no container on the list."""
    for offset, magic, demuxer in MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return demuxer
    for offset, length in TS_PACKETS:
        if len(head) > offset + 2 * length and head[offset : offset + 2 * length + 1 : length] == b"GGG":
            return "mpegts"
    return None


@contextmanager
def open_video(path: Path, limits: Limits) -> Generator[tuple[InputContainer, VideoStream]]:
    """The container and its main video stream, errors fatal, one thread. Raises Rejected."""
    with path.open("rb") as file:
        head = file.read(600)
    if not head:
        raise Rejected("empty", "the file has no bytes")
    demuxer = sniff(head)
    if demuxer is None:
        raise Rejected("format", "its first bytes are of no video container that is read")
    options = {
        "err_detect": "explode",
        "max_streams": str(limits.max_streams),
        "protocol_whitelist": "file",
    }
    try:
        container = av.open(str(path.absolute()), mode="r", format=demuxer, options=options)
    except (FFmpegError, UnicodeError) as error:
        raise Rejected("unreadable", f"{demuxer}: {words_of(error)}") from error
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise Rejected("no_video", f"{len(container.streams)} streams, none of them video")
        context = stream.codec_context
        context.thread_count = 1
        context.options = {"err_detect": "explode", "max_pixels": str(limits.max_pixels)}
        if context.width * context.height > limits.max_pixels:
            raise Rejected("too_large", f"{context.width}x{context.height} pixels")
        if container.duration is not None and container.duration / 1e6 > limits.max_duration_s:
            raise Rejected("too_long", f"claims {container.duration / 1e6:.0f} s")
        yield container, stream


def read_frames(path: Path, limits: Limits) -> Iterator[tuple[VideoFrame, float]]:
    """Every frame of the main video stream with its time in seconds. Raises Rejected at the first fault."""
    with open_video(path, limits) as (container, stream):
        for frame in _decode(container, stream, [0.0], [0]):
            yield frame, _time_s(frame)


def probe(path: Path, limits: Limits, on_frame: Callable[[VideoFrame, int], None]) -> Facts:
    """Decode the whole file; `on_frame` sees every frame and its number. Raises Rejected with the reason."""
    first: VideoFrame | None = None
    times_s: list[float] = []
    ends_s = [0.0]
    num_discarded = [0]
    with open_video(path, limits) as (container, stream):
        claim = _claim(container, stream)
        for frame in _decode(container, stream, ends_s, num_discarded):
            if first is None:
                first = frame
                if kind := hdr_kind(first):
                    raise Rejected("hdr", f"{kind} video must be tone-mapped before packing")
            time_s = _time_s(frame)
            if times_s and time_s < times_s[-1]:
                raise Rejected("timestamps", f"time goes backwards at frame {len(times_s)}, {times_s[-1]:.3f} s")
            if (frame.width, frame.height) != (first.width, first.height):
                raise Rejected("size_changes", f"{first.width}x{first.height}, then {frame.width}x{frame.height}")
            times_s.append(time_s)
            if len(times_s) > limits.max_frames or time_s - times_s[0] > limits.max_duration_s:
                raise Rejected("too_long", f"more than {limits.max_duration_s:.0f} s or {limits.max_frames} frames")
            on_frame(frame, len(times_s) - 1)
        if first is None:
            raise Rejected("no_video", "no frame decodes")
        claim.check(len(times_s) + num_discarded[0], ends_s[0])
        return facts_of(container, stream, first, [time_s - times_s[0] for time_s in times_s])


def keep_evenly(times_s: list[float], max_rate: float) -> list[int]:
    """Numbers of the frames to keep so that none follows the last kept one sooner than 1 / max_rate.

    Spacing stays even for an even source: 60 frames/s become 30, 50 become 25, 48 become 24. Rates up to 2 % above
    `max_rate` pass as they are.
    """
    gap_s = GAP_SLACK / max_rate - TIMESTAMP_JITTER_S
    kept: list[int] = []
    for number, time_s in enumerate(times_s):
        if not kept or time_s - times_s[kept[-1]] >= gap_s:
            kept.append(number)
    return kept


@dataclass(frozen=True)
class _Claim:
    """What the container says it holds: frames where it counts them, seconds where it does not."""

    num_frames: int
    duration_s: float
    start_s: float
    rate: float

    def check(self, num_frames: int, end_s: float) -> None:
        if self.num_frames and abs(num_frames - self.num_frames) > COUNT_TOLERANCE * self.num_frames:
            raise Rejected("count", f"the container claims {self.num_frames} frames, {num_frames} decode")
        seen_s = end_s - self.start_s
        slack_s = max(COUNT_TOLERANCE * self.duration_s, 2 / self.rate if self.rate else 0.1)  # two frames at least
        if not self.num_frames and seen_s < self.duration_s - slack_s:
            raise Rejected("count", f"the container claims {self.duration_s:.2f} s, {seen_s:.2f} s can be read")


def _claim(container: InputContainer, stream: VideoStream) -> _Claim:
    num_frames = stream.frames
    if num_frames and container.format.name.startswith("mov"):
        # An edit list takes frames out of the index but not out of the count.
        num_frames = min(num_frames, len(stream.index_entries) or num_frames)
    start_s = (container.start_time or 0) / 1e6
    rate = float(stream.average_rate or 0)
    duration_s = (container.duration or 0) / 1e6
    if container.format.name == "avi":
        # AVI counts the empty chunks that repeat a frame; those are never delivered. Compare times instead.
        duration_s, num_frames = (num_frames / rate if rate else duration_s), 0
    return _Claim(num_frames, duration_s, start_s, rate)


def _decode(
    container: InputContainer, stream: VideoStream, ends_s: list[float], num_discarded: list[int]
) -> Iterator[VideoFrame]:
    """Frames in order. `ends_s[0]` becomes the latest end over all streams, `num_discarded[0]` the hidden packets."""
    try:
        for packet in container.demux():
            if packet.pts is not None and packet.time_base:
                end_s = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                ends_s[0] = max(ends_s[0], end_s)
            if packet.stream_index != stream.index:
                continue
            if packet.is_corrupt:
                raise Rejected("damaged", f"a packet is cut or corrupt at {ends_s[0]:.2f} s")
            num_discarded[0] += packet.is_discard
            for frame in cast("list[VideoFrame]", packet.decode()):
                if frame.is_corrupt:
                    raise Rejected("damaged", f"a frame is corrupt at {ends_s[0]:.2f} s")
                yield frame
    except FFmpegError as error:
        if error.errno == 12:
            raise MemoryError(str(error)) from error
        raise Rejected("damaged", f"{words_of(error)} at {ends_s[0]:.2f} s") from error


def _time_s(frame: VideoFrame) -> float:
    if frame.pts is None or frame.time_base is None:
        raise Rejected("timestamps", "a frame has no time")
    return float(frame.pts * frame.time_base)


def facts_of(container: InputContainer, stream: VideoStream, first: VideoFrame, times_s: list[float]) -> Facts:
    """Facts from an opened file, its first frame, and the times of all."""
    return Facts(
        demuxer=container.format.name,
        codec=stream.codec_context.name,
        pixel_format=first.format.name,
        width=first.width,
        height=first.height,
        pixel_aspect=_pixel_aspect(stream.sample_aspect_ratio),
        transform=_transform(first),
        colorspace=first.colorspace,
        primaries=first.color_primaries,
        transfer=first.color_trc,
        matrix=matrix_of(first.colorspace, first.height),
        full_range=first.color_range == 2 or first.format.name.startswith("yuvj"),
        nominal_rate=float(stream.average_rate or 0),
        is_first_video=stream.index == container.streams.video[0].index,
        times_s=times_s,
    )


def hdr_kind(frame: VideoFrame) -> str:
    """What of a frame needs more than a matrix to be seen as it was meant, "" for nothing."""
    if frame.color_trc in HDR_TRANSFERS:
        return HDR_TRANSFERS[frame.color_trc]
    if frame.colorspace in NO_PLAIN_MATRIX:
        return NO_PLAIN_MATRIX[frame.colorspace]
    is_wide = BT2020 in (frame.colorspace, frame.color_primaries)
    is_deep = frame.format.components[0].bits > 8
    # Ten bits of BT.2020 without a transfer curve are HDR that lost its tag far more often than anything else.
    return "untagged 10-bit BT.2020" if is_wide and is_deep and frame.color_trc in UNTAGGED else ""


def matrix_of(colorspace: int, height: int) -> int:
    """MATRIX_ number for a tag (AVColorSpace), for untagged video by its height."""
    if colorspace in TAGGED_BT601 or colorspace in TAGGED_BT709:
        return MATRIX_BT709 if colorspace in TAGGED_BT709 else MATRIX_BT601
    return MATRIX_BT709 if height >= BT709_MIN_HEIGHT else MATRIX_BT601


def _pixel_aspect(ratio: Fraction | None) -> float:
    """Width of a pixel over its height; nonsense counts as square."""
    return float(ratio) if ratio and 0.1 < ratio < 10 else 1.0


def _transform(frame: VideoFrame) -> tuple[int, int, int, int]:
    """The frame's display matrix, rounded to quarter turns and flips."""
    all_data = cast("Iterator[SideData]", iter(frame.side_data))
    matrix = next((bytes(data) for data in all_data if data.type.name == "DISPLAYMATRIX"), b"")
    if len(matrix) != 36:
        return (1, 0, 0, 1)
    values = [int.from_bytes(matrix[4 * i : 4 * i + 4], "little", signed=True) for i in (0, 1, 3, 4)]
    a, b, c, d = ((value > 0) - (value < 0) for value in values)
    return (0, b or 1, c or 1, 0) if abs(values[1]) > abs(values[0]) else (a or 1, 0, 0, d or 1)


def words_of(error: Exception) -> str:
    """What FFmpeg says went wrong."""
    text = getattr(error, "strerror", None) or str(error)
    return str(text).lower()
