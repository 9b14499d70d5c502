"""The packets of an mp4 that the training encode wrote, read from its tables, without a demuxer.

A demuxer costs half a millisecond per clip, and a decoder behind it looks at every packet to find out which it may
skip. The tables of our own files say where each packet lies and when it is shown; with the grid of the index record
that is all that must be known to hand a decoder just the packets that a clip needs.

Read here: one track of H.264, every frame a packet, no edits that hide a frame. All else is None: the general way takes
it. Boxes: ISO/IEC 14496-12 (8.5 to 8.7), 14496-15 (avcC).

Legend: P packets in the order of decoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SAMPLE_ENTRY_BYTES = 86
"""Length of a visual sample entry before the boxes that it holds, its header included."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PacketTable:
    """Where the packets of a video lie and which frame each one is."""

    config: bytes
    """The decoder's configuration (avcC)."""
    offset_P: Ints
    size_P: Ints
    number_P: Ints
    """Frame number in the order of presentation."""
    keys_K: Ints
    """Packets at which decoding can start, ascending; the first is packet 0."""

    def packets(
        self, video: bytes, frame_numbers: NDArray[np.int32], grid: int
    ) -> Iterator[tuple[memoryview[int], int]]:
        """Content and frame number of the packets that the wanted frames (ascending, all on the grid) need.

        From the key frame before the first of them to the last, in the order of decoding; frames off the grid are left
        out, which is exact only where `shards.encode.inspect` has proved that no frame on the grid needs them.
        """
        number_P = self.number_P
        wanted_W = np.argsort(number_P)[frame_numbers]
        first, last = int(wanted_W.min()), int(wanted_W.max())
        start = int(self.keys_K[np.searchsorted(self.keys_K, first, side="right") - 1])
        content = memoryview(video)
        for packet in range(start, last + 1):
            number = int(number_P[packet])
            if number % grid == 0:
                offset = int(self.offset_P[packet])
                yield content[offset : offset + int(self.size_P[packet])], number


def read_table(video: bytes, num_frames: int) -> PacketTable | None:
    """The packets of a video of `num_frames` frames, None if it is not of the plain kind described above."""
    try:
        return _read_table(video, num_frames)
    except (struct.error, ValueError, IndexError, KeyError):
        return None


def _read_table(video: bytes, num_frames: int) -> PacketTable | None:
    movie = _boxes(video, *_boxes(video, 0, len(video))[b"moov"])
    track = _boxes(video, *movie[b"trak"])
    media = _boxes(video, *track[b"mdia"])
    tables = _boxes(video, *_boxes(video, *media[b"minf"])[b"stbl"])
    fixed_size, num_packets = struct.unpack_from(">II", video, tables[b"stsz"][0] + 4)
    if fixed_size or num_packets != num_frames:
        return None
    size_P = _numbers(video, tables[b"stsz"][0] + 12, num_packets)
    step_P = _runs(video, tables[b"stts"], num_packets)
    shown_P = np.cumsum(step_P) - step_P
    if b"ctts" in tables:
        shown_P += _runs(video, tables[b"ctts"], num_packets).astype(np.int32)  # they may be negative
    order_P = np.argsort(shown_P)
    number_P = np.empty_like(order_P)
    number_P[order_P] = np.arange(num_packets)
    keys_K = _rows(video, tables[b"stss"], 1)[:, 0] - 1 if b"stss" in tables else np.arange(num_packets)
    offset_P = _offsets(video, tables, size_P)
    is_plain = (
        len(np.unique(shown_P)) == num_packets
        and keys_K[0] == 0
        and (np.diff(keys_K) > 0).all()
        and offset_P.min() >= 0
        and (offset_P + size_P).max() <= len(video)
        and (b"edts" not in track or _shows_all(video, track[b"edts"], int(shown_P.min())))
    )
    return PacketTable(_config(video, tables[b"stsd"][0]), offset_P, size_P, number_P, keys_K) if is_plain else None


def _boxes(video: bytes, start: int, end: int) -> dict[bytes, tuple[int, int]]:
    """Where the content of each box lies, by type. Raises ValueError for two tracks, or nonsense."""
    found: dict[bytes, tuple[int, int]] = {}
    while start < end:
        size, kind = struct.unpack_from(">I4s", video, start)
        if size < 8 or start + size > end or (kind == b"trak" and kind in found):
            raise ValueError
        found.setdefault(kind, (start + 8, start + size))
        start += size
    return found


def _numbers(video: bytes, start: int, count: int) -> Ints:
    return np.frombuffer(video, ">u4", count, start).astype(np.int64)


def _rows(video: bytes, box: tuple[int, int], columns: int) -> Ints:
    """The rows of a table box: version and flags, number of rows, rows of 32-bit numbers."""
    (count,) = struct.unpack_from(">I", video, box[0] + 4)
    return _numbers(video, box[0] + 8, count * columns).reshape(count, columns)


def _runs(video: bytes, box: tuple[int, int], num_packets: int) -> Ints:
    """The values of a table of (count, value), one per packet."""
    count_R, value_R = _rows(video, box, 2).T
    if count_R.sum() != num_packets:  # before anything is made of that length
        raise ValueError
    return np.repeat(value_R, count_R)


def _offsets(video: bytes, tables: dict[bytes, tuple[int, int]], size_P: Ints) -> Ints:
    """Where each packet begins: packets lie one after the other in chunks."""
    chunk_C = _rows(video, tables[b"stco"], 1)[:, 0]
    first_R, count_R, _ = _rows(video, tables[b"stsc"], 3).T
    runs_R = np.diff(np.append(first_R - 1, len(chunk_C)))
    if (runs_R < 0).any() or (runs_R * count_R).sum() != len(size_P):
        raise ValueError
    count_C = np.repeat(count_R, runs_R)
    before_P = np.cumsum(size_P) - size_P
    first_P = np.repeat(np.cumsum(count_C) - count_C, count_C)
    return np.repeat(chunk_C, count_C) + before_P - before_P[first_P]


def _shows_all(video: bytes, edits: tuple[int, int], first_shown: int) -> bool:
    """Whether the edit list only says that the film begins at its first frame."""
    start, _ = _boxes(video, *edits)[b"elst"]
    version, count = struct.unpack_from(">B3xI", video, start)
    (media_time,) = struct.unpack_from(">q" if version else ">i", video, start + (16 if version else 12))
    return count == 1 and 0 <= media_time <= first_shown


def _config(video: bytes, stsd: int) -> bytes:
    count, size, kind = struct.unpack_from(">II4s", video, stsd + 4)
    if count != 1 or kind != b"avc1":
        raise ValueError
    start, end = _boxes(video, stsd + 8 + _SAMPLE_ENTRY_BYTES, stsd + 8 + size)[b"avcC"]
    return video[start:end]
