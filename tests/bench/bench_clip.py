"""Process-CPU per training clip: webdataset + decord on the original films against ours on the same films, packed.

    python tests/bench/bench_clip.py FOLDER [--json OUT] [--repeats 5] [--ours loader|direct] [--workers 0]

Both sides end at float32 [8, 3, 16, 224, 224]: 16 frames at stride 4, multi-scale crop, resize, flip, normalised, on
one thread. The other side is set up as users of VideoMAE have it, with a cheaper resize than theirs: tars of the
original files, `webdataset` in a DataLoader, `decord.VideoReader(BytesIO, num_threads=1)` (VideoMAE's kinetics.py),
then crop and resize of uint8 frames with torch's own SIMD kernel instead of PIL. It takes every fourth frame of the
original also where that has 60 frames a second, which spares it half of the span in time.

Ours: `tubelet pack --preset train` of each film (not timed), then ClipLoader and to_model_input (`--ours loader`), or
decode_frames and to_model_input without the loader (`direct`). "Decode alone" has neither storage nor augmentation.
Sides alternate within each repeat; each repeat draws the same clips. CPU is user + system of this process and
of the decode workers. Medians, and (largest - smallest) / median as spread.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import decord
import numpy as np
import torch
import webdataset
from measure import cpu_s, finish, machine, table
from torch.nn.functional import interpolate

from pretrain.batch import IMAGENET_MEAN, IMAGENET_STD
from pretrain.data.augment import to_model_input
from pretrain.data.clip import pick_crop, plan_clip
from pretrain.data.decode import VideoFacts, decode_frames
from pretrain.data.loader import ClipLoader
from pretrain.data.rows import Rows, Video
from pretrain.sections import DataConfig
from shards.pack import PackOptions, pack
from shards.reader import open_split

FILMS = ("one_by_one", "highway", "sintel", "chaplin", "fly_pair")
FRAMES, STRIDE, SIZE, BATCH = 16, 4, 224, 8
SCALES = (1.0, 0.875, 0.75, 0.66)
FACT_NAMES = ("num_frames", "height", "width", "grid", "matrix", "full_range")
Batches = Iterator[torch.Tensor]


# The other side


def peer_clip(sample: dict[str, Any]) -> torch.Tensor:
    rng = random.Random(sample["draw"])
    frames_THWC = peer_decode(sample["mp4"], rng)
    height, width = frames_THWC.shape[1:3]
    top, left, rows, columns = pick_crop(height, width, SCALES, [rng.random() for _ in range(3)])
    crop_TCHW = torch.from_numpy(frames_THWC)[:, top : top + rows, left : left + columns].permute(0, 3, 1, 2)
    small_TCHW = interpolate(crop_TCHW, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    if rng.random() < 0.5:
        small_TCHW = small_TCHW.flip(3)
    clip_CTHW = small_TCHW.permute(1, 0, 2, 3).float().div_(255)
    mean_C111, std_C111 = (torch.tensor(values).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return clip_CTHW.sub_(mean_C111).div_(std_C111)


def peer_decode(film: bytes, rng: random.Random) -> np.ndarray:
    reader = decord.VideoReader(io.BytesIO(film), ctx=decord.cpu(0), num_threads=1)
    start = rng.randrange(len(reader) - (FRAMES - 1) * STRIDE)
    return reader.get_batch([start + STRIDE * number for number in range(FRAMES)]).asnumpy()


def with_draw(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for draw, sample in enumerate(samples):
        yield {**sample, "draw": draw}


def peer_batches(tar: Path, num_clips: int, workers: int) -> Batches:
    source = webdataset.WebDataset(str(tar), resampled=True, shardshuffle=False, empty_check=False)
    clips = source.compose(with_draw).map(peer_clip).with_epoch(num_clips)
    yield from torch.utils.data.DataLoader(clips, batch_size=BATCH, num_workers=workers)


# Our side


def our_batches(folder: Path, num_clips: int, workers: int) -> Batches:
    data = DataConfig(shards=str(folder), frames=FRAMES, stride=STRIDE, size=SIZE, flip=True, workers=workers)
    with ClipLoader(data, seed=0, global_batch=BATCH, num_clips=num_clips) as loader:
        for batch in loader:
            yield to_model_input(batch, SIZE)


class Packed:
    """Samples of a packed film, without a loader."""

    def __init__(self, folder: Path) -> None:
        self.reader = open_split(str(folder), "train")

    def plan(self, draw: int) -> tuple[int, Any, VideoFacts]:
        sample = draw % len(self.reader.records)
        record = self.reader.records[sample]
        facts = VideoFacts(**{name: int(record[name]) for name in FACT_NAMES})
        plan = plan_clip(
            seed=0,
            epoch=draw // len(self.reader.records),
            sample=sample,
            draw=0,
            num_frames=facts.num_frames,
            height=facts.height,
            width=facts.width,
            grid=facts.grid,
            frames=FRAMES,
            stride=STRIDE,
            short="reject",
            crop_scales=SCALES,
            flip=True,
        )
        return sample, plan, facts

    def batches(self, num_clips: int) -> Batches:
        for first in range(0, num_clips, BATCH):
            plans = [self.plan(draw) for draw in range(first, first + BATCH)]
            frame_bytes = max(facts.height * facts.width * 3 // 2 for _, _, facts in plans)
            rows = Rows.make(BATCH, FRAMES, frame_bytes)
            for row, (sample, plan, facts) in enumerate(plans):
                frames = decode_frames(self.reader.read(sample), plan.frame_numbers_T, "pyav", facts)
                video = Video(position=row, epoch=0, wanted=sample, rows=(row,), draws=(0,))
                rows.fill(video, [plan], frames, np.arange(FRAMES)[None], sample, 0)
            yield to_model_input(rows.to_batch(0, 0), SIZE)


# Both


def cpu_ms_per_clip(make: Callable[[], Batches], num_clips: int) -> float:
    start_s = cpu_s()
    count = 0
    for clips_BCTHW in make():
        assert clips_BCTHW.shape[1:] == (3, FRAMES, SIZE, SIZE)
        assert clips_BCTHW.dtype == torch.float32
        count += len(clips_BCTHW)
    assert count == num_clips
    return (cpu_s() - start_s) / num_clips * 1000


def decode_ms(decode: Callable[[int], object], num_clips: int) -> float:
    start_s = time.process_time()
    for draw in range(num_clips):
        decode(draw)
    return (time.process_time() - start_s) / num_clips * 1000


def median_and_spread(values: list[float]) -> dict[str, float]:
    middle = float(np.median(values))
    return {"median": round(middle, 2), "spread": round((max(values) - min(values)) / middle, 2)}


def measure_film(film: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    (folder / "films").mkdir(parents=True)
    (folder / "films" / film.name).symlink_to(film.resolve())
    pack(folder / "films", folder / "packed", PackOptions(val_fraction=0.0, workers=1), None)
    tar = folder / "film.tar"
    with tarfile.open(tar, "w") as out:
        out.add(film, "film.mp4")
    content = film.read_bytes()
    packed = Packed(folder / "packed")
    videos = [packed.reader.read(sample) for sample in range(len(packed.reader.records))]

    def our_decode(draw: int) -> object:
        sample, plan, facts = packed.plan(draw)
        return decode_frames(videos[sample], plan.frame_numbers_T, "pyav", facts)

    num_peer, num_ours, workers = arguments.peer_clips, arguments.our_clips, arguments.workers
    ways: dict[str, Callable[[], float]] = {
        "peer_decode": lambda: decode_ms(lambda draw: peer_decode(content, random.Random(draw)), num_peer),
        "our_decode": lambda: decode_ms(our_decode, num_ours),
        "peer": lambda: cpu_ms_per_clip(lambda: peer_batches(tar, num_peer, workers), num_peer),
        "ours": lambda: cpu_ms_per_clip(
            (lambda: packed.batches(num_ours))
            if arguments.ours == "direct"
            else (lambda: our_batches(folder / "packed", num_ours, workers)),
            num_ours,
        ),
    }
    for way in ways.values():
        way()  # imports, memory, page cache
    runs: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(arguments.repeats):
        for name in list(ways)[:: 1 if repeat % 2 else -1]:
            runs[name].append(ways[name]())
    result: dict[str, Any] = {name: median_and_spread(values) for name, values in runs.items()}
    result["ratio"] = round(result["peer"]["median"] / result["ours"]["median"], 2)
    result["decode_ratio"] = round(result["peer_decode"]["median"] / result["our_decode"]["median"], 2)
    result["original_bytes"] = len(content)
    result["packed_bytes"] = sum(len(video) for video in videos)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds films whose names begin with " + ", ".join(FILMS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-clips", type=int, default=BATCH, help="per repeat; a multiple of 8")
    parser.add_argument("--our-clips", type=int, default=6 * BATCH, help="per repeat; a multiple of 8")
    parser.add_argument("--workers", type=int, default=0, help="decode processes on either side")
    parser.add_argument("--ours", choices=["loader", "direct"], default="loader")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    decord.logging.set_level(decord.logging.ERROR)
    films: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in FILMS:
            (film,) = arguments.folder.glob(f"{name}*")
            films[name] = measure_film(film, Path(scratch, name), arguments)
    ratio, decode_ratio = (
        round(math.prod(film[key] for film in films.values()) ** (1 / len(films)), 2)
        for key in ("ratio", "decode_ratio")
    )
    keys = ("peer", "ours", "ratio", "peer_decode", "our_decode", "decode_ratio", "original_bytes", "packed_bytes")
    rows = [
        [name, *(f"{v['median']} (±{v['spread'] / 2:.0%})" if isinstance(v := film[key], dict) else v for key in keys)]
        for name, film in films.items()
    ]
    print(table(["film, CPU ms per clip", *keys], rows))
    result = {
        "films": films,
        "ratio": ratio,
        "decode_ratio": decode_ratio,
        "targets": {"ratio": 5.0, "decode_ratio": 10.0},
        "passed": ratio >= 5 and decode_ratio >= 10,
        "settings": {key: value for key, value in vars(arguments).items() if isinstance(value, int | str)},
        "machine": machine(),
    }
    finish(result, arguments.json)
    raise SystemExit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
