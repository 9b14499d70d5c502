from __future__ import annotations

from collections import Counter
from dataclasses import fields

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.console import Console
from pretrain.data.loader import LoaderStats
from pretrain.meter import COUNTS, Meter, data_numbers, peak_flops, rank_numbers
from pretrain.objective import ClipKeys, Pretraining
from pretrain.sections import FrameOrderConfig, MaskedFrameConfig, ObjectiveConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_meter(clock: Clock, **changes: object) -> Meter:
    settings = {"num_clips": 8, "world_size": 2, "device": CPU, "clock": clock, **changes}
    return Meter(1000, **settings)


def test_rates_are_of_training_alone() -> None:
    clock = Clock()
    meter = make_meter(clock)
    clock.now_s += 50  # building the model: before the first step
    for _ in range(4):
        with meter.step():
            clock.now_s += 2
    with meter.section("eval"):
        clock.now_s += 30
    clock.now_s += 1  # between steps: belongs to training
    row = meter.row(LoaderStats(wait_s=3.0, bytes_read=7, stride_dropped=2, substituted=Counter(short=1)))
    assert row["step_s"] == 9 / 4
    assert row["clips_per_s"] == 8 / (9 / 4)
    assert row["data_wait_fraction"] == 3 / 9
    assert (row["bytes_read"], row["stride_dropped"], row["substituted/short"]) == (7, 2, 1)
    assert row["data_wait_max_s"] == 3.0
    assert meter.seconds("eval") == 30
    with meter.step():
        clock.now_s += 5
    assert meter.row(LoaderStats())["step_s"] == 5


def test_a_row_tells_of_all_ranks() -> None:
    """Counts are sums, memory is the fullest rank's, the wait is the slowest rank's, who is named."""
    clock = Clock()
    others = [
        LoaderStats(wait_s=2.5, decode_s=1.0, num_clips=10, bytes_read=100, num_retries=1, num_requests=11),
        LoaderStats(wait_s=1.0, decode_s=0.4, num_clips=10, bytes_read=50, substituted=Counter(io=2), num_hedges=3),
    ]
    meter = make_meter(
        clock,
        gather=lambda mine: [mine] + [{**rank_numbers(o), "memory_bytes": 1e18, "gpu_memory_bytes": 0} for o in others],
    )
    with meter.step():
        clock.now_s += 5
    mine = LoaderStats(wait_s=0.5, decode_s=0.1, num_clips=10, bytes_read=7, substituted=Counter(io=1, died=1))
    row = meter.row(mine)
    assert (row["slowest_rank"], row["data_wait_max_s"], row["data_wait_fraction"]) == (1, 2.5, 0.5)
    assert row["data_wait_mean_fraction"] == pytest.approx(4 / 3 / 5)
    assert row["decode_ms"] == pytest.approx(1000 * 1.5 / 30)
    assert (row["bytes_read"], row["retries"], row["requests"], row["hedges"]) == (157, 1, 11, 3)
    assert (row["substituted/io"], row["substituted/died"]) == (3, 1)
    assert row["memory_bytes"] == 1e18
    assert row["gpu_memory_bytes"] is None


def test_every_number_of_the_loader_reaches_the_row() -> None:
    """Each field is given a number of its own; two ranks: sums are twice that."""
    names = [field.name for field in fields(LoaderStats) if field.name != "substituted"]
    stats = LoaderStats(**{name: index for index, name in enumerate(names, 1)}, substituted=Counter(short=100))
    row = data_numbers([rank_numbers(stats)] * 2, 10.0)
    renamed = {"num_respawns": "decoder_respawns"}
    for name in set(names) - {"wait_s", "decode_s", "num_clips"}:
        assert row[renamed.get(name, name.removeprefix("num_"))] == 2 * getattr(stats, name), name
    assert row["substituted/short"] == 200
    assert row["data_wait_max_s"] == stats.wait_s
    assert row["decode_ms"] == 1000 * stats.decode_s / stats.num_clips
    assert all(isinstance(row[name], int) for name in COUNTS)


def test_who_waited_is_null_when_nobody_did() -> None:
    row = data_numbers([rank_numbers(LoaderStats())] * 3, 4.0)
    assert row["slowest_rank"] is row["decode_ms"] is None
    assert (row["data_wait_fraction"], row["data_wait_max_s"], row["requests"]) == (0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("longest", "mean", "words"),
    [
        (0.02, 0.01, None),
        (0.12, 0.11, "  wait 12%"),
        (0.12, 0.04, "  wait 12% (rank 3)"),
        (None, None, None),
    ],
)
def test_console_tells_the_wait_and_the_slowest_rank(
    capsys: pytest.CaptureFixture[str], longest: float | None, mean: float | None, words: str | None
) -> None:
    row = {"loss": 1.0, "lr": 1e-4, "clips_per_s": 512.25, "data_wait_fraction": longest, "slowest_rank": 3}
    Console(is_first=True).step(50, 100000, {**row, "data_wait_mean_fraction": mean})
    line = capsys.readouterr().out.rstrip("\n")
    assert line.startswith("step     50/100000  loss 1.0000  lr 1.00e-04  512.2 clips/s")
    assert line.endswith(words) if words else "wait" not in line
    assert len(line) < 80


def test_section_is_timed_when_it_fails_and_before_the_first_step() -> None:
    clock = Clock()
    meter = make_meter(clock)

    def fail() -> None:
        with meter.section("save"):
            clock.now_s += 4
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert meter.seconds("save") == 4
    with meter.step():
        clock.now_s += 1
    assert meter.row(LoaderStats())["step_s"] == 1


def test_row_without_steps_has_no_rates() -> None:
    clock = Clock()
    meter = make_meter(clock)
    with meter.step():
        clock.now_s += 1
    meter.row(LoaderStats())
    row = meter.row(LoaderStats())
    assert row["step_s"] is row["clips_per_s"] is row["data_wait_fraction"] is row["mfu"] is None


def test_mfu_is_null_on_unknown_hardware_and_a_ratio_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    meter = make_meter(clock)
    with meter.step():
        clock.now_s += 1
    row = meter.row(LoaderStats())
    assert row["mfu"] is row["gpu_memory_bytes"] is None
    assert row["memory_bytes"] > 10_000_000

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 5)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: None)
    meter = Meter(3 * 10**12, num_clips=26, world_size=2, device=GPU, clock=clock)
    with meter.step():
        clock.now_s += 0.5
    row = meter.row(LoaderStats())
    assert row["mfu"] == pytest.approx(3 * 26e12 / 0.5 / (2 * 312e12))
    assert row["gpu_memory_bytes"] == 5


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA RTX A1000", "bf16", None),  # no A100
        ("NVIDIA GH200 480GB", "bf16", None),
    ],
)
def test_peak_is_known_or_null(monkeypatch: pytest.MonkeyPatch, name: str, precision: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert peak_flops(GPU, precision) == peak
    assert peak_flops(CPU, precision) is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(GPU, "fp32") is None


@sdpa_kernel(SDPBackend.MATH)  # torch's counter does not know the fused attention of CPUs
def test_counted_operations_equal_torchs_count() -> None:
    both = ObjectiveConfig(masked_frame=MaskedFrameConfig(), frame_order=FrameOrderConfig())
    one = ObjectiveConfig(masked_frame=MaskedFrameConfig(mask_ratio=0.75))
    for size, objective in (("nano", both), ("nano", one), ("tiny", both), ("tiny", one)):
        model = Pretraining(size, objective, frames=8, size=96, seed=0)
        numbers_B = torch.arange(2)
        plans = model.plan(ClipKeys(0, numbers_B, numbers_B, numbers_B))
        with FlopCounterMode(display=False) as forward:
            losses = model(torch.randn(2, 3, 8, 96, 96), plans)
        with FlopCounterMode(display=False) as backward:
            sum(loss.value_B.sum() for loss in losses.values()).backward()
        assert 2 * model.flops() == pytest.approx(forward.get_total_flops(), rel=0.02)
        step_flops = Meter(model.training_flops(), num_clips=2, world_size=1, device=CPU)._flops_per_step
        assert step_flops == pytest.approx(forward.get_total_flops() + backward.get_total_flops(), rel=0.02)
