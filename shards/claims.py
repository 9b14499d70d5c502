"""What a video made by others holds, as surely as one wants to pay for: the container's word, packets, or every frame.

    header    frames, rate and size that the container claims          LEVEL_HEADER
    packets   every packet is counted, the first frame decoded         LEVEL_PACKETS
    decode    every frame is decoded                                   LEVEL_DECODE

Such videos are used as they are, so one that decoding at training would show wrongly is refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from shards.encode import Motion
from shards.layout import LEVEL_DECODE, LEVEL_HEADER, LEVEL_PACKETS
from shards.probe import (
    COUNT_TOLERANCE,
    HDR_TRANSFERS,
    Facts,
    Limits,
    Rejected,
    facts_of,
    matrix_of,
    open_video,
    probe,
    words_of,
)

LEVELS = {"header": LEVEL_HEADER, "packets": LEVEL_PACKETS, "decode": LEVEL_DECODE}
MOTION_STRIDE = 4
MAX_SIDE = 2**16 - 1
MIN_FRAMES = 2
OTHER_COLORS = {8: "YCgCo", 11: "SMPTE 2085", 14: "ICtCp"}
"""Matrices that are far from those a record can name."""


@dataclass(frozen=True)
class Claims:
    """What the record of a video says. Sizes are as coded: decoding at training refuses another size."""

    num_frames: int
    rate: float
    width: int
    height: int
    motion: float
    matrix: int
    full_range: bool


def read_claims(path: Path, level: str, limits: Limits, renew: Callable[[], None]) -> Claims:
    """The claims of a file at one of `LEVELS`; `renew` is called as it gets on. Raises Rejected."""
    if level == "header":
        claims = _from_header(path, limits)
    elif level == "packets":
        claims = _from_facts(_count_packets(path, limits, renew), 0.0)
    else:
        motion = Motion(MOTION_STRIDE)

        def on_frame(frame: VideoFrame, number: int) -> None:
            renew()
            motion.add(frame, number)

        facts = probe(path, limits, on_frame)
        claims = _from_facts(facts, motion.score)
    if claims.num_frames < MIN_FRAMES:
        raise Rejected("too_short", f"{claims.num_frames} frames")
    if claims.num_frames > limits.max_frames:
        raise Rejected("too_long", f"{claims.num_frames} frames")
    if not 0 < min(claims.width, claims.height) <= max(claims.width, claims.height) <= MAX_SIDE:
        raise Rejected("size", f"{claims.width}x{claims.height} pixels")
    return claims


def _from_facts(facts: Facts, motion: float) -> Claims:
    if facts.transform != (1, 0, 0, 1):
        raise Rejected("rotated", "a tag turns or mirrors it, which decoding at training does not do: pack it")
    if facts.colorspace in OTHER_COLORS:
        raise Rejected("color", f"its colours are {OTHER_COLORS[facts.colorspace]}: pack it")
    duration_s = facts.times_s[-1] - facts.times_s[0]
    rate = (facts.num_frames - 1) / duration_s if duration_s > 0 else facts.nominal_rate or 1.0
    return Claims(facts.num_frames, rate, facts.width, facts.height, motion, facts.matrix, facts.full_range)


def _from_header(path: Path, limits: Limits) -> Claims:
    with open_video(path, limits) as (container, stream):
        context = stream.codec_context
        if context.color_trc in HDR_TRANSFERS:
            raise Rejected("hdr", f"{HDR_TRANSFERS[context.color_trc]} video must be tone-mapped")
        if context.colorspace in OTHER_COLORS:
            raise Rejected("color", f"its colours are {OTHER_COLORS[context.colorspace]}: pack it")
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        num_frames = stream.frames or round(rate * (container.duration or 0) / 1e6)
        if not rate or not num_frames:
            raise Rejected("no_claim", "its header says neither frames nor duration: use --probe packets")
        return Claims(
            num_frames=num_frames,
            rate=rate,
            width=context.width,
            height=context.height,
            motion=0.0,
            matrix=matrix_of(context.colorspace, context.height),
            full_range=context.color_range == 2 or (context.pix_fmt or "").startswith("yuvj"),
        )


def _count_packets(path: Path, limits: Limits, renew: Callable[[], None]) -> Facts:
    """Facts with the times of all packets that are shown, from the first frame and a walk over the container."""
    first: VideoFrame | None = None
    times_s: list[float] = []
    num_hidden = 0
    with open_video(path, limits) as (container, stream):
        try:
            for packet in container.demux(stream):
                renew()
                if packet.is_corrupt:
                    raise Rejected("damaged", f"packet {len(times_s)} is cut or corrupt")
                if first is None:
                    first = _first_of(packet)
                if not packet.size:
                    continue
                if packet.is_discard:
                    num_hidden += 1
                    continue
                times_s.append(_time_s(packet, times_s))
                if len(times_s) > limits.max_frames:
                    raise Rejected("too_long", f"more than {limits.max_frames} frames")
        except FFmpegError as error:
            if error.errno == 12:
                raise MemoryError(str(error)) from error
            raise Rejected("damaged", f"{words_of(error)} at packet {len(times_s)}") from error
        if first is None:
            raise Rejected("no_video", "no frame decodes")
        if first.color_trc in HDR_TRANSFERS:
            raise Rejected("hdr", f"{HDR_TRANSFERS[first.color_trc]} video must be tone-mapped")
        _check_count(container, stream, len(times_s) + num_hidden)
        times_s.sort()
        if times_s[-1] - times_s[0] > limits.max_duration_s:
            raise Rejected("too_long", f"more than {limits.max_duration_s:.0f} s")
        return facts_of(container, stream, first, times_s)


def _first_of(packet: Packet[VideoStream]) -> VideoFrame | None:
    frames = cast("list[VideoFrame]", cast(Any, packet).decode())
    return frames[0] if frames else None


def _time_s(packet: Packet[VideoStream], times_s: list[float]) -> float:
    """When it is shown; where the container has no such times, after the packet before it."""
    if packet.pts is not None and packet.time_base:
        return float(packet.pts * packet.time_base)
    rate = float(packet.stream.average_rate or 25)
    return times_s[-1] + 1 / rate if times_s else 0.0


def _check_count(container: InputContainer, stream: VideoStream, num_packets: int) -> None:
    """A container that counts its frames must hold them; AVI counts empty chunks as well."""
    claimed = stream.frames
    if container.format.name.startswith("mov"):
        claimed = min(claimed, len(stream.index_entries) or claimed)
    if container.format.name != "avi" and abs(num_packets - claimed) > COUNT_TOLERANCE * claimed > 0:
        raise Rejected("count", f"the container claims {claimed} frames, it holds {num_packets}")
