from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from shards.encode import Encoding, Sample, encode_file
from shards.mp4 import read_table
from shards.probe import Limits, probe

MakeVideo = Callable[..., Path]


@pytest.fixture
def sample(make_video: MakeVideo, tmp_path: Path) -> Sample:
    path = make_video(tmp_path / "a.mp4", 97)
    facts = probe(path, Limits(), lambda frame, number: None)
    (made,) = encode_file(path, facts, Encoding(), Limits(), lambda: None)
    return made


def test_the_table_says_what_a_demuxer_says(sample: Sample) -> None:
    table = read_table(sample.video, 97)
    assert table is not None
    with av.open(io.BytesIO(sample.video)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert table.config == stream.codec_context.extradata
    order = np.argsort(np.argsort([packet.pts for packet in packets]))
    assert table.number_P.tolist() == order.tolist()
    assert table.offset_P.tolist() == [packet.pos for packet in packets]
    assert table.size_P.tolist() == [packet.size for packet in packets]
    assert table.keys_K.tolist() == [number for number, packet in enumerate(packets) if packet.is_keyframe]
    contents = [sample.video[offset:][:size] for offset, size in zip(table.offset_P, table.size_P, strict=True)]
    assert contents == [bytes(packet) for packet in packets]


def test_packets_from_the_key_frame_before_to_the_last_wanted_frame(sample: Sample) -> None:
    table = read_table(sample.video, 97)
    assert table is not None
    for wanted, given in {
        (0,): [0],
        (8, 16): [0, 4, 8, 12, 16],
        (60, 68): [*range(0, 64, 4), 64, 68],
        (64, 72): [64, 68, 72],
        (96,): list(range(64, 97, 4)),
    }.items():
        packets = list(table.packets(sample.video, np.array(wanted, np.int32), 4))
        assert [number for _, number in packets] == given
    whole = list(table.packets(sample.video, np.arange(97, dtype=np.int32), 1))
    assert sorted(number for _, number in whole) == list(range(97))


def test_other_files_have_no_table(make_video: MakeVideo, tmp_path: Path, sample: Sample) -> None:
    assert read_table(sample.video, 96) is None
    with_audio = make_video(tmp_path / "b.mp4", 20, with_audio=True)
    other_container = make_video(tmp_path / "c.mkv", 20)
    other_codec = make_video(tmp_path / "d.mp4", 20, codec="mpeg4")
    fragmented = make_video(tmp_path / "e.mp4", 20, container_options={"movflags": "frag_keyframe+empty_moov"})
    late = make_video(tmp_path / "f.mp4", 20, options={"bframes": "0"}, times=lambda number: 2 * number)
    for path in (with_audio, other_container, other_codec, fragmented):
        assert read_table(path.read_bytes(), 20) is None
    assert read_table(late.read_bytes(), 20) is not None
    for content in (b"", b"moov", bytes(64), sample.video[:200], sample.video[:-200]):
        assert read_table(content, 97) is None


def test_damaged_tables_are_refused_or_stay_inside_the_file(sample: Sample) -> None:
    rng = np.random.default_rng(0)
    start = sample.video.index(b"moov")
    num_read = 0
    for _ in range(600):
        damaged = bytearray(sample.video)
        for place in rng.integers(start, len(damaged), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        table = read_table(bytes(damaged), 97)
        if table is None:
            continue
        num_read += 1
        assert (table.offset_P >= 0).all()
        assert (table.offset_P + table.size_P <= len(damaged)).all()
        assert sorted(table.number_P.tolist()) == list(range(97))
        numbers = np.array([0, 96], np.int32)
        assert sum(len(content) for content, _ in table.packets(bytes(damaged), numbers, 4)) <= len(damaged)
    assert 0 < num_read < 600
