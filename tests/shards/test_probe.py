from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.layout import MATRIX_BT601, MATRIX_BT709
from shards.probe import Facts, Limits, Rejected, keep_evenly, probe, sniff

MakeVideo = Callable[..., Path]


def look(path: Path, **limits: Any) -> Facts:
    return probe(path, Limits(**limits), lambda frame, number: None)


def reason(path: Path, **limits: Any) -> str:
    with pytest.raises(Rejected) as caught:
        look(path, **limits)
    assert caught.value.detail
    return caught.value.reason


def test_facts_of_a_plain_file(make_video: MakeVideo, tmp_path: Path) -> None:
    facts = look(make_video(tmp_path / "a.mp4", 30, rate=25))
    assert (facts.demuxer, facts.codec, facts.pixel_format) == ("mov", "h264", "yuv420p")
    assert (facts.num_frames, facts.width, facts.height, facts.pixel_aspect) == (30, 64, 48, 1.0)
    assert facts.nominal_rate == 25
    assert facts.times_s[:3] == pytest.approx([0, 0.04, 0.08])
    assert (facts.matrix, facts.full_range, facts.transform) == (MATRIX_BT601, False, (1, 0, 0, 1))


def test_on_frame_sees_every_frame(make_video: MakeVideo, tmp_path: Path) -> None:
    seen: list[int] = []
    probe(make_video(tmp_path / "a.mp4", 20), Limits(), lambda frame, number: seen.append(number))
    assert seen == list(range(20))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.avi", "mpeg4"),
        ("a.mpg", "mpeg2video"),
        ("a.ts", "libx264"),
        ("a.mov", "mpeg4"),
        ("a.flv", "flv"),
    ],
)
def test_containers(make_video: MakeVideo, tmp_path: Path, name: str, codec: str) -> None:
    options = {"deadline": "realtime", "cpu-used": "8"} if "vpx" in codec else None
    assert look(make_video(tmp_path / name, 25, codec=codec, options=options)).num_frames == 25


@pytest.mark.parametrize("clip", ["bbb_320x180_vp9.webm", "city_320x180_h264.mp4", "sintel_320x180_h264.mp4"])
def test_the_bundled_films_are_sound(clips: Path, clip: str) -> None:
    assert look(clips / clip).num_frames in (132, 190, 192)


def test_colour_tags(make_video: MakeVideo, tmp_path: Path) -> None:
    tagged = look(make_video(tmp_path / "a.mp4", 4, tags={"colorspace": 1, "color_primaries": 1, "color_trc": 1}))
    assert tagged.matrix == MATRIX_BT709
    full = look(make_video(tmp_path / "b.mp4", 4, pixel_format="yuvj420p"))
    assert full.full_range
    small, large = tmp_path / "c.mp4", tmp_path / "d.mp4"
    assert look(make_video(small, 2)).matrix == MATRIX_BT601
    assert look(make_video(large, 2, width=64, height=720)).matrix == MATRIX_BT709


@pytest.mark.parametrize(
    ("pixel_format", "tags", "expected"),
    [
        ("yuv420p", {"color_trc": 16}, "hdr"),
        ("yuv420p", {"color_trc": 18}, "hdr"),
        ("yuv420p", {"colorspace": 10}, "hdr"),
        ("yuv420p10le", {"colorspace": 9, "color_primaries": 9}, "hdr"),
        ("yuv420p10le", {"colorspace": 9, "color_primaries": 9, "color_trc": 14}, None),
        ("yuv420p", {"colorspace": 9, "color_primaries": 9}, None),
        ("yuv420p10le", {"colorspace": 1}, None),
    ],
)
def test_hdr_is_rejected(
    make_video: MakeVideo, tmp_path: Path, pixel_format: str, tags: dict[str, int], expected: str | None
) -> None:
    path = make_video(tmp_path / "a.mp4", 4, pixel_format=pixel_format, tags=tags)
    if expected is None:
        assert look(path).num_frames == 4
    else:
        assert reason(path) == expected


def test_rotation_and_flip(make_video: MakeVideo, tmp_path: Path) -> None:
    def transform(name: str, **how: Any) -> tuple[int, ...]:
        return look(make_video(tmp_path / name, 2, **how)).transform

    assert transform("a.mp4") == (1, 0, 0, 1)
    assert transform("b.mp4", rotation=180) == (-1, 0, 0, -1)
    quarter, other = transform("c.mp4", rotation=90), transform("d.mp4", rotation=-90)
    assert {quarter, other} == {(0, 1, -1, 0), (0, -1, 1, 0)}
    assert transform("e.mp4", hflip=True) == (-1, 0, 0, 1)


def test_pixel_aspect(make_video: MakeVideo, tmp_path: Path) -> None:
    facts = look(make_video(tmp_path / "a.mp4", 2, pixel_aspect=Fraction(4, 3)))
    assert facts.pixel_aspect == pytest.approx(4 / 3)


def test_text_is_no_container(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("hello\n" * 300)
    assert reason(tmp_path / "a.mp4") == "format"


@pytest.mark.parametrize("first", ["ffconcat version 1.0\n", "#EXTM3U\n", '<?xml version="1.0"?><MPD>'])
def test_playlists_are_no_container(clips: Path, tmp_path: Path, first: str) -> None:
    (tmp_path / "a.mp4").write_text(f"{first}file {clips / 'city_320x180_h264.mp4'}\n" * 20)
    assert reason(tmp_path / "a.mp4") == "format"


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    assert reason(tmp_path / "a.mp4") == "empty"


def test_a_header_without_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\x00\x00\x00\x18ftypisom" + bytes(2000))
    assert reason(tmp_path / "a.mp4") == "unreadable"


def test_sound_alone_is_no_video(make_video: MakeVideo, tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000, layout="mono")
        from numpy import float32, zeros

        for number in range(10):
            frame = av.AudioFrame.from_ndarray(zeros((1, 1024), float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, number * 1024, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert reason(tmp_path / "a.mp4") == "no_video"


def test_video_with_sound_is_fine(make_video: MakeVideo, tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv"):
        assert look(make_video(tmp_path / name, 25, with_audio=True)).num_frames == 25


@pytest.mark.parametrize("clip", ["bbb_320x180_vp9.webm", "city_320x180_h264.mp4", "sintel_320x180_h264.mp4"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_file_is_rejected(clips: Path, tmp_path: Path, clip: str, share: float) -> None:
    data = (clips / clip).read_bytes()
    (tmp_path / clip).write_bytes(data[: int(len(data) * share)])
    assert reason(tmp_path / clip) in ("damaged", "count", "unreadable")


def test_a_cut_file_whose_index_came_last_is_rejected(make_video: MakeVideo, tmp_path: Path) -> None:
    data = make_video(tmp_path / "a.mp4", 60).read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[:-200])
    assert reason(tmp_path / "b.mp4") in ("unreadable", "damaged")


def test_flipped_bytes_are_rejected(clips: Path, tmp_path: Path) -> None:
    data = bytearray((clips / "city_320x180_h264.mp4").read_bytes())
    for place in range(60_000, 60_020):
        data[place] ^= 0x55
    (tmp_path / "a.mp4").write_bytes(data)
    assert reason(tmp_path / "a.mp4") == "damaged"


def test_time_that_goes_backwards_is_rejected(make_video: MakeVideo, tmp_path: Path) -> None:
    # AVI has no times of its own: a codec with delay, its frames put in another order, shows times that fall.
    import av

    source = make_video(tmp_path / "a.mkv", 12, codec="mpeg4", options={"bf": "0", "g": "1"})
    with av.open(str(source)) as given_, av.open(str(tmp_path / "b.mkv"), "w") as made:
        stream = made.add_stream_from_template(given_.streams.video[0])
        packets = [packet for packet in given_.demux(video=0) if packet.size]
        for number, packet in enumerate(packets):
            packet.stream = stream
            packet.dts = number * 40
            packet.pts = (packets.__len__() - number) * 40 + 480
            made.mux(packet)
    assert reason(tmp_path / "b.mkv") == "timestamps"


def test_a_claim_of_more_frames_is_rejected(make_video: MakeVideo, tmp_path: Path) -> None:
    # Matroska states its duration; a file with a third of its packets left out does not fill it.
    import av

    source = make_video(tmp_path / "a.mkv", 60, codec="mpeg4", options={"bf": "0", "g": "1"})
    data = source.read_bytes()
    short = make_video(tmp_path / "b.mkv", 30, codec="mpeg4", options={"bf": "0", "g": "1"}).read_bytes()
    # EBML element 0x4489 (duration), 8 bytes of float: take it over from the longer film.
    place, other = short.index(b"\x44\x89\x88") + 3, data.index(b"\x44\x89\x88") + 3
    (tmp_path / "c.mkv").write_bytes(short[:place] + data[other : other + 8] + short[place + 8 :])
    assert reason(tmp_path / "c.mkv") == "count"
    with av.open(str(tmp_path / "c.mkv")) as container:
        assert container.duration == pytest.approx(2.4e6, rel=0.05)


def test_caps(make_video: MakeVideo, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 30)
    assert reason(path, max_pixels=1000) == "too_large"
    assert reason(path, max_duration_s=0.5) == "too_long"
    assert reason(path, max_frames=10) == "too_long"
    both = make_video(tmp_path / "b.mp4", 30, with_audio=True)
    assert reason(both, max_streams=1) in ("unreadable", "too_many_streams")


def test_sniffing_needs_the_right_place() -> None:
    assert sniff(b"") is None
    assert sniff(b"ftyp" + bytes(600)) is None
    assert sniff(bytes(4) + b"ftypisom") == "mov"
    packet = b"G" + bytes(187)
    assert sniff(packet * 4) == "mpegts"
    assert sniff((bytes(4) + packet) * 4) == "mpegts"
    assert sniff(b"G" * 10) is None


@given(
    gaps=st.lists(st.floats(0, 0.5), max_size=200),
    max_rate=st.sampled_from([5.0, 15.0, 24.0, 30.0, 60.0]),
)
def test_kept_frames_are_never_closer_than_the_rate_allows(gaps: list[float], max_rate: float) -> None:
    times_s = [sum(gaps[:end]) for end in range(len(gaps) + 1)]
    kept = keep_evenly(times_s, max_rate)
    assert kept[0] == 0
    assert kept == sorted(set(kept))
    spaces = [times_s[b] - times_s[a] for a, b in itertools.pairwise(kept)]
    assert all(space >= 0.97 / max_rate - 0.001 for space in spaces)
    dropped = set(range(len(times_s))) - set(kept)
    for number in dropped:
        before = max(k for k in kept if k < number)
        assert times_s[number] - times_s[before] < 1 / max_rate


@pytest.mark.parametrize(
    ("rate", "step"),
    [(24, 1), (25, 1), (29.97, 1), (30, 1), (30.3, 1), (48, 2), (50, 2), (59.94, 2), (60, 2), (120, 4)],
)
def test_an_even_source_stays_even(rate: float, step: int) -> None:
    exact = [number / rate for number in range(600)]
    rounded = [round(time_s, 3) for time_s in exact]  # as Matroska stores them
    for times_s in (exact, rounded):
        assert keep_evenly(times_s, 30.0) == list(range(0, 600, step))
