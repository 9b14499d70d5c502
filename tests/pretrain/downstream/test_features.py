"""From videos that somebody names to features: what is read, what is left out, what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.downstream.clips import open_samples
from pretrain.downstream.encode import write_mp4
from pretrain.downstream.features import extract
from pretrain.downstream.knn import probe
from pretrain.downstream.view import middle_crops
from pretrain.load import encode, load_export
from shards.pack import PackOptions, pack

CLIPS = Path(__file__).parents[3] / "configs" / "clips"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both splits hold both films; one clip is too short, one has no class."""
    root = tmp_path_factory.mktemp("packed")
    for split in ("train", "val"):
        for label, name in (("city", "city_320x180_h264.mp4"), ("sintel", "sintel_320x180_h264.mp4")):
            (root / "films" / split / label).mkdir(parents=True)
            film = (
                (CLIPS / name).read_bytes() + b"\0\0\0\x0dfree" + f"{split:5}".encode()
            )  # the same file twice is refused
            (root / "films" / split / label / name).write_bytes(film)
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    write_mp4(iter(noise), root / "films" / "train" / "city" / "short.mp4", rate=5)
    write_mp4(iter(np.repeat(noise, 4, axis=0)), root / "films" / "train" / "loose.mp4", rate=5)
    pack(root / "films", root / "data", PackOptions(min_frames=2, workers=1), None)
    return root / "data"


@pytest.mark.slow
def test_features_are_the_mean_of_the_tokens_of_the_middle_clip(exported: Path, packed: Path) -> None:
    opened = load_export(exported)
    with open_samples(packed, opened.geometry) as samples:
        found = extract([opened.encoder, opened.encoder], samples, opened.geometry, batch=3)
        usable = [sample for sample in samples if sample.label >= 0 and sample.num_frames >= 8]
        with torch.no_grad():
            clip = usable[-1].middle_clip(8, 4)
            expected_D = encode(opened.encoder, middle_crops([clip], 64))[0].mean(0)
    assert found.skipped == {"short": 1, "unlabelled": 1}
    assert len(found.labels_N) == len(usable) >= 8
    assert found.labels_N.tolist() == [sample.label for sample in usable]
    assert found.held_out_N.any()
    assert not found.held_out_N.all()
    torch.testing.assert_close(found.features[0][-1], expected_D, atol=1e-5, rtol=0)
    assert torch.equal(found.features[0], found.features[1])


def test_clip_is_in_the_middle_and_its_stride_drops_to_what_fits(exported: Path, packed: Path) -> None:
    geometry = load_export(exported).geometry
    with open_samples(packed, geometry) as samples:
        sample = max(samples, key=lambda one: one.num_frames)
        numbers_T = np.arange(8, dtype=np.int32) * 4 + (sample.num_frames - 29) // 2
        nearest = [sample.decode(numbers_T + shift).planes_TN for shift in range(-4, 5)]
        middle = sample.middle_clip(8, 4).planes_TN
        assert any((middle == frames).all() for frames in nearest)
        assert sample.middle_clip(sample.num_frames // 2, 4).planes_TN.shape[0] == sample.num_frames // 2


def test_probe_takes_the_splits_of_a_packed_data_set(exported: Path, packed: Path) -> None:
    result = probe(exported, packed, num_random=1)
    assert result.protocol == "train against val"
    assert result.num_queries == result.num_bank
    assert result.accuracy == 1.0  # the same films lie in both splits
    assert result.skipped == {"short": 1, "unlabelled": 1}
    by_manifest = probe(exported, packed / "manifest.json", num_random=1)
    assert by_manifest.accuracy == result.accuracy
