from __future__ import annotations

import errno
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from pretrain import batch
from pretrain.data import decode
from pretrain.data.decode import VideoFacts, decode_frames
from shards.encode import Encoding, Sample, encode_file
from shards.errors import SampleError
from shards.probe import Limits, probe
from shards.reader import open_split

MakeVideo = Callable[..., bytes]
Everything = Callable[[bytes], NDArray[np.uint8]]
FACTS = VideoFacts(num_frames=40, height=48, width=64)

GRID_4 = "keyint=16:min-keyint=16:scenecut=0:open-gop=0:bframes=3:b-adapt=0:b-pyramid=none"
IRREGULAR_MS = np.cumsum([0, *([20, 55, 33, 170, 41] * 8)])[:40].tolist()
VIDEOS = {
    "h264 with B frames": {"options": {"bf": "3", "g": "12"}},
    "h264 with open GOPs": {"options": {"x264-params": "keyint=10:min-keyint=10:open-gop=1:bframes=3"}},
    "h264 of variable rate": {"options": {"bf": "2", "g": "15"}, "times_ms": IRREGULAR_MS},
    "vp9": {"codec": "libvpx-vp9", "container": "webm", "options": {"g": "12", "lag-in-frames": "10"}},
    "vp8 with hidden frames": {
        "codec": "libvpx",
        "container": "webm",
        "options": {"auto-alt-ref": "1", "lag-in-frames": "12", "g": "16"},
    },
    "mpeg-ts": {"container": "mpegts", "options": {"bf": "2", "g": "10"}},
    "mpeg4 in avi": {"codec": "mpeg4", "container": "avi", "options": {"g": "10"}},
}


@pytest.mark.parametrize("kind", VIDEOS)
def test_any_frames_equal_those_of_decoding_everything(
    kind: str, make_video: MakeVideo, decode_everything: Everything
) -> None:
    video = make_video(**VIDEOS[kind])
    every_FN = decode_everything(video)
    facts = replace(FACTS, num_frames=len(every_FN))
    assert len(every_FN) == 40
    rng = np.random.default_rng(0)
    wanted_sets = [rng.choice(40, size=rng.integers(1, 12), replace=False) for _ in range(12)]
    for wanted in [*wanted_sets, np.arange(40), np.array([39]), np.array([0])]:
        numbers_U = np.sort(wanted).astype(np.int32)
        frames = decode_frames(video, numbers_U, "pyav", facts)
        assert np.array_equal(frames.planes_TN, every_FN[numbers_U])
        assert (frames.height, frames.width, frames.color) == (48, 64, 0)


def count_decoded(monkeypatch: pytest.MonkeyPatch, video: bytes, numbers: list[int], facts: VideoFacts) -> int:
    counts: list[int] = []
    plain = decode._decode

    def counting(stream, packet):
        frames = plain(stream, packet)
        counts.append(len(frames))
        return frames

    with monkeypatch.context() as patch:
        patch.setattr(decode, "_decode", counting)
        decode_frames(video, np.array(numbers, dtype=np.int32), "pyav", facts)
    return sum(counts)


def test_frames_on_the_grid_of_the_record_are_decoded_alone(
    make_video: MakeVideo, decode_everything: Everything, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = make_video(options={"x264-params": GRID_4})
    every_FN = decode_everything(video)
    on_grid = replace(FACTS, grid=4)
    numbers_U = np.arange(4, 36, 4, dtype=np.int32)
    frames = decode_frames(video, numbers_U, "pyav", on_grid)
    assert np.array_equal(frames.planes_TN, every_FN[numbers_U])
    off_grid_U = np.array([4, 8, 13], dtype=np.int32)
    assert np.array_equal(decode_frames(video, off_grid_U, "pyav", on_grid).planes_TN, every_FN[off_grid_U])
    numbers = numbers_U.tolist()
    assert count_decoded(monkeypatch, video, numbers, on_grid) < 15
    assert count_decoded(monkeypatch, video, numbers, FACTS) > 30


@pytest.fixture(scope="module")
def grid_videos(make_video: MakeVideo) -> list[Sample]:
    """Two films as packing encodes them, of one group and of two, with the same configuration of the decoder."""
    return [encode_sample(make_video, num_frames) for num_frames in (40, 97)]


def encode_sample(make_video: MakeVideo, num_frames: int, **how: Any) -> Sample:
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(make_video(num_frames=num_frames, **how))
        file.flush()
        facts = probe(Path(file.name), Limits(), lambda frame, number: None)
        (sample,) = encode_file(Path(file.name), facts, Encoding(min_frames=2), Limits(), lambda: None)
    return sample


def facts_of(sample: Sample) -> VideoFacts:
    return VideoFacts(sample.num_frames, sample.height, sample.width, sample.grid)


def test_own_samples_need_no_demuxer_and_come_out_bit_for_bit(
    grid_videos: list[Sample], decode_everything: Everything, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a demuxer was opened")

    everything = [decode_everything(sample.video) for sample in grid_videos]
    monkeypatch.setattr(decode.av, "open", forbidden)
    rng = np.random.default_rng(1)
    for turn in range(60):  # the decoders that rest between videos are used in turn
        sample, every_FN = grid_videos[turn % 2], everything[turn % 2]
        on_grid = np.arange(0, sample.num_frames, 4)
        numbers_U = np.sort(rng.choice(on_grid, size=rng.integers(1, len(on_grid)), replace=False)).astype(np.int32)
        assert np.array_equal(
            decode_frames(sample.video, numbers_U, "pyav", facts_of(sample)).planes_TN, every_FN[numbers_U]
        )
    with pytest.raises(AssertionError, match="demuxer"):
        decode_frames(grid_videos[0].video, np.array([3], np.int32), "pyav", facts_of(grid_videos[0]))


def test_a_decoder_that_met_damage_is_not_used_again(grid_videos: list[Sample], decode_everything: Everything) -> None:
    sample = grid_videos[1]
    every_FN = decode_everything(sample.video)
    numbers_U = np.arange(0, 97, 4, dtype=np.int32)
    rng = np.random.default_rng(2)
    num_refused = 0
    for _ in range(60):
        damaged = bytearray(sample.video)
        for place in rng.integers(40, len(damaged), size=4):
            damaged[place] ^= 1 << int(rng.integers(8))
        try:
            decode_frames(bytes(damaged), numbers_U, "pyav", facts_of(sample))
        except SampleError:
            num_refused += 1
        assert np.array_equal(
            decode_frames(sample.video, numbers_U, "pyav", facts_of(sample)).planes_TN, every_FN[numbers_U]
        )
    assert num_refused > 0


def test_few_decoders_rest(make_video: MakeVideo) -> None:
    for number in range(decode.MAX_RESTING + 3):
        sample = encode_sample(make_video, 8, width=64 + 2 * number)
        decode_frames(sample.video, np.array([0, 4], np.int32), "pyav", facts_of(sample))
        assert len(decode._open_decoders) <= decode.MAX_RESTING


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_frames_go_where_they_are_wanted(decoder: str, grid_videos: list[Sample]) -> None:
    sample, numbers_U = grid_videos[0], np.array([0, 4, 8], np.int32)
    plain = decode_frames(sample.video, numbers_U, decoder, facts_of(sample))
    memory_N = np.full(plain.planes_TN.size + 5, 77, np.uint8)
    frames = decode_frames(sample.video, numbers_U, decoder, facts_of(sample), memory_N)
    assert np.shares_memory(frames.planes_TN, memory_N)
    assert np.array_equal(frames.planes_TN, plain.planes_TN)
    assert (memory_N[-5:] == 77).all()
    with pytest.raises(SampleError, match="room for") as caught:
        decode_frames(sample.video, numbers_U, decoder, facts_of(sample), memory_N[:100])
    assert caught.value.reason == "decode"


def test_no_memory_is_an_answer(grid_videos: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise av.error.FFmpegError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(decode, "_decode", full)
    for facts in (facts_of(grid_videos[0]), replace(facts_of(grid_videos[0]), grid=0)):
        with pytest.raises(SampleError) as caught:
            decode_frames(grid_videos[0].video, np.array([0], np.int32), "pyav", facts)
        assert caught.value.reason == "memory"


def test_without_a_grid_nothing_is_skipped(make_video: MakeVideo, decode_everything: Everything) -> None:
    video = make_video(options={"bf": "3", "x264-params": "b-adapt=2:scenecut=40"})
    numbers_U = np.arange(0, 40, 4, dtype=np.int32)
    assert np.array_equal(decode_frames(video, numbers_U, "pyav", FACTS).planes_TN, decode_everything(video)[numbers_U])


def test_decoding_starts_at_the_key_frame_before_the_first_wanted(
    make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = make_video(options={"bf": "0", "g": "10", "x264-params": "scenecut=0"})
    assert count_decoded(monkeypatch, video, [33], FACTS) <= 10
    assert count_decoded(monkeypatch, video, [3], FACTS) <= 10


def test_packed_samples_decode_as_their_records_say(packed: Path, decode_everything: Everything) -> None:
    reader = open_split(str(packed), "train")
    grids = set()
    for sample, record in enumerate(reader.records):
        video = reader.read(sample)
        every_FN = decode_everything(video)
        facts = VideoFacts(**{name: int(record[name]) for name in ("num_frames", "height", "width", "grid")})
        grids.add(facts.grid)
        assert len(every_FN) == facts.num_frames
        numbers_U = np.arange(0, facts.num_frames, 4, dtype=np.int32)
        assert np.array_equal(decode_frames(video, numbers_U, "pyav", facts).planes_TN, every_FN[numbers_U])
    assert grids == {4}


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_fewer_frames_than_claimed_are_refused(decoder: str, make_video: MakeVideo) -> None:
    video = make_video()
    with pytest.raises(SampleError) as caught:
        decode_frames(video, np.array([10, 40], dtype=np.int32), decoder, replace(FACTS, num_frames=60))
    assert caught.value.reason == "decode"


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_another_size_than_claimed_is_refused(decoder: str, make_video: MakeVideo) -> None:
    with pytest.raises(SampleError, match="index says") as caught:
        decode_frames(make_video(), np.array([0], dtype=np.int32), decoder, replace(FACTS, height=46))
    assert caught.value.reason == "decode"


@pytest.mark.parametrize(
    "content",
    [b"", b"not a video at all" * 100, b"ffconcat version 1.0\nfile /etc/passwd\n", b"\0\0\0\x20ftypisom" + bytes(300)],
    ids=["empty", "text", "playlist", "hollow mp4"],
)
def test_what_is_no_video_is_refused(content: bytes) -> None:
    with pytest.raises(SampleError) as caught:
        decode_frames(content, np.array([0], dtype=np.int32), "pyav", FACTS)
    assert caught.value.reason == "decode"


def test_a_cut_file_is_refused(make_video: MakeVideo) -> None:
    video = make_video(container="matroska", options={"g": "10"})
    with pytest.raises(SampleError) as caught:
        decode_frames(video[: len(video) // 2], np.array([0, 39], dtype=np.int32), "pyav", FACTS)
    assert caught.value.reason == "decode"


def test_decord_gives_the_same_frames_as_rgb(make_video: MakeVideo) -> None:
    video = make_video(options={"bf": "3", "g": "12"})
    numbers_U = np.array([1, 7, 8, 22, 39], dtype=np.int32)
    ours = decode_frames(video, numbers_U, "decord", FACTS)
    assert ours.color == decode.COLOR_RGB24
    rgb_THWC = ours.planes_TN.reshape(5, 48, 64, 3).astype(int)
    theirs = decode_frames(video, numbers_U, "pyav", FACTS)
    luma_THW = theirs.planes_TN[:, : 48 * 64].reshape(5, 48, 64)
    rgb_luma = 16 + (rgb_THWC @ np.array([0.299, 0.587, 0.114])) * 219 / 255
    middle = (luma_THW > 40) & (luma_THW < 210)  # clipped colours have lost their luma
    assert np.abs(rgb_luma - luma_THW)[middle].mean() < 4
    wrong = np.abs(np.roll(rgb_luma, 1, axis=0) - luma_THW)[middle].mean()
    assert wrong > 20


def test_odd_sizes_lose_their_last_row_and_column(make_video: MakeVideo, decode_everything: Everything) -> None:
    video = make_video(width=67, height=49, codec="libx264", pixel_format="yuv444p")
    facts = VideoFacts(num_frames=40, height=49, width=67)
    frames = decode_frames(video, np.array([5], dtype=np.int32), "pyav", facts)
    assert (frames.height, frames.width) == (48, 66)
    assert frames.planes_TN.shape == (1, 48 * 66 * 3 // 2)


@pytest.mark.parametrize(
    ("codec", "pixel_format", "container"),
    [
        ("libx264", "yuv444p", "mp4"),
        ("libx264", "yuv420p10le", "mp4"),
        ("libx264", "yuv422p", "mp4"),
        ("ffv1", "bgr0", "matroska"),
        ("ffv1", "gray", "matroska"),
    ],
)
def test_other_pixel_formats_become_8_bit_420(
    codec: str, pixel_format: str, container: str, make_video: MakeVideo
) -> None:
    """A flat colour: luma and chroma must come out as BT.601 limited says."""
    color = (150, 150, 150) if pixel_format == "gray" else (196, 106, 40)
    options = {"crf": "10"} if codec == "libx264" else {}
    video = make_video(
        num_frames=3, codec=codec, pixel_format=pixel_format, container=container, color=color, options=options
    )
    full_range = int(pixel_format == "gray")
    facts = VideoFacts(num_frames=3, height=48, width=64, full_range=full_range)
    frames = decode_frames(video, np.array([1], dtype=np.int32), "pyav", facts)
    red, green, blue = color
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    expected = (16 + luma * 219 / 255, 128 + (blue - luma) / 1.772 * 224 / 255, 128 + (red - luma) / 1.402 * 224 / 255)
    if full_range:
        expected = (150.0, 128.0, 128.0)
    planes = np.split(frames.planes_TN[0], [48 * 64, 48 * 64 * 5 // 4])
    for plane, value in zip(planes, expected, strict=True):
        assert np.abs(plane.astype(float) - value).max() < 3
    assert frames.color == full_range * decode.COLOR_FULL_RANGE


def test_the_records_colour_travels_with_the_frames(make_video: MakeVideo) -> None:
    facts = replace(FACTS, matrix=1, full_range=1)
    frames = decode_frames(make_video(), np.array([0], dtype=np.int32), "pyav", facts)
    assert frames.color == batch.COLOR_BT709 | batch.COLOR_FULL_RANGE


def test_colour_bits_are_those_of_the_batch() -> None:
    ours = (decode.COLOR_BT709, decode.COLOR_FULL_RANGE, decode.COLOR_RGB24)
    assert ours == (batch.COLOR_BT709, batch.COLOR_FULL_RANGE, batch.COLOR_RGB24)


def test_decoding_imports_numpy_and_av_only() -> None:
    code = "import sys, pretrain.data.worker; print(*{m.split('.')[0] for m in sys.modules})"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"numpy", "av", "shards", "pretrain"} <= set(modules)
    heavy = {"torch", "pydantic", "yaml", "webdataset", "fsspec", "s3fs", "decord", "transformers", "deepspeed", "PIL"}
    assert not heavy & set(modules)
