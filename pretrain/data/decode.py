"""Bytes of a video + frame numbers -> uint8 frames. Owner of decord.

Imports numpy and av only (decord when it is asked for), so that a worker starts in 0.15 s.

Frame n is the n-th frame in order of presentation among those that decode. Frames come as the decoder made them: 8-bit
4:2:0 planes (I420), half the bytes of RGB; another pixel format is converted here. Odd sizes lose their last
row or column. Rotation tags are not applied (packing has applied them).

Legend: T frames, N bytes per frame.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import av
import av.logging
import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray

from shards.errors import SampleError, UserError
from shards.probe import sniff

SEEKABLE = ("mov", "matroska")
"""Containers whose packets carry trustworthy times and key flags, so that decoding may start in the middle."""

MAX_STREAMS = "32"

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


def decode_frames(video: bytes, frame_numbers: NDArray[np.int32], decoder: str, facts: VideoFacts) -> Frames:
    """Decode the wanted frames (ascending, no repeats) of a video in memory.

    `decoder` is "pyav" (I420, skips what nobody needs) or "decord" (RGB). Raises SampleError("decode") if the video
    does not open, holds fewer frames than wanted, or is not what its facts say.
    """
    if decoder == "decord":
        return _decode_decord(video, frame_numbers, facts)
    return _decode_pyav(video, frame_numbers, facts)


def check_decoder(decoder: str) -> None:
    """Raise UserError if a decoder is not installed. Before any worker starts: there it would look like bad samples."""
    if decoder == "decord" and importlib.util.find_spec("decord") is None:
        raise UserError("data.decoder is decord; it must be installed: pip install decord2, or take data.decoder=pyav")


def _decode_pyav(video: bytes, frame_numbers: NDArray[np.int32], facts: VideoFacts) -> Frames:
    av.logging.set_level(av.logging.PANIC)  # damage is reported by what comes out, once, by name of the sample
    height, width = facts.height - facts.height % 2, facts.width - facts.width % 2
    planes_TN = np.empty((len(frame_numbers), height * width * 3 // 2), dtype=np.uint8)
    color = facts.matrix * COLOR_BT709 | facts.full_range * COLOR_FULL_RANGE
    demuxer = sniff(video[:600])  # named, never guessed: a playlist, which could name other files, has none
    if demuxer is None:
        raise SampleError("decode", "its first bytes are of no video container that is read")
    max_pixels = 4 * (facts.height + 128) * (facts.width + 128)  # generous: codecs pad blocks, edges, lines
    try:
        with av.open(io.BytesIO(video), mode="r", format=demuxer, options={"max_streams": MAX_STREAMS}) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise SampleError("decode", "no video stream")
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(max_pixels)}
            is_seekable = demuxer in SEEKABLE
            packets = [packet for packet in container.demux(stream) if packet.size]
            count = 0
            for frame in _wanted_frames(stream, packets, frame_numbers, facts, is_seekable=is_seekable):
                if (frame.height, frame.width) != (facts.height, facts.width):
                    claim = f"{facts.width}x{facts.height}"
                    raise SampleError("decode", f"a frame of {frame.width}x{frame.height}, the index says {claim}")
                if frame.format.name not in _NATIVE_FORMATS:
                    frame, color = _as_yuv420p(frame, facts)
                _copy_planes(frame, planes_TN[count], height, width)
                count += 1
    except (FFmpegError, ValueError) as error:
        raise SampleError("decode", str(error)) from error
    if count < len(frame_numbers):
        raise SampleError("decode", f"frame {frame_numbers[count]} does not decode, the index says {facts.num_frames}")
    return Frames(planes_TN, height, width, color)


def _wanted_frames(
    stream: VideoStream,
    packets: list[Packet[VideoStream]],
    frame_numbers: NDArray[np.int32],
    facts: VideoFacts,
    *,
    is_seekable: bool,
) -> Iterator[VideoFrame]:
    """Yield the wanted frames in order, by the cheapest way that is exact for this file.

    `packets` are all of the file (listing them decodes nothing and takes a millisecond). If there are as many as
    frames and each has a time of its own, frame n is the packet with the n-th time, and decoding starts at the key
    frame before the first wanted one. Else the file is decoded from its start and frames are counted as they come.
    """
    shown = [packet.pts for packet in packets if not packet.is_discard]
    times: list[int] = sorted(pts for pts in shown if pts is not None)
    is_exact = (
        is_seekable
        and len(times) == len(set(times)) == len(shown) == facts.num_frames
        and int(frame_numbers[-1]) < len(times)
    )
    if not is_exact:
        yield from _count_frames(stream, packets, frame_numbers)
        return
    wanted = [times[int(number)] for number in frame_numbers]
    if facts.grid > 0 and not (frame_numbers % facts.grid).any():
        stream.codec_context.skip_frame = "NONREF"  # only the record knows that this drops no wanted frame
    first = max((i for i, p in enumerate(packets) if p.is_keyframe and (p.pts or 0) <= wanted[0]), default=0)
    next_wanted = 0
    for packet in [*packets[first:], None]:
        for frame in _decode(stream, packet):
            # Times of frames are picked, never counted: skipping still lets the last frame of a GOP through.
            if frame.pts == wanted[next_wanted]:
                yield frame
                next_wanted += 1
                if next_wanted == len(wanted):
                    return


def _count_frames(
    stream: VideoStream, packets: list[Packet[VideoStream]], frame_numbers: NDArray[np.int32]
) -> Iterator[VideoFrame]:
    """Decode from the start and yield the wanted frames by their number in the order in which frames come out."""
    wanted = set(frame_numbers.tolist())
    last = int(frame_numbers[-1])
    number = 0
    for packet in [*packets, None]:
        for frame in _decode(stream, packet):
            if number in wanted:
                yield frame
            if number == last:
                return
            number += 1


def _decode(stream: VideoStream, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
    return stream.codec_context.decode(packet)  # pyright: ignore[reportUnknownMemberType]  # half annotated in av


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


def _decode_decord(video: bytes, frame_numbers: NDArray[np.int32], facts: VideoFacts) -> Frames:
    import decord as untyped  # pyright: ignore[reportMissingTypeStubs]  # a second to import: only where asked for

    decord: Any = untyped
    height, width = facts.height - facts.height % 2, facts.width - facts.width % 2
    if sniff(video[:600]) is None:  # decord would open playlists, and the files they name
        raise SampleError("decode", "it is in none of the containers that are read")
    try:
        reader = decord.VideoReader(io.BytesIO(video), ctx=decord.cpu(0), num_threads=1)
        if len(reader) <= int(frame_numbers[-1]):
            # decord can loop for ever on a frame number past the end
            raise SampleError("decode", f"{len(reader)} frames, the index says {facts.num_frames}")
        rgb_THWC: NDArray[np.uint8] = reader.get_batch(frame_numbers.tolist()).asnumpy()
    except (decord.DECORDError, RuntimeError) as error:
        raise SampleError("decode", str(error).splitlines()[0]) from error
    if rgb_THWC.shape[1:3] != (facts.height, facts.width):
        claim = f"{facts.width}x{facts.height}"
        raise SampleError("decode", f"frames of {rgb_THWC.shape[2]}x{rgb_THWC.shape[1]}, the index says {claim}")
    planes_TN = np.ascontiguousarray(rgb_THWC[:, :height, :width]).reshape(len(frame_numbers), -1)
    return Frames(planes_TN, height, width, COLOR_RGB24)
