from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.cadence import grid_of, keep_nearest
from shards.encode import Encoding, Motion, Sample, encode_file, inspect, luma_blocks, piece_bounds, turned
from shards.layout import MATRIX_BT601, MATRIX_BT709
from shards.probe import Limits, Rejected, probe

MakeVideo = Callable[..., Path]


def encode(path: Path, **how: Any) -> list[Sample]:
    limits = Limits()
    facts = probe(path, limits, lambda frame, number: None)
    return list(encode_file(path, facts, Encoding(**{"min_frames": 2, **how}), limits, lambda: None))


def decode(video: bytes, skip: str = "DEFAULT") -> dict[int, av.VideoFrame]:
    """Frames of a sample by number."""
    with av.open(io.BytesIO(video), format="mp4") as container:
        stream = container.streams.video[0]
        stream.codec_context.skip_frame = skip
        step = 1 / (stream.average_rate * stream.time_base)
        return {round(frame.pts / step): frame for frame in container.decode(stream)}


def flat(yuv: tuple[int, int, int], width: int = 64, height: int = 48, pixel_format: str = "yuv420p") -> Any:
    """A function that makes frames of one colour."""

    def make(number: int) -> av.VideoFrame:
        frame = av.VideoFrame(width, height, pixel_format)
        for plane, value in zip(frame.planes, yuv, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        return frame

    return make


def corners(width: int, height: int) -> Any:
    """A function that makes frames with four different quarters: 16, 80, 160, 230 in reading order."""

    def make(number: int) -> av.VideoFrame:
        luma = np.full((height, width), 128, np.uint8)
        half_y, half_x = height // 2, width // 2
        luma[:half_y, :half_x], luma[:half_y, half_x:] = 16, 80
        luma[half_y:, :half_x], luma[half_y:, half_x:] = 160, 230
        chroma = np.full((height // 2, width), 128, np.uint8)
        return av.VideoFrame.from_ndarray(np.concatenate([luma, chroma]), format="yuv420p")

    return make


def quarters(frame: av.VideoFrame) -> list[int]:
    """Luma in the middle of the four quarters, in reading order."""
    luma = frame.to_ndarray()[: frame.height]
    rows, columns = (frame.height // 4, frame.height * 3 // 4), (frame.width // 4, frame.width * 3 // 4)
    return [int(luma[y, x]) for y in rows for x in columns]


def mean_yuv(frame: av.VideoFrame) -> list[float]:
    planes = frame.to_ndarray().reshape(-1)
    size = frame.width * frame.height
    return [float(part.mean()) for part in (planes[:size], planes[size : size * 5 // 4], planes[size * 5 // 4 :])]


# The stride grid


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("num_frames", [5, 64, 97])
def test_the_grid_decodes_alone_and_bit_identical(
    make_video: MakeVideo, tmp_path: Path, stride: int, num_frames: int
) -> None:
    (sample,) = encode(make_video(tmp_path / "a.mp4", num_frames), stride=stride)
    assert sample.grid == grid_of(stride)
    assert stride % sample.grid == 0
    everything, references = decode(sample.video), decode(sample.video, "NONREF")
    assert list(everything) == list(range(num_frames)) == list(range(sample.num_frames))
    for number in range(0, num_frames, sample.grid):
        assert np.array_equal(everything[number].to_ndarray(), references[number].to_ndarray())
    if sample.grid > 1:
        assert len(references) < num_frames * 0.75 + 2


def test_grid_of() -> None:
    assert [grid_of(stride) for stride in (1, 2, 3, 4, 5, 8, 9, 11, 12, 16)] == [1, 2, 3, 4, 5, 8, 3, 1, 6, 8]


@pytest.mark.parametrize(
    ("params", "grid", "fault"),
    [
        ("bframes=2:b-adapt=0", 4, "not every frame on the grid of 4 is a reference"),
        ("bframes=0", 4, "decode otherwise without the frames between"),
        ("bframes=0", 1, None),
        ("bframes=3:b-adapt=0:b-pyramid=none:keyint=16:min-keyint=16:scenecut=0", 4, None),
        ("bframes=3:b-adapt=0:b-pyramid=none:keyint=16:min-keyint=16:scenecut=0", 2, "not every frame"),
        ("bframes=3:b-adapt=0:b-pyramid=none:keyint=18:min-keyint=18:scenecut=0", 4, "the grid of 4"),
        ("bframes=3:b-adapt=0:b-pyramid=strict:keyint=16:min-keyint=16:scenecut=0", 2, "grid of 2"),
    ],
)
def test_a_sample_whose_grid_is_not_true_is_refused(
    make_video: MakeVideo, tmp_path: Path, params: str, grid: int, fault: str | None
) -> None:
    path = make_video(tmp_path / "a.mp4", 40, options={"preset": "medium", "x264-params": params})
    if fault is None:
        assert inspect(path.read_bytes(), 40, grid=grid, stride=4) > 0
        return
    with pytest.raises(Rejected, match=fault) as caught:
        inspect(path.read_bytes(), 40, grid=grid, stride=4)
    assert caught.value.reason == "encode"


def test_encoding_refuses_a_sample_with_a_false_grid(
    make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mp4", 40)
    monkeypatch.setattr("shards.encode._Writer._x264_params", lambda self: "threads=1:bframes=1:b-adapt=0")
    with pytest.raises(Rejected, match="the grid of 4") as caught:
        encode(path)
    assert caught.value.reason == "encode"


def test_types_of_the_source_do_not_leak_into_the_grid(make_video: MakeVideo, tmp_path: Path) -> None:
    options = {"preset": "medium", "x264-params": "keyint=7:bframes=3:scenecut=40"}
    (sample,) = encode(make_video(tmp_path / "a.mp4", 70, options=options))
    assert sample.grid == 4


def test_inspect_counts(make_video: MakeVideo, tmp_path: Path) -> None:
    video = make_video(tmp_path / "a.mp4", 20).read_bytes()
    with pytest.raises(Rejected, match="21 frames were encoded, 20 decode"):
        inspect(video, 21, grid=4, stride=4)


def test_the_same_file_gives_the_same_bytes(clips: Path) -> None:
    first, second = (encode(clips / "bbb_320x180_vp9.webm", short_side=64) for _ in range(2))
    assert [sample.video for sample in first] == [sample.video for sample in second]


# Cutting and rates


@given(num_frames=st.integers(1, 5000), max_frames=st.integers(2, 300))
def test_pieces_cover_a_film_evenly(num_frames: int, max_frames: int) -> None:
    bounds = piece_bounds(num_frames, max_frames)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == num_frames
    assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))
    sizes = {end - start for start, end in bounds}
    assert max(sizes) <= max_frames
    assert max(sizes) - min(sizes) <= 1


def test_pieces_of_a_film(make_video: MakeVideo, tmp_path: Path) -> None:
    samples = encode(make_video(tmp_path / "a.mp4", 100, rate=25), max_frames=48)
    assert [sample.num_frames for sample in samples] == [33, 33, 34]
    assert [sample.start_s for sample in samples] == pytest.approx([0, 33 / 25, 66 / 25])
    assert {sample.rate for sample in samples} == {25.0}


@pytest.mark.parametrize(("rate", "kept", "left"), [(60, 30.0, 30), (50, 25.0, 30), (25, 25.0, 60)])
def test_fast_video_is_thinned_evenly(make_video: MakeVideo, tmp_path: Path, rate: int, kept: float, left: int) -> None:
    def step(number: int) -> Any:
        return np.full((48, 64, 3), 4 * number, np.uint8)

    (sample,) = encode(make_video(tmp_path / "a.mkv", 60, rate=rate, frames=step), max_frames=128)
    assert sample.num_frames == left
    assert sample.rate == kept
    lumas = [mean_yuv(frame)[0] for frame in decode(sample.video).values()]
    steps = np.diff(lumas)
    assert np.all(np.abs(steps - 4 * (rate / kept) * 219 / 255) < 2.0)


def test_ntsc_rates_stay_exact(make_video: MakeVideo, tmp_path: Path) -> None:
    (sample,) = encode(make_video(tmp_path / "a.mkv", 60, rate=Fraction(60000, 1001)))
    assert sample.rate == pytest.approx(30000 / 1001, abs=1e-9)
    with av.open(io.BytesIO(sample.video)) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)


def test_variable_rate_is_measured(make_video: MakeVideo, tmp_path: Path) -> None:
    # 20 frames at 10 a second, then 20 at 20 a second.
    def at(number: int) -> int:
        return number * 100 if number < 20 else 2000 + (number - 20) * 50

    path = make_video(tmp_path / "a.mkv", 40, rate=20, times=at, time_base=Fraction(1, 1000))
    slow, fast = encode(path, max_frames=20)
    assert (slow.num_frames, fast.num_frames) == (20, 20)
    assert slow.rate == pytest.approx(10, rel=0.01)
    assert fast.rate == pytest.approx(20, rel=0.01)
    assert fast.start_s == pytest.approx(2.0)


def test_a_hole_in_the_film_does_not_slow_it(make_video: MakeVideo, tmp_path: Path) -> None:
    def at(number: int) -> int:
        return number * 40 + (700 if number >= 20 else 0)

    path = make_video(tmp_path / "a.mkv", 40, rate=25, times=at, time_base=Fraction(1, 1000))
    (sample,) = encode(path)
    assert (sample.num_frames, sample.rate) == (40, 25.0)


# Clips of so many frames a second


@pytest.mark.parametrize(
    ("source", "for_rate", "rate", "grid"),
    [
        (Fraction(24), 4.0, 24.0, 6),
        (Fraction(25), 4.0, 24.0, 6),
        (Fraction(30), 4.0, 28.0, 7),
        (Fraction(60), 4.0, 28.0, 7),
        (Fraction(30000, 1001), 5.0, 30000 / 1001, 6),
        (Fraction(60000, 1001), 5.0, 30000 / 1001, 6),
        (Fraction(15), 4.0, 12.0, 3),
        (Fraction(25), 2.0, 16.0, 8),
        (Fraction(12), 2.5, 10.0, 4),
        (Fraction(3), 4.0, 3.0, 1),
    ],
)
def test_clips_of_a_rate_find_their_frames_on_the_grid(
    make_video: MakeVideo, tmp_path: Path, source: Fraction, for_rate: float, rate: float, grid: int
) -> None:
    def grey(number: int) -> Any:
        return np.full((48, 64, 3), 40 + 2 * number, np.uint8)

    path = make_video(tmp_path / "a.mkv", 80, rate=source, frames=grey)
    (sample,) = encode(path, for_rate=for_rate)
    assert sample.rate == pytest.approx(rate, rel=1e-6)
    assert sample.grid == grid
    assert sample.num_frames == pytest.approx(80 * rate / float(source), abs=1.1)
    lumas = np.array([mean_yuv(frame)[0] for frame in decode(sample.video).values()])
    shown = np.round(((lumas - 16) * 255 / 219 - 40) / 2)  # the number of the source frame
    wanted = np.arange(len(lumas)) * float(source) / rate
    assert np.abs(shown - wanted).max() <= 1.01


@given(st.lists(st.floats(0.005, 0.5), min_size=1, max_size=200), st.floats(1.0, 60.0))
def test_nearest_frames_are_nearest_and_come_once(gaps_s: list[float], rate: float) -> None:
    times_s = [0.0, *itertools.accumulate(gaps_s)]
    kept = keep_nearest(times_s, rate)
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    for number in range(int(times_s[-1] * rate)):
        nearest_s = min(abs(time_s - number / rate) for time_s in times_s)
        assert min(abs(times_s[k] - number / rate) for k in kept) == pytest.approx(nearest_s, abs=1e-9)


def test_a_slow_stretch_keeps_its_own_rate(make_video: MakeVideo, tmp_path: Path) -> None:
    """40 frames at 25 a second, then 40 at 10: no frame is shown twice."""

    def at(number: int) -> int:
        return number * 40 if number < 40 else 1600 + (number - 40) * 100

    path = make_video(tmp_path / "a.mkv", 80, rate=25, times=at, time_base=Fraction(1, 1000))
    samples = encode(path, for_rate=4.0, max_frames=26)
    assert samples[0].rate == 24.0
    assert samples[-1].rate == pytest.approx(10, rel=0.01)
    assert {sample.grid for sample in samples} == {6}


def test_too_few_frames(make_video: MakeVideo, tmp_path: Path) -> None:
    with pytest.raises(Rejected, match=r"3 frames; pack.min_frames is 16"):
        encode(make_video(tmp_path / "a.mp4", 3), min_frames=16)
    with pytest.raises(Rejected, match="1 frames"):
        encode(make_video(tmp_path / "b.mp4", 1))


# Size and geometry


@pytest.mark.parametrize(
    ("size", "short_side", "made"),
    [
        ((128, 96), 64, (86, 64)),
        ((96, 128), 64, (64, 86)),
        ((64, 48), 256, (64, 48)),
        ((640, 360), 128, (228, 128)),
    ],
)
def test_the_short_side_shrinks_and_never_grows(
    make_video: MakeVideo, tmp_path: Path, size: tuple[int, int], short_side: int, made: tuple[int, int]
) -> None:
    (sample,) = encode(make_video(tmp_path / "a.mp4", 4, width=size[0], height=size[1]), short_side=short_side)
    assert (sample.width, sample.height) == made
    frame = decode(sample.video)[0]
    assert (frame.width, frame.height) == made


def test_odd_sizes_become_even(make_video: MakeVideo, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", 6, width=65, height=49, codec="ffv1", pixel_format="yuv444p")
    (sample,) = encode(path)
    assert (sample.width, sample.height) == (64, 48)


def test_pixel_aspect_is_applied(make_video: MakeVideo, tmp_path: Path) -> None:
    (sample,) = encode(make_video(tmp_path / "a.mp4", 4, pixel_aspect=Fraction(3, 2)))
    assert (sample.width, sample.height) == (96, 48)
    with av.open(io.BytesIO(sample.video)) as container:
        assert container.streams.video[0].sample_aspect_ratio in (None, 0, 1)


TURNS = {0: [16, 80, 160, 230], 90: [80, 230, 16, 160], 180: [230, 160, 80, 16], -90: [160, 16, 230, 80]}
"""Quarters after turning counter-clockwise by so many degrees."""


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_rotation_is_applied(make_video: MakeVideo, tmp_path: Path, degrees: int) -> None:
    path = make_video(tmp_path / "a.mp4", 4, width=64, height=32, frames=corners(64, 32), rotation=degrees)
    with av.open(str(path)) as container:
        shown = next(container.decode(video=0)).rotation  # FFmpeg's word: counter-clockwise, to show it upright
    (sample,) = encode(path)
    assert (sample.width, sample.height) == ((64, 32) if degrees in (0, 180) else (32, 64))
    frame = decode(sample.video)[0]
    assert quarters(frame) == pytest.approx(TURNS[shown % 360 if shown % 360 != 270 else -90], abs=6)
    assert frame.rotation == 0
    assert abs(shown) == abs(degrees)


def test_a_mirrored_film_is_mirrored_back(make_video: MakeVideo, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 4, frames=corners(64, 48), hflip=True)
    frame = decode(encode(path)[0].video)[0]
    assert quarters(frame) == pytest.approx([80, 16, 230, 160], abs=6)


@given(st.sampled_from([(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1)]), st.booleans())
def test_turned_follows_the_display_matrix(signs: tuple[int, int, int, int], swap: bool) -> None:
    a, _, _, d = signs
    transform = (0, d, a, 0) if swap else signs
    plane = np.arange(12, dtype=np.uint8).reshape(3, 4)
    shown = turned(plane, transform)
    ta, tb, tc, td = transform
    for y, x in np.ndindex(3, 4):
        # Coordinates from the middle, doubled so that they are whole.
        u, v = 2 * x - 3, 2 * y - 2
        shown_u, shown_v = ta * u + tc * v, tb * u + td * v
        height, width = shown.shape
        assert shown[(shown_v + height - 1) // 2, (shown_u + width - 1) // 2] == plane[y, x]


# Colour


def test_bt709_stays_bt709_with_tags(make_video: MakeVideo, tmp_path: Path) -> None:
    tags = {"colorspace": 1, "color_primaries": 1, "color_trc": 1, "color_range": 1}
    (sample,) = encode(make_video(tmp_path / "a.mp4", 4, frames=flat((120, 90, 170)), tags=tags))
    assert (sample.matrix, sample.full_range) == (MATRIX_BT709, False)
    frame = decode(sample.video)[0]
    assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
    assert mean_yuv(frame) == pytest.approx([120, 90, 170], abs=1)
    rgb = frame.to_ndarray(format="rgb24", src_colorspace=1, dst_color_range=2)[24, 32]
    assert rgb == pytest.approx([196, 106, 40], abs=6)


def test_bt601_and_untagged_are_tagged_bt601(make_video: MakeVideo, tmp_path: Path) -> None:
    for name, tags in (("a.mp4", {"colorspace": 6}), ("b.mp4", {"colorspace": 5}), ("c.mp4", {})):
        (sample,) = encode(make_video(tmp_path / name, 4, frames=flat((120, 90, 170)), tags=tags))
        assert sample.matrix == MATRIX_BT601
        frame = decode(sample.video)[0]
        assert frame.colorspace in (5, 6)
        assert frame.color_range == 1
        assert mean_yuv(frame) == pytest.approx([120, 90, 170], abs=1)


@pytest.mark.parametrize(("full", "limited"), [(255, 235), (0, 16), (128, 126)])
def test_full_range_is_scaled_to_limited(make_video: MakeVideo, tmp_path: Path, full: int, limited: int) -> None:
    frames = flat((full, 128, 128), pixel_format="yuvj420p")
    (sample,) = encode(make_video(tmp_path / "a.mp4", 4, pixel_format="yuvj420p", frames=frames))
    assert not sample.full_range
    frame = decode(sample.video)[0]
    assert frame.color_range == 1
    assert frame.format.name == "yuv420p"
    assert mean_yuv(frame) == pytest.approx([limited, 128, 128], abs=1)


def test_rgb_sources_become_limited_bt601(make_video: MakeVideo, tmp_path: Path) -> None:
    def red(number: int) -> Any:
        return np.broadcast_to(np.array([200, 30, 60], np.uint8), (48, 64, 3)).copy()

    path = make_video(tmp_path / "a.avi", 4, codec="rawvideo", pixel_format="bgr24", frames=red)
    (sample,) = encode(path)
    # BT.601: Y = 16 + (65.5 R + 128.6 G + 25.0 B) / 255
    assert mean_yuv(decode(sample.video)[0]) == pytest.approx([88, 116, 201], abs=2)


def test_ten_bits_become_eight(make_video: MakeVideo, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", 4, codec="ffv1", pixel_format="yuv420p10le")
    (sample,) = encode(path)
    assert decode(sample.video)[0].format.name == "yuv420p"


def test_bt2020_is_converted_to_bt709(make_video: MakeVideo, tmp_path: Path) -> None:
    tags = {"colorspace": 9, "color_range": 1}
    (sample,) = encode(make_video(tmp_path / "a.mp4", 4, frames=flat((120, 90, 170)), tags=tags))
    assert sample.matrix == MATRIX_BT709
    frame = decode(sample.video)[0]
    assert frame.colorspace == 1
    assert mean_yuv(frame) != pytest.approx([120, 90, 170], abs=1)


# Motion


def test_motion_is_the_mean_change_over_a_stride() -> None:
    def grey(value: int) -> av.VideoFrame:
        return flat((value, 128, 128))(0)

    motion = Motion(4)
    for number in range(17):
        motion.add(grey(100 + number), number)
    assert motion.score == pytest.approx(4.0)
    still = Motion(4)
    for number in range(3):
        still.add(grey(50 * number), number)
    assert still.score == 0.0


def test_luma_blocks() -> None:
    frame = corners(64, 48)(0)
    blocks = luma_blocks(frame)
    assert blocks.shape == (6, 8)
    assert blocks[0, 0] == 16
    assert blocks[5, 7] == 230
    assert luma_blocks(flat((90, 128, 128), 6, 4)(0)).shape == (1, 1)


def test_motion_of_samples(make_video: MakeVideo, tmp_path: Path) -> None:
    moving = encode(make_video(tmp_path / "a.mp4", 30))[0].motion
    still = encode(make_video(tmp_path / "b.mp4", 30, frames=flat((90, 128, 128))))[0].motion
    assert moving > 5 > 0.5 > still
