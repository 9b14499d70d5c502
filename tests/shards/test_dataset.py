"""Sources, selections and growth: every sample once per epoch, whatever is mixed, left out or added."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shards import storage
from shards.dataset import DataSet, Recipe
from shards.errors import SampleError, UserError
from shards.growth import Growth
from shards.layout import MANIFEST_NAME, SOURCE_SHIFT, Manifest
from shards.manifest import build_manifest
from shards.mixture import CYCLE
from shards.source import SourceSpec, load_manifests
from shards.withdraw import Withdrawal, withdrawn_url


def add_tar(folder: Path, number: int, num_samples: int, first: int = 0) -> None:
    """A tar of samples whose videos are a few bytes each: nothing here decodes."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"train-{number:06d}.tar", "w") as tar:
        for sample in range(first, first + num_samples):
            facts = {
                "label": None,
                "group": f"g{sample}",
                "num_frames": 16 + sample,
                "rate": 16.0,
                "width": 64,
                "source": f"{sample}.mp4",
                "source_sha256": f"{sample:064x}",
                "height": 48,
                "grid": 4,
                "motion": float(sample),
                "matrix": 0,
                "full_range": False,
            }
            for extension, data in (("mp4", b"video %d" % sample), ("json", json.dumps(facts).encode())):
                member = tarfile.TarInfo(f"{folder.name}-{sample:09d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def make_set(folder: Path, num_samples: int) -> str:
    add_tar(folder, 0, num_samples - num_samples // 2)
    add_tar(folder, 1, num_samples // 2, first=num_samples - num_samples // 2)
    build_manifest(folder, "train")
    return str(folder)


def grow(folder: str, num_more: int) -> None:
    """Append a tar; the manifest remembers what it was."""
    before = Manifest.from_json((Path(folder) / MANIFEST_NAME).read_text(), folder)
    tars = len(before.splits["train"].shards)
    add_tar(Path(folder), tars, num_more, first=before.splits["train"].num_samples)
    after = build_manifest(Path(folder), "train")
    history = (*before.history, before.version())
    grown = Manifest.make(preset="train", labels=after.labels, splits=after.splits, history=history)
    (Path(folder) / MANIFEST_NAME).write_text(grown.to_json())


def recipe(*sources: str | SourceSpec, **named: object) -> Recipe:
    specs = tuple(source if isinstance(source, SourceSpec) else SourceSpec(source) for source in sources)
    return Recipe(specs, "train", 5, **named)  # pyright: ignore[reportArgumentType]


def test_one_source_draws_every_sample_once_per_epoch(tmp_path: Path) -> None:
    dataset = DataSet(recipe(make_set(tmp_path / "a", 10)))
    epoch_K, sample_K = dataset.places(np.arange(30))
    assert epoch_K.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    for epoch in range(3):
        assert sorted(sample_K[epoch_K == epoch].tolist()) == list(range(10))


def test_a_mixture_has_epochs_per_source(tmp_path: Path) -> None:
    urls = [make_set(tmp_path / name, num) for name, num in (("a", 1000), ("b", 300))]
    dataset = DataSet(recipe(SourceSpec(urls[0], 3.0), SourceSpec(urls[1], 1.0), run_length=4))
    epoch_K, sample_K = dataset.places(np.arange(2 * CYCLE))
    source_K = sample_K >> SOURCE_SHIFT
    assert np.bincount(source_K).tolist() == [6144, 2048]
    for source, size in ((0, 1000), (1, 300)):
        mine = source_K == source
        for epoch in range(int(mine.sum()) // size):
            rows = sample_K[mine & (epoch_K == epoch)] & ((1 << SOURCE_SHIFT) - 1)
            assert sorted(rows.tolist()) == list(range(size))
    epochs = list(dataset.epochs(0, 2 * CYCLE))
    assert Counter((epoch.source, epoch.is_whole) for epoch in epochs) == {
        (0, True): 6,
        (0, False): 1,
        (1, True): 6,
        (1, False): 1,
    }
    assert dataset.read_group([1 << SOURCE_SHIFT | 7]) == [b"video 7"]
    assert "b" in dataset.name(1 << SOURCE_SHIFT | 7)


def test_sources_without_weights_come_by_their_size(tmp_path: Path) -> None:
    urls = [make_set(tmp_path / name, num) for name, num in (("a", 30), ("b", 10))]
    for dataset in (DataSet(recipe(*urls)), DataSet(recipe(f"{tmp_path}/{{a,b}}"))):
        _, sample_K = dataset.places(np.arange(CYCLE))
        assert np.bincount(sample_K >> SOURCE_SHIFT).tolist() == [3072, 1024]
    with pytest.raises(UserError, match="some sources a weight"):
        DataSet(recipe(SourceSpec(urls[0], 1.0), urls[1]))


def test_a_pattern_of_tars_keeps_to_them(tmp_path: Path) -> None:
    make_set(tmp_path / "a", 10)
    dataset = DataSet(recipe(f"{tmp_path}/a/train-{{000001..000001}}.tar"))
    assert sorted(dataset.places(np.arange(5))[1].tolist()) == [5, 6, 7, 8, 9]
    with pytest.raises(UserError, match="tubelet index"):
        DataSet(recipe(f"{tmp_path}/a/train-{{000001..000002}}.tar"))


def test_a_selection_is_drawn_once_per_epoch_and_substituted_from_itself(tmp_path: Path) -> None:
    dataset = DataSet(recipe(make_set(tmp_path / "a", 20), where="motion >= 12"))
    assert dataset.num_samples == 8
    epoch_K, sample_K = dataset.places(np.arange(16))
    for epoch in (0, 1):
        assert sorted(sample_K[epoch_K == epoch].tolist()) == list(range(12, 20))
    wanted = int(sample_K[3])
    assert sorted([wanted, *dataset.substitutes(3, wanted)]) == list(range(12, 20))
    assert dataset.selected(0, 20).tolist() == [False] * 12 + [True] * 8
    assert dataset.selection_hash
    assert not DataSet(recipe(str(tmp_path / "a"))).selection_hash


def test_a_set_that_grew_is_taken_over_at_the_next_epoch(tmp_path: Path) -> None:
    url = make_set(tmp_path / "a", 10)
    before = DataSet(recipe(url))
    state = before.state()
    as_it_was = before.places(np.arange(20))
    grow(url, 5)

    after = DataSet(recipe(url))
    settled = after.go_on(state, 13, [])
    assert [(step.source, step.first_draw, step.num_samples) for step in settled] == [(0, 20, 15)]
    assert [a.tolist() for a in after.places(np.arange(20))] == [a.tolist() for a in as_it_was]
    epoch_K, sample_K = after.places(20 + np.arange(30))
    assert epoch_K.tolist() == [2] * 15 + [3] * 15
    assert sorted(sample_K[:15].tolist()) == sorted(sample_K[15:].tolist()) == list(range(15))
    assert [(e.number, e.is_whole, e.num_rows) for e in after.epochs(5, 36)] == [
        (0, True, 10),
        (1, True, 10),
        (2, True, 15),
        (3, False, 15),
    ]

    # A later start, whose checkpoint lies before what was settled, does the same although the set grew again.
    grow(url, 3)
    later = DataSet(recipe(url))
    (again,) = later.go_on(state, 13, settled)
    assert (again.first_draw, again.num_samples) == (20, 18)
    far = DataSet(recipe(url))
    (far_on,) = far.go_on(after.state(), 21, settled)
    assert (far_on.first_draw, far_on.num_samples) == (35, 18)
    assert far.places(20 + np.arange(15))[1].tolist() == sample_K[:15].tolist()


def test_another_set_is_refused_and_so_are_sources_that_changed_places(tmp_path: Path) -> None:
    urls = [make_set(tmp_path / name, num) for name, num in (("a", 10), ("b", 12))]
    state = DataSet(recipe(*urls)).state()
    assert DataSet(recipe(*urls)).go_on(state, 5, []) == []
    for other in (recipe(urls[0]), recipe(urls[1], urls[0])):
        with pytest.raises(UserError, match=r"data\.shards"):
            DataSet(other).go_on(state, 5, [])
    alone = DataSet(recipe(urls[0], where="motion > 2")).state()
    with pytest.raises(UserError, match=r"data\.where"):
        DataSet(recipe(urls[0], where="motion > 1")).go_on(alone, 5, [])


def test_weights_change_in_cycles_to_come_only(tmp_path: Path) -> None:
    urls = [make_set(tmp_path / name, num) for name, num in (("a", 10), ("b", 12))]
    sources = [SourceSpec(url, 1.0) for url in urls]
    state = DataSet(recipe(*sources)).state()
    changed = recipe(*sources, mix=((2, (3.0, 1.0)),))
    DataSet(changed).go_on(state, 2 * CYCLE, [])
    with pytest.raises(UserError, match="from cycle 3 on only"):
        DataSet(changed).go_on(state, 2 * CYCLE + 1, [])


def test_withdrawn_samples_are_known_and_not_read(tmp_path: Path) -> None:
    url = make_set(tmp_path / "a", 10)
    Path(withdrawn_url(url)).write_text(Withdrawal("train", 4, "a-000000004", "2026-01-01T00:00:00Z").to_json() + "\n")
    dataset = DataSet(recipe(url))
    assert dataset.is_withdrawn(4)
    assert not dataset.is_withdrawn(5)
    withdrawn, read = dataset.read_group([4, 5])
    assert isinstance(withdrawn, SampleError)
    assert withdrawn.reason == "withdrawn"
    assert read == b"video 5"


def test_neighbours_are_one_group(tmp_path: Path) -> None:
    dataset = DataSet(recipe(make_set(tmp_path / "a", 10)))
    assert dataset.groups([7, 1, 0, 2, 4, 6]) == [[0, 1, 2, 4], [6, 7]]
    assert dataset.read_group([0, 1, 2, 4]) == [b"video 0", b"video 1", b"video 2", b"video 4"]
    assert dataset.groups([]) == []


def test_checksums_know_which_samples_there_are(tmp_path: Path) -> None:
    urls = [make_set(tmp_path / name, num) for name, num in (("a", 10), ("b", 12))]
    dataset = DataSet(recipe(*urls))
    exists, checksums = dataset.checksums(np.array([0, 9, 10, 1 << SOURCE_SHIFT | 11, 1 << SOURCE_SHIFT | 12, -1]))
    assert exists.tolist() == [True, True, False, True, False, False]
    assert checksums[0] == dataset.record(0)["checksum"]
    assert len(load_manifests([SourceSpec(url) for url in urls])) == 2


def test_growth_that_was_written_is_obeyed_over_the_cursor(tmp_path: Path) -> None:
    url = make_set(tmp_path / "a", 10)
    state = DataSet(recipe(url)).state()
    grow(url, 2)
    hash_ = load_manifests([SourceSpec(url)])[0].hash
    dataset = DataSet(recipe(url))
    assert dataset.go_on(state, 3, [Growth(0, 20, hash_, 12)]) == []
    assert dataset.places(np.arange(10, 40))[0].tolist() == [1] * 10 + [2] * 12 + [3] * 8


def test_a_selection_may_not_change_where_a_set_grew(tmp_path: Path) -> None:
    url = make_set(tmp_path / "a", 10)
    narrow, wide = recipe(f"{url}/train-000000.tar"), recipe(f"{url}/train-{{000000..000001}}.tar")
    state = DataSet(narrow).state()
    grow(url, 4)
    with pytest.raises(UserError, match="selects other samples"):
        DataSet(wide).go_on(state, 3, [])
    grown = DataSet(narrow)
    settled = grown.go_on(state, 3, [])
    assert settled
    with pytest.raises(UserError, match="selects other samples"):
        DataSet(wide).go_on(grown.state(), 3, settled)
    assert DataSet(narrow).go_on(grown.state(), 3, settled) == []
    more = DataSet(recipe(f"{url}/train-{{000000..000002..2}}.tar"))  # with a tar that was not there at the time
    more.go_on(state, 3, settled)
    assert more.num_samples == 9


def test_a_store_that_fails_amid_a_doubt_costs_the_samples_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few bytes came; whether the tar was exchanged cannot be asked, for the store is gone by now."""
    dataset = DataSet(recipe(make_set(tmp_path / "a", 10)))
    dataset.read_group([0])  # the tar is known

    def short(*_: object, **__: object) -> bytes:
        raise storage.ShortReadError("3 of 7 bytes")

    def gone(*_: object, **__: object) -> tuple[int, str]:
        raise OSError("gave up after 300 s")

    monkeypatch.setattr(storage, "read_range", short)
    monkeypatch.setattr(storage, "size_and_tag", gone)
    for samples in ([1, 2], [7]):  # of a tar that is known, and of one that is not
        found = dataset.read_group(samples)
        assert [one.reason for one in found if isinstance(one, SampleError)] == ["io"] * len(samples)
