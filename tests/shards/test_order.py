from __future__ import annotations

import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order import (
    FILLER,
    clip_places,
    num_micro_steps,
    rank_clips,
    sample_numbers,
    substitute,
    uniform,
)

seeds = st.integers(0, 2**63 - 1)


@given(seed=seeds, num_samples=st.integers(1, 700), epoch=st.integers(0, 2**20))
def test_every_epoch_holds_every_sample_once(seed: int, num_samples: int, epoch: int) -> None:
    positions_K = epoch * num_samples + np.arange(num_samples)
    epoch_K, sample_K = sample_numbers(seed, num_samples, positions_K)
    assert (epoch_K == epoch).all()
    assert np.array_equal(np.sort(sample_K), np.arange(num_samples))


@given(seed=seeds, num_samples=st.integers(1, 50), start=st.integers(0, 1000), size=st.integers(1, 200))
def test_a_batch_over_several_epochs_equals_single_positions(
    seed: int, num_samples: int, start: int, size: int
) -> None:
    positions_K = start + np.arange(size)
    epoch_K, sample_K = sample_numbers(seed, num_samples, positions_K)
    for position, epoch, sample in zip(positions_K, epoch_K, sample_K, strict=True):
        one_epoch, one_sample = sample_numbers(seed, num_samples, np.array([position]))
        assert (epoch, sample) == (one_epoch[0], one_sample[0])


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [3, 4, 5, 6])
@pytest.mark.parametrize("over", ["epochs", "seeds"])
def test_all_orders_of_a_few_samples_are_about_equally_likely(num_samples: int, over: str) -> None:
    num_orders = math.factorial(num_samples)
    expected = 50
    num_draws = num_orders * expected
    if over == "epochs":
        _, sample_K = sample_numbers(7, num_samples, np.arange(num_draws * num_samples))
        orders = sample_K.reshape(num_draws, num_samples)
    else:
        first_K = np.arange(num_samples)
        orders = np.stack([sample_numbers(seed, num_samples, first_K)[1] for seed in range(num_draws)])
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == num_orders
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square / (num_orders - 1) < 2


def test_each_sample_reaches_each_place() -> None:
    num_samples, num_epochs = 37, 3700
    _, sample_K = sample_numbers(3, num_samples, np.arange(num_samples * num_epochs))
    counts = np.zeros((num_samples, num_samples))
    np.add.at(counts, (np.tile(np.arange(num_samples), num_epochs), sample_K), 1)
    expected = num_epochs / num_samples
    assert ((counts - expected) ** 2 / expected).sum() / (num_samples - 1) ** 2 < 1.2


def test_epochs_and_seeds_differ_and_neighbours_are_unrelated() -> None:
    num_samples = 1000
    orders = [sample_numbers(0, num_samples, epoch * num_samples + np.arange(num_samples))[1] for epoch in range(3)]
    orders.append(sample_numbers(1, num_samples, np.arange(num_samples))[1])
    for i, one in enumerate(orders):
        steps = Counter(np.diff(one).tolist())
        assert max(steps.values()) < 12
        for other in orders[:i]:
            assert (one == other).sum() < 12


def test_the_order_is_the_one_of_this_version() -> None:
    """A change of these numbers changes the order of every run: raise ORDER_VERSION."""
    assert sample_numbers(0, 10, np.arange(20))[1].tolist() == [
        4,
        1,
        7,
        0,
        3,
        2,
        6,
        9,
        8,
        5,
        4,
        9,
        3,
        2,
        5,
        7,
        6,
        1,
        8,
        0,
    ]
    assert uniform(1, epoch=2, sample=3, draw=4, purpose="crop", size=2).tolist() == [
        0.3549278083880676,
        0.4443971441285537,
    ]
    wanted = int(sample_numbers(0, 10, np.array([5]))[1][0])
    assert [substitute(0, 10, 5, wanted, attempt) for attempt in range(9)] == [3, 8, 9, 1, 4, 7, 5, 6, 0]


@pytest.mark.parametrize("num_samples", [10**9, 2**30 + 1, 10**12, 2**40])
def test_nothing_grows_with_the_number_of_samples(num_samples: int) -> None:
    positions_K = 3 * num_samples - 2000 + np.arange(4096)
    sample_numbers(0, num_samples, positions_K[:1])
    tracemalloc.start()
    epoch_K, sample_K = sample_numbers(0, num_samples, positions_K)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4_000_000
    assert sorted(set(epoch_K.tolist())) == [2, 3]
    assert ((sample_K >= 0) & (sample_K < num_samples)).all()
    for epoch in (2, 3):
        assert len(set(sample_K[epoch_K == epoch].tolist())) == (epoch_K == epoch).sum()
    assert abs(sample_K.mean() / num_samples - 0.5) < 0.03


@given(
    global_batch=st.integers(1, 60),
    micro_batch=st.integers(1, 12),
    world_size=st.integers(1, 9),
    step=st.integers(0, 10**6),
)
def test_ranks_and_micro_steps_cut_the_global_batch_exactly(
    global_batch: int, micro_batch: int, world_size: int, step: int
) -> None:
    num_micro = num_micro_steps(global_batch, micro_batch, world_size)
    assert (num_micro - 1) * micro_batch * world_size < global_batch <= num_micro * micro_batch * world_size
    slices = [
        rank_clips(step, m, global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=world_size)
        for rank in range(world_size)
        for m in range(num_micro)
    ]
    assert all(len(clips_B) == micro_batch for clips_B in slices)
    together = np.concatenate(slices)
    assert together[:global_batch].tolist() == list(range(step * global_batch, (step + 1) * global_batch))
    assert (together[global_batch:] == FILLER).all()


@given(clips=st.lists(st.integers(-1, 10**15), min_size=1), clips_per_video=st.integers(1, 5))
def test_clips_of_a_video_are_neighbours(clips: list[int], clips_per_video: int) -> None:
    position_B, draw_B = clip_places(np.array(clips), clips_per_video)
    for clip, position, draw in zip(clips, position_B.tolist(), draw_B.tolist(), strict=True):
        if clip == FILLER:
            assert (position, draw) == (FILLER, 0)
        else:
            assert position * clips_per_video + draw == clip
            assert 0 <= draw < clips_per_video


@given(seed=seeds, num_samples=st.integers(2, 200), position=st.integers(0, 2**40))
@settings(max_examples=50)
def test_substitutes_are_all_the_others(seed: int, num_samples: int, position: int) -> None:
    _, wanted = sample_numbers(seed, num_samples, np.array([position]))
    names = [substitute(seed, num_samples, position, int(wanted[0]), attempt) for attempt in range(num_samples - 1)]
    assert sorted([*names, int(wanted[0])]) == list(range(num_samples))
    assert names[0] == substitute(seed, num_samples, position, int(wanted[0]), num_samples - 1)


def test_a_single_sample_has_no_other() -> None:
    assert substitute(0, 1, 5, 0, 0) == 0
    assert sample_numbers(0, 1, np.arange(3))[1].tolist() == [0, 0, 0]
    assert sample_numbers(0, 1, np.arange(3))[0].tolist() == [0, 1, 2]


def test_uniform_is_uniform_and_depends_on_every_argument() -> None:
    keys = {"epoch": 1, "sample": 2, "draw": 3, "purpose": "crop"}
    draws = uniform(5, **keys, size=100_000)
    assert ((draws >= 0) & (draws < 1)).all()
    counts, _ = np.histogram(draws, bins=100, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() / 99 < 1.5
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02
    assert np.array_equal(uniform(5, **keys, size=7), draws[:7])
    for change in ({"epoch": 2}, {"sample": -1}, {"draw": 4}, {"purpose": "flip"}):
        assert not np.isin(uniform(5, **{**keys, **change}, size=50), draws).any()
    assert not np.isin(uniform(6, **keys, size=50), draws).any()


@given(
    seed=seeds,
    num_samples=st.integers(1, 300),
    run_length=st.integers(1, 40),
    epoch=st.integers(0, 50),
    first_position=st.integers(0, 1000),
)
def test_every_epoch_of_runs_holds_every_sample_once(
    seed: int, num_samples: int, run_length: int, epoch: int, first_position: int
) -> None:
    positions_K = first_position + epoch * num_samples + np.arange(num_samples)
    epoch_K, sample_K = sample_numbers(
        seed, num_samples, positions_K, run_length=run_length, first_position=first_position, first_epoch=3
    )
    assert (epoch_K == epoch + 3).all()
    assert np.array_equal(np.sort(sample_K), np.arange(num_samples))


@pytest.mark.parametrize("num_samples", [100_003, 99_999, 4096])
@pytest.mark.parametrize("run_length", [2, 8, 64])
def test_runs_are_neighbours_in_every_epoch(num_samples: int, run_length: int) -> None:
    """All but the few runs at which an epoch begins or ends, or that r does not divide."""
    num_epochs = 3
    positions_K = np.arange(num_epochs * num_samples // run_length * run_length)
    _, sample_K = sample_numbers(1, num_samples, positions_K, run_length=run_length)
    is_whole = (np.diff(sample_K.reshape(-1, run_length), axis=1) == 1).all(axis=1)
    assert (~is_whole).sum() <= 4 * num_epochs
    starts_K = sample_K.reshape(-1, run_length)[is_whole, 0][: num_samples // run_length - 4]
    assert abs(np.corrcoef(starts_K[:-1], starts_K[1:])[0, 1]) < 0.1


@given(seed=seeds, num_samples=st.integers(1, 60), run_length=st.integers(2, 9), size=st.integers(1, 200))
def test_runs_over_several_epochs_equal_single_positions(
    seed: int, num_samples: int, run_length: int, size: int
) -> None:
    together = sample_numbers(seed, num_samples, np.arange(size), run_length=run_length)
    alone = [sample_numbers(seed, num_samples, np.array([p]), run_length=run_length) for p in range(size)]
    assert together[0].tolist() == [int(epoch[0]) for epoch, _ in alone]
    assert together[1].tolist() == [int(sample[0]) for _, sample in alone]


def test_sources_have_orders_of_their_own() -> None:
    orders = {tuple(sample_numbers(0, 30, np.arange(30), source=source)[1].tolist()) for source in range(5)}
    assert len(orders) == 5


def test_4096_ranks_own_every_clip_of_a_step_once() -> None:
    """10^8 samples: neighbours of a run stay with one rank, and no rank needs to know what another does."""
    num_samples, world_size, micro_batch, run_length, step = 10**8, 4096, 8, 8, 987_654
    global_batch = world_size * micro_batch * 2
    owned: list[int] = []
    num_reads = 0
    for rank in range(world_size):
        clips = np.concatenate(
            [
                rank_clips(
                    step, m, global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=world_size
                )
                for m in range(2)
            ]
        )
        owned += clips.tolist()
        _, sample_K = sample_numbers(5, num_samples, clips, run_length=run_length)
        num_reads += 1 + int((np.diff(sample_K) != 1).sum())
    assert owned == list(range(step * global_batch, (step + 1) * global_batch))
    assert num_reads <= 1.1 * global_batch / run_length
