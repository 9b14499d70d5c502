"""The order of the stream as a whole: runs, selection, mixing, growth; all of it one exact sequence."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.config import load_config
from pretrain.data.loader import ClipLoader
from pretrain.data.source import open_dataset
from pretrain.journal import GROWTH_NAME, Journal, JournalRow, read_journal
from pretrain.sections import DataConfig, MixConfig, SourceConfig
from pretrain.verdict import EXACT
from shards.errors import UserError
from shards.growth import Growth
from shards.layout import SOURCE_SHIFT
from shards.mixture import CYCLE
from shards.reader import open_split
from tests.pretrain.data.stream_ranks import Cursor, audit_stream, committed_rows
from tests.pretrain.data.streams import SEED, Data, Sequenced, Streamed, all_rows, append, damage, kept, order_of
from tests.pretrain.data.test_loader import rows_of, take

# ------------------------------------------------------------------ runs of neighbours


def test_a_run_is_one_read(data: Data, twelve: Path) -> None:
    settings = data(shards=str(twelve), run_length=4)
    with ClipLoader(settings, seed=SEED, global_batch=4, num_clips=36) as loader:
        batches = [batch.sample_B.tolist() for batch in loader]
        stats = loader.stats()
    assert stats.num_requests == len(batches) == 9
    for samples in batches:
        assert samples == list(range(samples[0], samples[0] + 4))
    for epoch in range(3):
        assert sorted(itertools.chain(*batches[3 * epoch : 3 * epoch + 3])) == list(range(12))
    assert len({tuple(batch[0] for batch in batches[i : i + 3]) for i in (0, 3, 6)}) > 1
    records = open_split(str(twelve), "train").records
    extents = [int(r["offset"][-1] + r["size"][-1] - r["offset"][0]) for r in (records[samples] for samples in batches)]
    assert stats.bytes_read == sum(extents)


def test_without_runs_every_sample_is_one_read(data: Data, twelve: Path) -> None:
    with ClipLoader(data(shards=str(twelve)), seed=SEED, global_batch=1, num_clips=24) as loader:
        samples = [int(batch.sample_B[0]) for batch in loader]
        stats = loader.stats()
    records = open_split(str(twelve), "train").records
    assert stats.num_requests == 24
    assert stats.bytes_read == int(records["size"][samples].sum())


@pytest.mark.parametrize("world", [1, 2])
def test_runs_that_divide_nothing_cost_little_more(world: int, data: Data, packed: Path) -> None:
    """25 samples in two tars, steps of 8: an epoch ends amid a run, a run amid a tar."""
    config = data(run_length=4)
    dataset = open_dataset(config, seed=SEED)
    num_steps, expected, requests = 25, 0, 0
    per_rank = 8 // world
    for share in range(num_steps * world):
        _, samples_K = dataset.places(np.arange(share * per_rank, (share + 1) * per_rank))
        expected += len(dataset.groups(sorted(set(samples_K.tolist()))))
    samples: list[int] = []
    for rank in range(world):
        with ClipLoader(
            config, seed=SEED, global_batch=8, rank=rank, world_size=world, num_clips=8 * num_steps
        ) as loader:
            samples += [sample for batch in loader for sample in batch.sample_B.tolist()]
            requests += loader.stats().num_requests
    assert Counter(samples) == dict.fromkeys(range(25), 8)
    assert requests == expected <= 200 // 4 + 8 * 3  # per epoch: its end, the tar's end, what the walk moved


@pytest.fixture(scope="module")
def in_runs(data: Data) -> Sequenced:
    return all_rows(data(run_length=4), batch=8, num_clips=56)


@pytest.mark.parametrize(
    ("workers", "world", "micro_batch"), [(0, 2, 4), (1, 2, 1), (0, 4, 1), (3, 1, 3), (0, 3, 2), (0, 1, 8)]
)
def test_runs_are_one_sequence(
    workers: int, world: int, micro_batch: int, data: Data, in_runs: Sequenced, packed: Path
) -> None:
    config = data(run_length=4, workers=workers)
    rows = all_rows(config, batch=8, num_clips=56, world=world, micro_batch=micro_batch)
    assert rows == in_runs
    assert [row[5] for row in rows] == order_of(packed, 56, run_length=4)
    assert [row[5] for row in rows] != order_of(packed, 56)


def test_a_resume_amid_an_epoch_of_runs(data: Data, in_runs: Sequenced) -> None:
    with ClipLoader(data(run_length=4), seed=SEED, global_batch=8) as loader:
        take(loader, 3)
        state = json.loads(json.dumps(loader.state_dict()))
    with ClipLoader(data(run_length=4), seed=SEED, global_batch=8, micro_batch=3) as loader:
        loader.load_state_dict(state)
        assert rows_of(take(loader, 4)) == in_runs[24:]


def test_several_clips_of_the_videos_of_a_run(data: Data, twelve: Path) -> None:
    settings = data(shards=str(twelve), run_length=4, clips_per_video=2)
    with ClipLoader(settings, seed=SEED, global_batch=8, micro_batch=2, num_clips=24) as loader:
        rows = rows_of(loader)
        assert loader.stats().num_requests == 3  # over all micro batches of a step
    assert [row[1:3] for row in rows] == [(position, draw) for position in range(12) for draw in (0, 1)]
    assert [row[5] for row in rows[::2]] == order_of(twelve, 12, run_length=4)


# ------------------------------------------------------------------ selecting


def test_a_selection_is_what_is_drawn_and_substituted_from(data: Data, packed_copy: Path) -> None:
    records = open_split(str(packed_copy), "train").records
    chosen = np.flatnonzero((records["num_frames"] >= 24) & (records["motion"] > 1))
    assert 5 < len(chosen) < 20
    config = data(shards=str(packed_copy), where="num_frames >= 24 and motion > 1", bad_sample_limit=0.5)
    num = len(chosen)
    damage(packed_copy, int(chosen[2]))
    rows = all_rows(config, batch=2, num_clips=2 * num)
    for epoch in (0, 1):
        assert sorted(row[4] for row in rows if row[3] == epoch) == chosen.tolist()
    assert {row[5] for row in rows} == set(chosen.tolist()) - {int(chosen[2])}
    with ClipLoader(config, seed=SEED, global_batch=2) as loader:
        assert loader.num_samples == num
        state = loader.state_dict()
    looser = config.model_copy(update={"where": "num_frames >= 24"})
    with (
        ClipLoader(looser, seed=SEED, global_batch=2) as loader,
        pytest.raises(UserError, match=r"data\.where is 'num_frames >= 24'; it selects other samples"),
    ):
        loader.load_state_dict(state)
    for wrong, told in (("length > 3", "'length' is none"), ("motion > 900", "chooses none of 25 samples")):
        with pytest.raises(UserError, match=told):
            ClipLoader(data(where=wrong), seed=SEED, global_batch=2)


# ------------------------------------------------------------------ mixing


def mixed(data: Data, packed: Path, twelve: Path, *mix: MixConfig, **named: Any) -> DataConfig:
    sources = (SourceConfig(url=str(packed), weight=3), SourceConfig(url=str(twelve), weight=1))
    return data(shards=sources, mix=mix, **named)


def from_position(
    config: DataConfig, position: int, num_steps: int, journal: Journal | None = None, **named: Any
) -> Sequenced:
    """Jump to a position, as a resume does."""
    with ClipLoader(config, seed=SEED, global_batch=8, journal=journal, **named) as loader:
        loader.load_state_dict({**loader.state_dict(), "position": position})
        return rows_of(take(loader, num_steps))


def test_two_sources_come_by_weight_and_change_where_a_cycle_begins(
    data: Data, packed: Path, twelve: Path, tmp_path: Path
) -> None:
    config = mixed(data, packed, twelve, MixConfig(cycle=1, weights=(1, 3)))
    dataset = open_dataset(config, seed=SEED)
    epoch_K, sample_K = dataset.places(np.arange(2 * CYCLE))
    source_K = sample_K >> SOURCE_SHIFT
    assert np.bincount(source_K[:CYCLE]).tolist() == [3072, 1024]
    assert np.bincount(source_K[CYCLE:]).tolist() == [1024, 3072]
    first = CYCLE - 32
    rows = from_position(config, first, 8)
    there = slice(first, first + 64)
    assert [row[1] for row in rows] == list(range(first, first + 64))
    assert [row[3] for row in rows] == epoch_K[there].tolist()
    assert [row[4] for row in rows] == [row[5] for row in rows] == sample_K[there].tolist()
    checksums = [open_split(str(folder), "train").records["checksum"] for folder in (packed, twelve)]
    assert [row[6] for row in rows] == [
        int(checksums[row[5] >> SOURCE_SHIFT][row[5] & ((1 << SOURCE_SHIFT) - 1)]) for row in rows
    ]
    for rank_rows in (
        [from_position(config, first, 8, rank=rank, world_size=2, micro_batch=3) for rank in range(2)],
        [from_position(config.model_copy(update={"workers": 1, "cache": kept(tmp_path)}), first, 8)],
    ):
        assert sorted(row for one in rank_rows for row in one) == rows


def test_weights_may_change_in_cycles_to_come(data: Data, packed: Path, twelve: Path) -> None:
    before = mixed(data, packed, twelve)
    with ClipLoader(before, seed=SEED, global_batch=8) as loader:
        state = {**loader.state_dict(), "position": CYCLE - 8}
    after = mixed(data, packed, twelve, MixConfig(cycle=1, weights=(1, 3)))
    with ClipLoader(after, seed=SEED, global_batch=8) as loader:
        loader.load_state_dict(state)
        assert rows_of(take(loader, 2)) == from_position(after, CYCLE - 8, 2)
        with pytest.raises(UserError, match="from cycle 2 on only"):
            loader.load_state_dict({**state, "position": CYCLE + 8})
    with pytest.raises(UserError, match=r"weight 1 for source 1; it must be at least 1/4096"):
        ClipLoader(
            data(shards=(SourceConfig(url=str(packed), weight=9000), SourceConfig(url=str(twelve), weight=1))),
            seed=SEED,
            global_batch=8,
        )


def test_substitutes_come_from_the_same_source(data: Data, packed: Path, twelve: Path) -> None:
    config = mixed(data, packed, twelve, bad_sample_limit=0.5)
    damage(twelve, 5)
    rows = from_position(config, 0, 16)
    replaced = [row for row in rows if row[4] != row[5]]
    assert {row[4] for row in replaced} == {1 << SOURCE_SHIFT | 5}
    assert {row[5] >> SOURCE_SHIFT for row in replaced} == {1}


def test_a_journal_row_of_another_order_is_not_obeyed(data: Data, packed: Path, twelve: Path) -> None:
    """An attempt that died wrote rows at positions that were not committed; then the weights there were changed."""
    before = mixed(data, packed, twelve)
    after = mixed(data, packed, twelve, MixConfig(cycle=1, weights=(1, 3)), bad_sample_limit=0.5)
    places = [open_dataset(config, seed=SEED).places(np.arange(CYCLE, CYCLE + 8))[1] for config in (before, after)]
    changed = int(np.flatnonzero(places[0] != places[1])[0])
    same = int(np.flatnonzero(places[0] == places[1])[0])
    plain = from_position(after, CYCLE, 1)
    journal = Journal(None)
    for place in (changed, same):
        other = 3 if places[0][place] != 3 else 4
        journal.add(JournalRow(CYCLE + place, int(places[0][place]), other, "io"))
    rows = from_position(after, CYCLE, 1, journal=journal)
    assert rows[changed] == plain[changed]
    assert rows[same][5] in (3, 4)
    assert rows[same][4] == plain[same][4]


# ------------------------------------------------------------------ frames by time


def test_frames_a_second_whatever_the_source(data: Data, packed: Path) -> None:
    records = open_split(str(packed), "train").records
    rates = records["rate"]
    assert set(np.unique(rates).tolist()) == {24.0, 25.0}
    rows = all_rows(data(rate_hz=5.0), batch=5, num_clips=25)
    for row in rows:
        times_s = np.array(row[7]) / rates[row[5]]
        if records[row[5]]["num_frames"] > 15:
            assert np.abs(times_s - times_s[0] - 0.2 * np.arange(4)).max() <= 0.5 / 24 + 1e-9
    assert all_rows(data(rate_hz=5.0, stride=1), batch=5, num_clips=25) == rows
    long = [row for row in rows if records[row[5]]["num_frames"] > 15]
    strides = {rate: {tuple(np.diff(row[7])) for row in long if rates[row[5]] == rate} for rate in (24, 25)}
    assert strides == {24: {(5, 5, 4)}, 25: {(5, 5, 5)}}
    with ClipLoader(data(rate_hz=1.0), seed=SEED, global_batch=5, num_clips=25) as loader:
        assert len(rows_of(loader)) == 25
        assert loader.stats().stride_dropped == 25  # no video is that long


# ------------------------------------------------------------------ growing


def test_appended_shards_are_taken_over_where_an_epoch_begins(
    data: Data, packed: Path, twelve: Path, tmp_path: Path
) -> None:
    run = Streamed(tmp_path / "run", data(shards=str(twelve)), batch=4)
    run.run_dir.mkdir()
    as_it_was = all_rows(run.config, batch=4, num_clips=24)
    rows = run.run(5)
    assert not (run.run_dir / "journal" / GROWTH_NAME).exists()

    append(packed, twelve, range(12, 25))
    cursor = Cursor.read(run.run_dir)
    assert cursor is not None
    journal = Journal(run.run_dir / "journal", 9, 1)
    with ClipLoader(run.config, seed=SEED, global_batch=4, rank=1, world_size=2, journal=journal) as loader:
        loader.load_state_dict(cursor.state)
        assert not (run.run_dir / "journal" / GROWTH_NAME).exists()  # rank 0 writes it, the others come to the same
        second = rows_of(take(loader, 1))
    rows += run.run(10, world=2)
    (line,) = (run.run_dir / "journal" / GROWTH_NAME).read_text().splitlines()
    assert json.loads(line)["first_draw"] == 24
    assert json.loads(line)["num_samples"] == 25
    assert rows[:24] == as_it_was
    assert second == [row for row in rows if row[0] == 5][2:]

    append(packed, twelve, (3, 4))  # it grows again, and the next start settles that
    rows += run.run(26, world=3)
    steps = [json.loads(line) for line in (run.run_dir / "journal" / GROWTH_NAME).read_text().splitlines()]
    assert [(step["first_draw"], step["num_samples"]) for step in steps] == [(24, 25), (49, 27)]
    sizes = [(0, 0, 12), (1, 12, 12), (2, 24, 25), (3, 49, 27), (4, 76, 27)]
    assert [row[1] for row in rows] == list(range(104))
    for epoch, first, size in sizes:
        assert [row[3] for row in rows[first : first + size]] == [epoch] * size
        assert sorted(row[5] for row in rows[first : first + size]) == list(range(size))
    result = audit_stream(run.run_dir, run.config, seed=SEED, global_batch=4)
    assert result.exit_code == EXACT, result.lines
    assert result.counts["epochs"] == 5
    assert committed_rows(run.run_dir, Cursor.read(run.run_dir).head)["sample"].tolist() == [row[5] for row in rows]  # pyright: ignore[reportOptionalMemberAccess]


def test_what_an_attempt_that_died_settled_is_obeyed(data: Data, packed: Path, twelve: Path, tmp_path: Path) -> None:
    config = data(shards=str(twelve))
    with ClipLoader(config, seed=SEED, global_batch=4) as loader:
        state = {**loader.state_dict(), "position": 20}
    append(packed, twelve, range(12, 25))
    journal = Journal(tmp_path / "journal", 1, 0)
    with ClipLoader(config, seed=SEED, global_batch=4, journal=journal) as loader:
        loader.load_state_dict(state)
        rows = rows_of(take(loader, 8))
    with ClipLoader(config, seed=SEED, global_batch=4, journal=Journal(tmp_path / "journal", 2, 0)) as loader:
        loader.load_state_dict(state)
        assert rows_of(take(loader, 8)) == rows
    assert len((tmp_path / "journal" / GROWTH_NAME).read_text().splitlines()) == 1


def test_a_torn_line_of_growth_harms_no_later_one(tmp_path: Path) -> None:
    first, second = Growth(0, 24, "aa", 25), Growth(0, 49, "bb", 27)
    journal = Journal(tmp_path / "journal", 1, 0)
    journal.add_growth([first])
    with (tmp_path / "journal" / GROWTH_NAME).open("ab") as file:
        file.write(b'{"source": 0, "fir')  # a power cut
    again = Journal(tmp_path / "journal", 2, 0)
    assert again.growth() == [first]
    again.add_growth([second])
    assert again.growth() == Journal(tmp_path / "journal", 3, 0).growth() == [first, second]


def test_a_row_from_before_the_data_grew_is_not_obeyed(data: Data, packed: Path, twelve: Path, tmp_path: Path) -> None:
    """A run dies before its first checkpoint, the data grows, and the run begins again with all of it."""
    damage(twelve, order_of(twelve, 12)[5])
    run = Streamed(tmp_path / "run", data(shards=str(twelve), bad_sample_limit=0.5), batch=4)
    run.run_dir.mkdir()
    run.run(3)
    (run.run_dir / "cursor.json").unlink()
    assert [row.position for row in read_journal(run.run_dir / "journal")] == [5]
    append(packed, twelve, range(12, 25))
    run.run(8)
    result = audit_stream(run.run_dir, run.config, seed=SEED, global_batch=4)
    assert result.exit_code == EXACT, result.lines
    assert result.substituted == {}


# ------------------------------------------------------------------ as the config names it

BASE = (
    *("run.dir=r", "objective.masked_frame={}", "train.steps=10", "train.global_batch=8", "train.micro_batch=2"),
    "optim.lr=1e-3",
)


def configured(*overrides: str) -> DataConfig:
    return load_config(None, [*BASE, *overrides]).data


def test_sources_on_the_command_line() -> None:
    listed = configured("data.shards=[{url: a, weight: 2}, {url: 's3://b/c d', weight: 1}]")
    assert listed.sources == (SourceConfig(url="a", weight=2), SourceConfig(url="s3://b/c d", weight=1))
    for pattern in ("/d/{a,b}", "s3://b/train-{000000..000003}.tar", "{a,b}/x"):
        assert configured(f"data.shards={pattern}").sources == (SourceConfig(url=pattern),)
    assert configured("data.shards=[{url: a}]", "data.mix=[{cycle: 2, weights: [1]}]").mix == (
        MixConfig(cycle=2, weights=(1.0,)),
    )
    two = configured("data.shards=/d/{a,b}", "data.mix=[{cycle: 1, weights: [1, 2]}]")  # how many is known when opened
    assert two.mix[0].weights == (1.0, 2.0)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.shards=[{url: a, weight: -2}]"], "data.shards.0.weight is -2; it must be greater than 0"),
        (["data.shards=[{weight: 2}]"], "data.shards.0.url is missing"),
        (["data.shards=[{url: a, wait: 2}]"], "data.shards.0.wait is not a key"),
        (["data.shards=[a, b]"], "data.shards.0 is 'a'; it must be"),
        (["data.shards=[]"], "data.shards is an empty list"),
        (
            ["data.shards=[{url: a}, {url: b}]", "data.mix=[{cycle: 1, weights: [1]}]"],
            "weight to each of the 2 sources",
        ),
        (["data.shards=a", "data.mix=[{cycle: 0, weights: [1]}]"], "data.mix.0.cycle is 0"),
        (
            ["data.shards=a", "data.mix=[{cycle: 2, weights: [1]}, {cycle: 1, weights: [1]}]"],
            "data.mix has the cycles [2, 1]; they must rise",
        ),
        (["data.shards=a", "data.rate_hz=4", "data.stride=2"], "data.rate_hz is 4 and data.stride 2; one excludes"),
        (["data.shards=a", "data.run_length=3"], "data.run_length is 3; it must divide the videos of a step (8)"),
        (
            ["data.shards=a", "data.run_length=8", "data.clips_per_video=2"],
            "data.run_length is 8; it must divide the videos of a step (4)",
        ),
    ],
)
def test_what_the_config_refuses(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        configured(*overrides)
    text = str(caught.value)
    assert told in text
    assert "function-" not in text
    assert "tuple[" not in text


def test_a_folder_pattern_that_has_another_number_of_sources(data: Data, twelve: Path, packed: Path) -> None:
    (twelve.parent / "other").mkdir()
    for path in packed.iterdir():
        if path.is_file():
            (twelve.parent / "other" / path.name).write_bytes(path.read_bytes())
    pattern = f"{twelve.parent}/{{twelve,other}}"
    with ClipLoader(data(shards=pattern), seed=SEED, global_batch=4) as loader:
        assert loader.num_samples == 37
    config = data(shards=pattern, mix=(MixConfig(cycle=1, weights=(1, 2, 3)),))
    with pytest.raises(UserError, match=r"data\.mix gives 3 weights from cycle 1 on; data\.shards has 2"):
        ClipLoader(config, seed=SEED, global_batch=4)
    sources = (SourceConfig(url=str(twelve), weight=1), SourceConfig(url=str(packed)))
    with pytest.raises(UserError, match="some sources a weight"):
        ClipLoader(data(shards=sources), seed=SEED, global_batch=4)
