"""The systems that bench_peers.py compares: how each stores the same mp4 bytes, loads and decodes them.

Settings were fixed before the first figure, and what helps a peer is used: uint8 until the main process has the batch,
torch's uint8 resize (6 times as fast here as PIL's or as a float one); frame numbers sorted; one decoder thread per
worker; containers that hold every video `NUM_COPIES` times, so that no peer stops at the end of an epoch.

Legend: B clips, T frames, H W pixels of the result.
"""

from __future__ import annotations

import importlib.machinery
import io
import json
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.batch import IMAGENET_MEAN, IMAGENET_STD, ClipBatch
from pretrain.data.augment import to_model_input
from pretrain.data.clip import pick_crop, pick_frames
from pretrain.data.decode import VideoFacts, decode_frames

FRAMES, STRIDE, SIZE, BATCH = 16, 4, 224, 8
CROP_SCALES = (1.0, 0.875, 0.75, 0.66)
NUM_COPIES = 16
NUM_TARS = 8
FACTS = ("num_frames", "height", "width", "grid", "matrix", "full_range")


class Sample(NamedTuple):
    """One video as every container hands it out."""

    video: bytes
    facts: dict[str, int]
    rate: float


class Clip(NamedTuple):
    """What a clip takes from its video: the same rule on all arms."""

    frame_numbers_T: np.ndarray
    crop: tuple[int, int, int, int]


def draw(facts: dict[str, int]) -> Clip:
    u = np.random.random(4)
    numbers_T, _ = pick_frames(facts["num_frames"], FRAMES, STRIDE, float(u[0]), grid=facts["grid"])
    return Clip(numbers_T, pick_crop(facts["height"] & ~1, facts["width"] & ~1, CROP_SCALES, u[1:]))


# ---------------------------------------------------------------------- decoders: Sample -> what travels


def decode_decord(sample: Sample) -> Tensor:
    """As VideoMAE's loaders do: uint8 [T, H, W, 3]."""
    import decord

    clip = draw(sample.facts)
    reader = decord.VideoReader(io.BytesIO(sample.video), ctx=decord.cpu(0), num_threads=1)
    rgb_THWC = reader.get_batch(clip.frame_numbers_T.tolist()).asnumpy()
    top, left, height, width = clip.crop
    rgb_TCHW = torch.from_numpy(rgb_THWC)[:, top : top + height, left : left + width].permute(0, 3, 1, 2)
    small_TCHW = torch.nn.functional.interpolate(rgb_TCHW, (SIZE, SIZE), mode="bilinear", antialias=True)
    return small_TCHW.permute(0, 2, 3, 1)


def decode_spdl(sample: Sample, how: str) -> Tensor:
    """With spdl's own decoder, cropped and resized by its filter graph: uint8 [T, H, W, 3].

    sample   `sample_decode_video`, its call for single frames of a video
    select   one decode with a `select` filter before crop and scale
    skip     the same with FFmpeg's skip_frame: what our packing allows, told to spdl (not in its manual)
    """
    import spdl.io

    clip = draw(sample.facts)
    top, left, height, width = clip.crop
    view = f"crop={width}:{height}:{left}:{top},scale={SIZE}:{SIZE}:flags=bilinear,format=rgb24"
    packets = spdl.io.demux_video(sample.video)
    first, last = int(clip.frame_numbers_T[0]), int(clip.frame_numbers_T[-1])
    stride = int(clip.frame_numbers_T[1]) - first
    if how == "sample":
        frames = spdl.io.sample_decode_video(packets, clip.frame_numbers_T.tolist(), filter_desc=view)
    elif how == "skip" and sample.facts["grid"] and stride % sample.facts["grid"] == 0:
        number = f"t*{sample.rate}+0.5"
        chosen = f"select='between({number},{first},{last + 1})*lt(mod({number}-{first},{stride}),1)'"
        config = spdl.io.decode_config(decoder_options={"skip_frame": "noref"})
        description = f"{chosen},{view}"
        frames = spdl.io.decode_packets(packets, decode_config=config, filter_desc=description, num_frames=FRAMES)
    else:
        chosen = f"select='between(n,{first},{last})*not(mod(n-{first},{stride}))'"
        frames = spdl.io.decode_packets(packets, filter_desc=f"{chosen},{view}", num_frames=FRAMES)
    rgb_THWC = torch.from_numpy(spdl.io.to_numpy(spdl.io.convert_frames(frames)))
    if rgb_THWC.shape != (FRAMES, SIZE, SIZE, 3):
        raise ValueError(f"spdl gave {tuple(rgb_THWC.shape)}")
    return rgb_THWC


def decode_ours(sample: Sample) -> tuple[np.ndarray, int, int, int, tuple[int, int, int, int]]:
    """With our decoder: planes, height, width, colour bits, crop."""
    clip = draw(sample.facts)
    frames = decode_frames(sample.video, clip.frame_numbers_T, "pyav", VideoFacts(**sample.facts))
    return frames.planes_TN, frames.height, frames.width, frames.color, clip.crop


# ---------------------------------------------------------------------- what travels -> float32 [B, 3, T, H, W]


def stack_rgb(clips: list[Tensor]) -> Tensor:
    return torch.stack(clips)


def finish_rgb(rgb_BTHWC: Tensor) -> Tensor:
    """Normalise. One pass that also turns the axes: 6.6 ms a clip here, against 52 by the obvious expression."""
    shape = rgb_BTHWC.shape
    out_BCTHW = torch.empty((shape[0], 3, *shape[1:4]))
    out_BCTHW.copy_(rgb_BTHWC.permute(0, 4, 1, 2, 3))
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1, 1) * 255
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1, 1) * 255
    return out_BCTHW.sub_(mean).div_(std)


def stack_planes(clips: list[Any]) -> dict[str, Tensor]:
    most = max(planes.shape[1] for planes, *_ in clips)
    planes_BTN = torch.empty((len(clips), FRAMES, most), dtype=torch.uint8)
    for row_TN, (planes_TN, *_) in zip(planes_BTN, clips, strict=True):
        row_TN[:, : planes_TN.shape[1]] = torch.from_numpy(planes_TN)
    height, width, color, crop = (torch.tensor([clip[field] for clip in clips]) for field in range(1, 5))
    return {
        "planes": planes_BTN,
        "height": height,
        "width": width,
        "color": color.to(torch.uint8),
        "crop": crop.float(),
    }


def finish_planes(batch: dict[str, Tensor]) -> Tensor:
    num = len(batch["height"])
    nothing = torch.zeros(num)
    names = ("frame_numbers_BT", "position_B", "epoch_B", "draw_B", "wanted_B", "sample_B", "checksum_B", "weight_B")
    clips = ClipBatch(
        step=0,
        micro_step=0,
        planes_BTN=batch["planes"],
        height_B=batch["height"],
        width_B=batch["width"],
        crop_B4=batch["crop"],
        flip_B=torch.zeros(num, dtype=torch.bool),
        color_B=batch["color"],
        **dict.fromkeys(names, nothing),
    )
    return to_model_input(clips, SIZE)


class Way(NamedTuple):
    """How a peer gets from bytes to clips."""

    decode: Callable[[Sample], Any]
    stack: Callable[[list[Any]], Any]
    finish: Callable[[Any], Tensor]


WAYS: dict[str, Way] = {
    "decord": Way(decode_decord, stack_rgb, finish_rgb),
    "our decode": Way(decode_ours, stack_planes, finish_planes),
    "own decoder, sample": Way(partial(decode_spdl, how="sample"), stack_rgb, finish_rgb),
    "own decoder, select": Way(partial(decode_spdl, how="select"), stack_rgb, finish_rgb),
    "own decoder, skip": Way(partial(decode_spdl, how="skip"), stack_rgb, finish_rgb),
}


# ---------------------------------------------------------------------- containers and loaders


def seed_worker(_: int) -> None:
    """One arithmetic thread per worker, and draws of its own."""
    torch.set_num_threads(1)
    np.random.seed(torch.initial_seed() % 2**32)


def write_webdataset(samples: list[Sample], folder: Path) -> None:
    import webdataset

    for tar in range(NUM_TARS):
        with webdataset.TarWriter(str(folder / f"{tar:04d}.tar")) as writer:
            for number in range(tar, len(samples) * NUM_COPIES, NUM_TARS):
                sample = samples[number % len(samples)]
                text = json.dumps({"facts": sample.facts, "rate": sample.rate})
                writer.write({"__key__": f"{number:06d}", "mp4": sample.video, "json": text.encode()})


def load_webdataset(folder: Path, way: Way, num_workers: int) -> Iterator[Tensor]:
    import webdataset

    def clip(row: dict[str, Any]) -> Any:
        facts = json.loads(row["json"])
        return way.decode(Sample(row["mp4"], facts["facts"], facts["rate"]))

    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(tars, shardshuffle=NUM_TARS, nodesplitter=None, empty_check=False)
    data = data.repeat().shuffle(64).map(clip).batched(BATCH, collation_fn=way.stack)
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=num_workers, worker_init_fn=seed_worker)
    return map(way.finish, iter(loader))


def write_mosaic(samples: list[Sample], folder: Path) -> None:
    from_mosaic = import_mosaic()
    columns = {"video": "bytes", "facts": "json", "rate": "float64"}
    with from_mosaic.MDSWriter(out=str(folder), columns=columns) as writer:
        for sample in samples * NUM_COPIES:
            writer.write({"video": sample.video, "facts": sample.facts, "rate": sample.rate})


def load_mosaic(folder: Path, way: Way, num_workers: int) -> Iterator[Tensor]:
    streaming = import_mosaic()
    streaming.base.util.clean_stale_shared_memory()

    class Clips(streaming.StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            return way.decode(Sample(**super().__getitem__(at)))

    data = Clips(local=str(folder), shuffle=True, batch_size=BATCH)
    return _batches(data, way, num_workers, torch.utils.data.DataLoader)


def import_mosaic() -> Any:
    """mosaicml-streaming imports torchvision for its image classes, and there is no CPU build of that to be had.

    StreamingDataset and MDSWriter, which are all that is used here, never touch it: empty modules stand in.
    """
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules.setdefault(name, module)
    sys.modules["torchvision.datasets"].__dict__.setdefault("VisionDataset", object)
    sys.modules["torchvision.transforms.functional"].__dict__.setdefault("to_tensor", None)
    import streaming
    import streaming.base.util

    return streaming


def write_litdata(samples: list[Sample], folder: Path) -> None:
    import litdata

    rows = [sample._asdict() for sample in samples * NUM_COPIES]
    litdata.optimize(_same, rows, output_dir=str(folder), chunk_bytes="64MB", num_workers=1, start_method="fork")


def _same(row: dict[str, Any]) -> dict[str, Any]:
    return row


def load_litdata(folder: Path, way: Way, num_workers: int) -> Iterator[Tensor]:
    import litdata

    class Clips(litdata.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return way.decode(Sample(**super().__getitem__(at)))

    return _batches(Clips(str(folder), shuffle=True), way, num_workers, litdata.StreamingDataLoader)


def _batches(data: Any, way: Way, num_workers: int, loader_class: Any) -> Iterator[Tensor]:
    loader = loader_class(
        data,
        batch_size=BATCH,
        num_workers=num_workers,
        collate_fn=way.stack,
        worker_init_fn=seed_worker,
        persistent_workers=num_workers > 0,
        drop_last=True,
    )
    while True:
        yield from map(way.finish, loader)


def write_files(samples: list[Sample], folder: Path) -> None:
    for number, sample in enumerate(samples):
        (folder / f"{number:06d}.mp4").write_bytes(sample.video)
        (folder / f"{number:06d}.json").write_text(json.dumps({"facts": sample.facts, "rate": sample.rate}))


def load_spdl(folder: Path, way: Way, num_workers: int) -> Iterator[Tensor]:
    """Threads, as spdl recommends; the files themselves are its container."""
    import spdl.pipeline

    files = sorted(folder.glob("*.mp4"))
    facts = {path: json.loads(path.with_suffix(".json").read_text()) for path in files}
    order = np.random.default_rng()

    def source() -> Iterator[Path]:
        while True:
            yield from (files[number] for number in order.permutation(len(files)))

    def clip(path: Path) -> Any:
        return way.decode(Sample(path.read_bytes(), **facts[path]))

    builder = spdl.pipeline.PipelineBuilder().add_source(source()).pipe(clip, concurrency=num_workers)
    pipeline = builder.aggregate(BATCH).pipe(way.stack).add_sink(2).build(num_threads=num_workers)
    with pipeline.auto_stop():
        yield from map(way.finish, pipeline.get_iterator())


class Peer(NamedTuple):
    """One loading system."""

    module: str
    write: Callable[[list[Sample], Path], None]
    load: Callable[[Path, Way, int], Iterator[Tensor]]


PEERS: dict[str, Peer] = {
    "webdataset": Peer("webdataset", write_webdataset, load_webdataset),
    "mosaicml-streaming": Peer("streaming", write_mosaic, load_mosaic),
    "litdata": Peer("litdata", write_litdata, load_litdata),
    "spdl": Peer("spdl", write_files, load_spdl),
}
