"""Bytes of a video + frame numbers -> uint8 frames. Owner of decord.

Imports numpy and av only (decord when it is asked for), so that a worker starts in 0.15 s.

PyAV is the default. It is the faster one (tests/bench/RESULTS.md has the figures): on packed samples it decodes a
quarter of the frames and gives planes as they are, where decord decodes everything in between and makes RGB. And
it cannot hang: every loop here ends with the packets of the file, while loops in decord (`SkipFramesImpl`,
`CheckKeyFrame`) wait for a frame that may never come, with the GIL held; there only the deadline of the pool helps.
decord also gives wrong frames, and does not say so, of files with open GOPs, in program streams, and of rotated films:
such files are refused for it.

Frame n is the n-th frame in order of presentation among those that decode. Frames come as the decoder made them: 8-bit
4:2:0 planes (I420), half the bytes of RGB; another pixel format is converted here. Odd sizes lose their last
row or column. Rotation tags are not applied (packing has applied them).

Legend: T frames, N bytes per frame.
"""

from __future__ import annotations

import errno
import importlib.util
import io
import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import av
import av.logging
import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray

from shards.errors import SampleError, UserError
from shards.mp4 import PacketTable, read_table
from shards.probe import sniff

SEEKABLE = ("mov", "matroska")
"""Containers whose packets carry trustworthy times and key flags, so that decoding may start in the middle."""

MAX_STREAMS = "32"
MAX_RESTING = 8

COLOR_BT709, COLOR_FULL_RANGE, COLOR_RGB24 = 1, 2, 4
"""Equal to those of pretrain.batch, which imports torch and is therefore not imported here (a test compares them)."""

_NATIVE_FORMATS = ("yuv420p", "yuvj420p")
_RANGES = (ColorRange.MPEG, ColorRange.JPEG)
_MATRICES = (Colorspace.ITU601, Colorspace.ITU709)


@dataclass(frozen=True)
class VideoFacts:
    """What the index record claims about a video; what decodes otherwise is refused."""

    num_frames: int
    height: int
    width: int
    grid: int = 0
    """Every frame on this grid is a reference frame; 0 = irregular."""
    matrix: int = 0
    full_range: int = 0


@dataclass(frozen=True)
class Frames:
    """Decoded frames of one size."""

    planes_TN: NDArray[np.uint8]
    """One contiguous row per frame: planes Y, U, V of even height and width, or packed RGB."""
    height: int
    width: int
    color: int
    """COLOR_ bits."""


def decode_frames(
    video: bytes,
    frame_numbers: NDArray[np.int32],
    decoder: str,
    facts: VideoFacts,
    memory_N: NDArray[np.uint8] | None = None,
) -> Frames:
    """Decode the wanted frames (ascending, no repeats) of a video in memory.

    `decoder` is "pyav" (I420, skips what nobody needs) or "decord" (RGB). The frames are put into `memory_N` if it is
    given. Raises SampleError: "decode" if the video does not open, holds fewer frames than wanted, is not what its
    facts say, or does not fit into `memory_N`; "memory" if a limit of the process was met.
    """
    num_pixels = (facts.height - facts.height % 2) * (facts.width - facts.width % 2)
    shape_TN = (len(frame_numbers), num_pixels * 3 // (1 if decoder == "decord" else 2))
    if memory_N is not None and math.prod(shape_TN) > len(memory_N):
        raise SampleError("decode", f"{math.prod(shape_TN)} bytes of frames, room for {len(memory_N)}")
    decode = _decode_decord if decoder == "decord" else _decode_pyav
    try:
        whole_N = np.empty(math.prod(shape_TN), dtype=np.uint8) if memory_N is None else memory_N
        return decode(video, frame_numbers, facts, whole_N[: math.prod(shape_TN)].reshape(shape_TN))
    except MemoryError as error:
        raise SampleError("memory", "decoding needs more memory than it may have") from error


def check_decoder(decoder: str) -> None:
    """Raise UserError if a decoder is not installed. Before any worker starts: there it would look like bad samples."""
    if decoder == "decord" and importlib.util.find_spec("decord") is None:
        raise UserError("data.decoder is decord; it must be installed: pip install decord2, or take data.decoder=pyav")


def _decode_pyav(
    video: bytes, frame_numbers: NDArray[np.int32], facts: VideoFacts, planes_TN: NDArray[np.uint8]
) -> Frames:
    av.logging.set_level(av.logging.PANIC)  # damage is reported by what comes out, once, by name of the sample
    height, width = facts.height - facts.height % 2, facts.width - facts.width % 2
    color = facts.matrix * COLOR_BT709 | facts.full_range * COLOR_FULL_RANGE
    can_skip = facts.grid > 0 and not (frame_numbers % facts.grid).any() and frame_numbers[-1] < facts.num_frames
    table = read_table(video, facts.num_frames) if can_skip else None
    if table is None:
        frames = _searched_frames(video, frame_numbers, facts)
    else:
        frames = _listed_frames(table, video, frame_numbers, facts)
    count = 0
    try:
        for frame in frames:
            if (frame.height, frame.width) != (facts.height, facts.width):
                claim = f"{facts.width}x{facts.height}"
                raise SampleError("decode", f"a frame of {frame.width}x{frame.height}, the index says {claim}")
            if frame.format.name not in _NATIVE_FORMATS:
                frame, color = _as_yuv420p(frame, facts)
            _copy_planes(frame, planes_TN[count], height, width)
            count += 1
    except (FFmpegError, ValueError) as error:
        if getattr(error, "errno", 0) == errno.ENOMEM:
            raise MemoryError from error
        raise SampleError("decode", str(error)) from error
    if count < len(frame_numbers):
        raise SampleError("decode", f"frame {frame_numbers[count]} does not decode, the index says {facts.num_frames}")
    return Frames(planes_TN, height, width, color)


def _max_pixels(facts: VideoFacts) -> str:
    return str(4 * (facts.height + 128) * (facts.width + 128))  # generous: codecs pad blocks, edges, lines


_open_decoders: dict[tuple[bytes, str], VideoCodecContext] = {}
"""Decoders that rest between two videos, by their configuration. Whoever uses one takes it out."""


def _listed_frames(
    table: PacketTable, video: bytes, frame_numbers: NDArray[np.int32], facts: VideoFacts
) -> Iterator[VideoFrame]:
    """Yield the wanted frames of one of our own files: a decoder is given the packets that they need, nothing else.

    Bit for bit what a full decode gives, for a quarter less time than with a demuxer, whose probing and skipping cost
    as much as some frames. A decoder that did its work is kept for the next video with the same configuration.
    """
    key = (table.config, _max_pixels(facts))
    context = _open_decoders.pop(key, None) or _new_decoder(*key)
    wanted = iter(frame_numbers.tolist())
    next_wanted = next(wanted)
    packets = [_packet(*row) for row in table.packets(video, frame_numbers, facts.grid)]
    for packet in [*packets, None]:
        for frame in _decode(context, packet):
            if frame.pts == next_wanted:
                yield frame
                next_wanted = next(wanted, None)
    context.flush_buffers()
    if len(_open_decoders) >= MAX_RESTING:
        _open_decoders.clear()
    _open_decoders[key] = context


def _new_decoder(config: bytes, max_pixels: str) -> VideoCodecContext:
    context = VideoCodecContext.create("h264", "r")
    context.extradata = config
    context.thread_count = 1
    context.options = {"max_pixels": max_pixels}
    return context


def _packet(content: memoryview[int], number: int) -> Packet[Any]:
    packet = Packet(cast(Any, content))  # any buffer will do
    packet.pts = packet.dts = number
    return packet


@dataclass(frozen=True)
class _Opened:
    """A file with its main video stream."""

    stream: VideoStream
    packets: list[Packet[VideoStream]]
    """All of them: listing decodes nothing and takes a millisecond."""
    times: list[int]
    """When frames are shown, ascending, if `is_exact`."""
    is_exact: bool
    """There are as many packets as frames, each with a time of its own that can be trusted: frame n is the packet with
    the n-th time."""


@contextmanager
def _opened(video: bytes, facts: VideoFacts) -> Generator[_Opened]:
    demuxer = sniff(video[:600])  # named, never guessed: a playlist, which could name other files, has none
    if demuxer is None:
        raise SampleError("decode", "its first bytes are of no video container that is read")
    with av.open(io.BytesIO(video), mode="r", format=demuxer, options={"max_streams": MAX_STREAMS}) as container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise SampleError("decode", "no video stream")
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": _max_pixels(facts)}
        packets = [packet for packet in container.demux(stream) if packet.size]
        shown = [packet.pts for packet in packets if not packet.is_discard]
        times = sorted(pts for pts in shown if pts is not None)
        is_exact = demuxer in SEEKABLE and len(times) == len(set(times)) == len(shown) == facts.num_frames
        yield _Opened(stream, packets, times, is_exact)


def _searched_frames(video: bytes, frame_numbers: NDArray[np.int32], facts: VideoFacts) -> Iterator[VideoFrame]:
    """Yield the wanted frames of any file, by the cheapest way that is exact for it: decoding starts at the key frame
    before the first wanted one, or else at the start of the file, and frames are counted as they come.
    """
    with _opened(video, facts) as opened:
        if opened.is_exact and int(frame_numbers[-1]) < len(opened.times):
            yield from _timed_frames(opened, frame_numbers, facts)
        else:
            yield from _counted_frames(opened, frame_numbers)


def _timed_frames(opened: _Opened, frame_numbers: NDArray[np.int32], facts: VideoFacts) -> Iterator[VideoFrame]:
    stream, packets = opened.stream, opened.packets
    wanted = [opened.times[int(number)] for number in frame_numbers]
    if facts.grid > 0 and not (frame_numbers % facts.grid).any():
        stream.codec_context.skip_frame = "NONREF"  # only the record knows that this drops no wanted frame
    first = max((i for i, p in enumerate(packets) if p.is_keyframe and (p.pts or 0) <= wanted[0]), default=0)
    next_wanted = 0
    for packet in [*packets[first:], None]:
        for frame in _decode(stream.codec_context, packet):
            # Times of frames are picked, never counted: skipping still lets the last frame of a GOP through.
            if frame.pts == wanted[next_wanted]:
                yield frame
                next_wanted += 1
                if next_wanted == len(wanted):
                    return


def _counted_frames(opened: _Opened, frame_numbers: NDArray[np.int32]) -> Iterator[VideoFrame]:
    """Decode from the start and yield the wanted frames by their number in the order in which frames come out."""
    wanted = set(frame_numbers.tolist())
    last = int(frame_numbers[-1])
    number = 0
    for packet in [*opened.packets, None]:
        for frame in _decode(opened.stream.codec_context, packet):
            if number in wanted:
                yield frame
            if number == last:
                return
            number += 1


def _decode(context: VideoCodecContext, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
    return context.decode(packet)  # pyright: ignore[reportUnknownMemberType]  # half annotated in av


def _as_yuv420p(frame: VideoFrame, facts: VideoFacts) -> tuple[VideoFrame, int]:
    """Convert to 8-bit 4:2:0: YUV keeps matrix and range, RGB becomes limited BT.601. Returns the colour bits too.

    Range and matrix are named on both sides: left to itself swscale drops the tags and rescales by guess.
    """
    if frame.format.is_rgb or frame.format.has_palette:
        limited = {"dst_colorspace": Colorspace.ITU601, "dst_color_range": ColorRange.MPEG}
        return frame.reformat(format="yuv420p", src_color_range=ColorRange.JPEG, **limited), 0
    matrix, value_range = _MATRICES[facts.matrix], _RANGES[facts.full_range]
    converted = frame.reformat(
        format="yuv420p",
        src_colorspace=matrix,
        dst_colorspace=matrix,
        src_color_range=value_range,
        dst_color_range=value_range,
    )
    return converted, facts.matrix * COLOR_BT709 | facts.full_range * COLOR_FULL_RANGE


def _copy_planes(frame: VideoFrame, row_N: NDArray[np.uint8], height: int, width: int) -> None:
    """Copy Y, U, V without the padding that FFmpeg puts at the end of lines, cut to even sizes."""
    start = 0
    for index, plane in enumerate(frame.planes):
        rows, columns = (height, width) if index == 0 else (height // 2, width // 2)
        lines = np.frombuffer(cast(Any, plane), dtype=np.uint8).reshape(-1, plane.line_size)
        row_N[start : start + rows * columns].reshape(rows, columns)[:] = lines[:rows, :columns]
        start += rows * columns


def _decode_decord(
    video: bytes, frame_numbers: NDArray[np.int32], facts: VideoFacts, planes_TN: NDArray[np.uint8]
) -> Frames:
    import decord as untyped  # pyright: ignore[reportMissingTypeStubs]  # a second to import: only where asked for

    decord: Any = untyped
    height, width = facts.height - facts.height % 2, facts.width - facts.width % 2
    try:
        if facts.grid == 0:  # else it is one of our own, which has nothing that decord cannot do
            _check_for_decord(video, facts)
        reader = decord.VideoReader(io.BytesIO(video), ctx=decord.cpu(0), num_threads=1)
        if len(reader) <= int(frame_numbers[-1]):
            # decord can loop for ever on a frame number past the end
            raise SampleError("decode", f"{len(reader)} frames, the index says {facts.num_frames}")
        rgb_THWC: NDArray[np.uint8] = reader.get_batch(frame_numbers.tolist()).asnumpy()
    except (decord.DECORDError, RuntimeError, FFmpegError, ValueError) as error:
        raise SampleError("decode", next(iter(str(error).splitlines()), type(error).__name__)) from error
    if rgb_THWC.shape[1:3] != (facts.height, facts.width):
        claim = f"{facts.width}x{facts.height}"
        raise SampleError("decode", f"frames of {rgb_THWC.shape[2]}x{rgb_THWC.shape[1]}, the index says {claim}")
    planes_TN.reshape(len(frame_numbers), height, width, 3)[:] = rgb_THWC[:, :height, :width]
    return Frames(planes_TN, height, width, COLOR_RGB24)


def _check_for_decord(video: bytes, facts: VideoFacts) -> None:
    """Raise SampleError for a file of which decord may give other frames than asked for."""
    with _opened(video, facts) as opened:
        faults = {
            "its packets are not one per frame with a time each": not opened.is_exact,
            "a frame shown before a key frame comes after it (open GOP)": opened.is_exact and _has_open_gop(opened),
            "it is rotated": opened.is_exact and _is_rotated(opened),
        }
        for fault, found in faults.items():
            if found:
                raise SampleError("decode", f"decord would give wrong frames: {fault}; data.decoder=pyav reads it")


def _has_open_gop(opened: _Opened) -> bool:
    key_time = opened.times[0]
    for packet in opened.packets:
        key_time = packet.pts if packet.is_keyframe and packet.pts is not None else key_time
        if packet.pts is not None and packet.pts < key_time:
            return True
    return not opened.packets[0].is_keyframe


def _is_rotated(opened: _Opened) -> bool:
    for packet in [*opened.packets, None]:
        for frame in _decode(opened.stream.codec_context, packet):
            return frame.rotation != 0
    return False
