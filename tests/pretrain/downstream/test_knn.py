"""The kNN probe: its arithmetic on made-up features, its protocols, and one real folder of videos."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.downstream import knn
from pretrain.downstream.encode import write_mp4
from pretrain.downstream.features import Features
from pretrain.downstream.knn import ProbeResult, accuracy, probe
from shards.errors import UserError

CLIPS = Path(__file__).parents[3] / "configs" / "clips"


def blobs(num_classes: int, per_class: int, spread: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(num_classes).repeat_interleave(per_class)
    centres = torch.eye(num_classes, 16) * 3 + 100  # far from the origin: only centring tells the classes apart
    return centres[labels_N] + spread * torch.randn(len(labels_N), 16, generator=generator), labels_N


def leave_one_out(num: int) -> Tensor:
    return ~torch.eye(num, dtype=torch.bool)


def test_separate_classes_are_named_and_noise_is_at_chance() -> None:
    features_ND, labels_N = blobs(4, 20, 0.1)
    queries_Q = torch.arange(80)
    assert accuracy(features_ND, labels_N, queries_Q, leave_one_out(80), 10, 4) == 1.0
    noise_ND = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    shuffled_N = torch.arange(4).repeat(100)
    found = accuracy(noise_ND, shuffled_N, torch.arange(400), leave_one_out(400), 10, 4)
    assert 0.15 < found < 0.35


def test_query_never_votes_for_itself_or_for_what_is_forbidden() -> None:
    features_ND = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels_N = torch.tensor([0, 1, 0, 1])
    assert accuracy(features_ND, labels_N, torch.arange(4), leave_one_out(4), 1, 2) == 0.0  # the twin is of the other
    only_own_class = labels_N[:, None] == labels_N[None, :]
    assert accuracy(features_ND, labels_N, torch.arange(4), only_own_class & leave_one_out(4), 1, 2) == 1.0


def test_accuracy_is_the_same_in_any_order_of_the_videos() -> None:
    features_ND, labels_N = blobs(3, 12, 3.0)
    expected = accuracy(features_ND, labels_N, torch.arange(36), leave_one_out(36), 5, 3)
    assert 0.34 < expected < 1.0
    order_N = torch.randperm(36, generator=torch.Generator().manual_seed(2))
    assert accuracy(features_ND[order_N], labels_N[order_N], torch.arange(36), leave_one_out(36), 5, 3) == expected


def found(labels: list[int], groups: list[int], held_out: list[bool]) -> Features:
    return Features((), torch.tensor(labels), torch.tensor(groups), torch.tensor(held_out), {"short": 2})


def choose(features: Features, num_classes: int = 2) -> Any:
    return knn._choose_protocol(features, tuple(f"class {number}" for number in range(num_classes)))  # pyright: ignore


def test_split_of_the_data_is_used() -> None:
    protocol, allowed_QN, queries_Q, notes = choose(found([0, 1, 0, 1], [0, 1, 2, 3], [False, False, True, True]))
    assert protocol == "train against val"
    assert queries_Q.tolist() == [2, 3]
    assert allowed_QN.tolist() == [[True, True, False, False]] * 2
    assert notes == ()


def test_without_a_split_one_group_is_left_out() -> None:
    protocol, allowed_QN, queries_Q, notes = choose(found([0, 0, 1, 1], [0, 1, 0, 1], [False] * 4))
    assert protocol == "leave one group out"
    assert queries_Q.tolist() == [0, 1, 2, 3]
    assert allowed_QN[0].tolist() == [False, True, False, True]
    assert notes == ()


def test_class_of_a_single_source_is_said() -> None:
    protocol, allowed_QN, _, notes = choose(found([0, 0, 1, 1], [0, 0, 1, 1], [False] * 4))
    assert protocol == "leave one clip out"
    assert allowed_QN[0].tolist() == [False, True, True, True]
    assert "single source" in notes[0]


def test_split_whose_classes_were_never_seen_is_not_used() -> None:
    protocol, _, queries_Q, notes = choose(found([0, 0, 1, 1], [0, 0, 1, 1], [False, False, True, True]))
    assert protocol == "leave one clip out"
    assert len(queries_Q) == 4
    assert "class 1" in notes[0]


def test_one_video_per_class_cannot_be_probed() -> None:
    with pytest.raises(UserError, match=r"single usable video \(2 short\)"):
        choose(found([0, 1], [0, 1], [False, False]))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of real clips, and a file that is none."""
    folder = tmp_path_factory.mktemp("films")
    for label, name in (("city", "city_320x180_h264.mp4"), ("sintel", "sintel_320x180_h264.mp4")):
        (folder / label).mkdir()
        shutil.copy(CLIPS / name, folder / label / name)
    (folder / "city" / "notes.mp4").write_text("this is no video")
    return folder


@pytest.mark.slow
def test_probe_on_a_folder_of_videos(exported: Path, films: Path) -> None:
    result = probe(exported, films, num_random=2)
    assert isinstance(result, ProbeResult)
    assert result.protocol == "leave one clip out"  # each class is one film: only plumbing is shown
    assert "single source" in result.notes[0]
    assert result.num_classes == 2
    assert len(result.random_accuracies) == 2
    assert 0.5 <= result.chance < 1
    assert 0 <= result.accuracy <= 1
    assert result.num_queries == result.num_bank >= 3
    assert json.loads(json.dumps(result.to_json()))["neighbours"] == result.neighbours
    assert any("random weights" in line for line in result.lines())


def test_probe_finds_what_tells_the_classes_apart(exported: Path, films: Path) -> None:
    """Two different films are told apart even by a random network: the whole way from file to vote works."""
    assert probe(exported, films, num_random=1).random_accuracy > 0.8


def test_probe_says_what_is_wrong(exported: Path, films: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        probe(exported, tmp_path / "nothing")
    with pytest.raises(UserError, match="num_random is 0"):
        probe(exported, films, num_random=0)
    (tmp_path / "one" / "only").mkdir(parents=True)
    shutil.copy(CLIPS / "city_320x180_h264.mp4", tmp_path / "one" / "only" / "a.mp4")
    with pytest.raises(UserError, match="1 labelled class"):
        probe(exported, tmp_path / "one")
    for seed, label in enumerate(("a", "b")):
        noise = np.random.default_rng(seed).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
        write_mp4(iter(noise), tmp_path / "short" / label / "x.mp4", rate=5)
    with pytest.raises(UserError, match=r"0 usable videos \(2 short\); a probe needs at least 2 of 8 frames or more"):
        probe(exported, tmp_path / "short")
