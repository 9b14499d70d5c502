from __future__ import annotations

import dataclasses
import itertools

import pytest

from launch.plan_simulate import (
    BLOOM,
    DAY_S,
    HOUR_S,
    LLAMA,
    OPT,
    RATES,
    SIZES,
    Saving,
    ettr_table,
    simulate,
    young_daly_s,
)

SAVING = Saving(interval_s=600, stall_s=2, write_s=10, restart_s=600)


def test_rates_are_those_of_the_reports() -> None:
    assert LLAMA.mtbf_s(16_384) == pytest.approx(54 * DAY_S / 419)
    assert OPT.mtbf_s(992) == pytest.approx(7.5 * HOUR_S)
    assert BLOOM.mtbf_s(384) == pytest.approx(7 * DAY_S)


def test_is_a_function_of_its_seed() -> None:
    first = simulate(SAVING, mtbf_s=3 * HOUR_S, seed=1)
    assert first == simulate(SAVING, mtbf_s=3 * HOUR_S, seed=1)
    assert first != simulate(SAVING, mtbf_s=3 * HOUR_S, seed=2)


def test_without_failures_only_saves_cost() -> None:
    found = simulate(SAVING, mtbf_s=1e15, seed=0, work_s=100 * 600)
    assert (found.num_failures, found.lost_s) == (0, 0)
    assert found.wall_s == pytest.approx(100 * 600 + 99 * 2)


def test_time_adds_up() -> None:
    """Wall time is training that counted, training that was lost, stalls, restarts: nothing else."""
    saving = dataclasses.replace(SAVING, stall_s=0)
    found = simulate(saving, mtbf_s=20 * HOUR_S, seed=3, work_s=90 * DAY_S)
    assert found.num_failures > 50
    extra_s = found.wall_s - found.trained_s - found.lost_s
    assert 0.95 * found.num_failures * 600 < extra_s <= found.num_failures * 600


def test_agrees_with_the_first_order_formula() -> None:
    """Lost per failure: half an interval and what was not durable yet, and the restart (arXiv 2410.18124)."""
    saving = Saving(interval_s=1800, stall_s=20, write_s=60, restart_s=300)
    mtbf_s = 12 * HOUR_S
    found = simulate(saving, mtbf_s=mtbf_s, seed=5, work_s=2000 * DAY_S)
    expected = 1 / (1 + 20 / 1800 + (1800 / 2 + 60 + 300) / mtbf_s)
    assert found.ettr == pytest.approx(expected, rel=0.005)


def test_young_daly_is_the_best_interval() -> None:
    mtbf_s, stall_s = 4 * HOUR_S, 30.0
    best_s = young_daly_s(stall_s, mtbf_s)

    def ettr(interval_s: float) -> float:
        saving = Saving(interval_s, stall_s, stall_s, restart_s=300)
        return simulate(saving, mtbf_s=mtbf_s, seed=7, work_s=1500 * DAY_S).ettr

    assert ettr(best_s) > ettr(best_s / 3)
    assert ettr(best_s) > ettr(best_s * 3)


def test_a_save_slower_than_its_interval_is_left_out() -> None:
    slow = Saving(interval_s=60, stall_s=1, write_s=600, restart_s=60)
    found = simulate(slow, mtbf_s=1e15, seed=0, work_s=6000)
    assert found.wall_s < 6000 + 15, "one in flight at a time"


def test_a_cluster_that_never_gets_anywhere_ends() -> None:
    hopeless = Saving(interval_s=3600, stall_s=1, write_s=600, restart_s=600)
    found = simulate(hopeless, mtbf_s=300, seed=0, work_s=DAY_S)
    assert found.ettr < 0.01


def test_16384_gpus_at_the_rate_of_llama_train_nine_tenths_of_the_time() -> None:
    """Its report says that more than 90 % of the time was effective training."""
    interval_s = young_daly_s(5, LLAMA.mtbf_s(16_384))
    saving = Saving(interval_s, 5, 25)
    found = simulate(saving, mtbf_s=LLAMA.mtbf_s(16_384), seed=0, work_s=54 * DAY_S)
    assert 0.90 < found.ettr < 0.97
    assert found.num_failures == pytest.approx(419 / found.ettr, rel=0.2)


def test_larger_and_less_reliable_clusters_lose_more() -> None:
    table = ettr_table(SAVING, SIZES, seed=0)
    assert list(table) == [64, 256, 1024, 4096, 16_384]
    for smaller, larger in itertools.pairwise(SIZES):
        for rate in RATES:
            assert table[smaller][rate.name] >= table[larger][rate.name] - 0.005
    assert table[16_384]["BLOOM"] > table[16_384]["OPT-175B"]
