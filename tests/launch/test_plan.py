"""Whole plans: what is recommended fits and runs, what cannot work is refused with a remedy, the page is readable."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.plan import make_plan
from launch.plan_gpus import GB, GPUS
from launch.plan_page import page
from launch.plan_simulate import young_daly_s
from pretrain.config import load_config
from pretrain.meter import PEAK_FLOPS
from shards.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "configs" / "vit_base_k400.yaml"
SIZES = ((1, 1), (1, 8), (8, 8), (64, 8))


@pytest.fixture(scope="module")
def base() -> Any:
    return make_plan(BASE, nodes=8, gpus=8)


def test_cards_have_the_peaks_of_the_meter() -> None:
    for gpu in GPUS.values():
        assert (gpu.peak_flops["bf16"], gpu.peak_flops["fp32"]) == PEAK_FLOPS[gpu.name]


@pytest.mark.parametrize("size", ["nano", "base", "giant"])
@pytest.mark.parametrize(("nodes", "gpus"), SIZES)
@pytest.mark.parametrize("gpu", ["h100", "l40s"])
def test_what_is_recommended_fits_and_is_a_config(size: str, nodes: int, gpus: int, gpu: str) -> None:
    found = make_plan(BASE, [f"model.size={size}", "data.run_length=16"], nodes=nodes, gpus=gpus, gpu=gpu)
    config = load_config(BASE, [f"model.size={size}", "data.run_length=16", *found.changes])
    choice = found.choice
    assert choice.option.memory.total <= GPUS[gpu].memory_bytes
    assert (config.zero.stage, config.zero.offload) == (choice.option.stage, choice.option.offload)
    assert config.train.activation_checkpointing == choice.option.recompute
    assert config.train.micro_batch == choice.micro_batch <= choice.option.max_micro_batch
    clips = choice.micro_batch * choice.num_micro_steps * nodes * gpus
    assert clips - choice.num_fillers == config.train.global_batch
    assert choice.num_fillers < choice.micro_batch * nodes * gpus, "no micro step is all filler"


def test_a_larger_micro_batch_than_the_largest_does_not_fit() -> None:
    """The search for the largest found the edge, at every stage."""
    roomy = make_plan(BASE, ["model.size=large"], nodes=1, gpus=1)
    for option in roomy.options:
        edge = option.memory.total
        per_clip = option.memory.activations / option.max_micro_batch + option.memory.batch / option.max_micro_batch
        if option.max_micro_batch < 2048:
            assert edge <= 80 * GB < edge + 1.5 * per_clip


def test_a_run_that_already_says_so_is_left_alone(base: Any) -> None:
    again = make_plan(BASE, list(base.changes), nodes=8, gpus=8)
    assert again.changes == ()
    assert again.choice == base.choice


def test_more_failures_or_slower_saves_move_the_interval(base: Any) -> None:
    checkpoints = base.checkpoints
    wanted_s = young_daly_s(checkpoints.saving.stall_s, checkpoints.mtbf_s)
    assert checkpoints.saving.interval_s == pytest.approx(wanted_s, rel=0.1)
    waiting = make_plan(BASE, ["checkpoint.background=false"], nodes=8, gpus=8).checkpoints
    assert waiting.saving.stall_s == pytest.approx(5 * checkpoints.saving.stall_s)
    assert waiting.every_steps > checkpoints.every_steps
    assert make_plan(BASE, nodes=64, gpus=8).checkpoints.mtbf_s == pytest.approx(checkpoints.mtbf_s / 8)


def test_kept_for_ever_stays_a_multiple() -> None:
    changes = ["checkpoint.every_steps=1000", "checkpoint.keep_every_steps=10000"]
    found = make_plan(BASE, changes, nodes=8, gpus=8)
    load_config(BASE, [*changes, *found.changes])


def test_time_and_cost_are_products(base: Any) -> None:
    time = base.time
    by_peak_s = 2048 * base.network.training_flops / (64 * 989e12 * 0.3)
    assert time.compute_s == pytest.approx(by_peak_s)
    assert time.hours == pytest.approx(187_500 * (time.compute_s + time.send_s) / 3600)
    assert time.wall_hours == pytest.approx(time.hours / base.ettr)
    assert time.wall_hours >= time.hours
    assert time.dollars == pytest.approx(time.wall_hours * 64 * 3)
    assert time.kwh == pytest.approx(time.wall_hours * 64 * 0.7)
    assert make_plan(BASE, nodes=8, gpus=8, mfu=0.6).time.compute_s == pytest.approx(by_peak_s / 2)


def test_sizes_of_samples_come_from_the_manifest(tiny_config: Callable[..., Path], packed: Path) -> None:
    found = make_plan(tiny_config(), nodes=1, gpus=1)
    manifest = json.loads((packed / "manifest.json").read_text())["splits"]["train"]
    num_bytes = sum(shard["num_bytes"] for shard in manifest["shards"])
    assert found.data.num_samples == manifest["num_samples"]
    assert found.data.sample_bytes == pytest.approx(num_bytes / manifest["num_samples"])
    assert found.data.max_pixels == manifest["max_pixels"]
    rate = found.time.clips_per_s
    assert found.storage.bytes_per_s == pytest.approx(rate * found.data.sample_bytes)
    assert found.storage.requests_per_s == pytest.approx(rate)
    assert "assumed: 1.0 MB" not in "\n".join(page(found))


def test_says_that_sizes_are_assumed(base: Any) -> None:
    assert base.data.num_samples is None
    assert "assumed: 1.0 MB per video" in "\n".join(page(base))
    no_split = make_plan(BASE, [f"data.shards={ROOT / 'configs'}"], nodes=8, gpus=8)
    assert "manifest.json" in no_split.data.why_assumed


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ((), {"nodes": 512, "gpus": 8}, ("train.global_batch is 2048", "2048 GPUs or fewer")),
        (("model.size=giant", "data.frames=1024", "data.size=896"), {}, ("even a micro batch of 1", "more memory")),
        ((), {"gpu": "abacus"}, ("--gpu is abacus", "h100, h200, a100, l40s")),
        ((), {"mfu": 30.0}, ("--mfu is 30", "0.3")),
        (
            ("model.size=nano", "train.global_batch=65536", "data.size=32"),
            {"nodes": 64},
            ("data.run_length is 1", "data.run_length="),
        ),
        (("zero.stage=4",), {}, ("zero.stage",)),
    ],
    ids=["ranks", "memory", "card", "mfu", "requests", "config"],
)
def test_refuses_what_cannot_work(changes: tuple[str, ...], where: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refused:
        make_plan(BASE, changes, **{"nodes": 8, "gpus": 8, **where})
    for word in words:
        assert word in str(refused.value)


def test_refuses_more_bytes_than_a_network_card_brings(tmp_path: Path, packed: Path) -> None:
    """Real sizes refuse; a cache allows."""
    from shards.layout import Manifest

    manifest = Manifest.from_json((packed / "manifest.json").read_text(), "here")
    split = manifest.splits["train"]
    shards = tuple(replace(shard, num_bytes=shard.num_samples * 9_000_000) for shard in split.shards)
    splits = {"train": replace(split, shards=shards)}
    large = Manifest.make(preset=manifest.preset, labels=manifest.labels, splits=splits)
    (tmp_path / "manifest.json").write_text(large.to_json())
    changes = [f"data.shards={tmp_path}"]
    with pytest.raises(UserError, match=r"each node would read .* GB/s; .* set data\.cache\.dir"):
        make_plan(BASE, changes, nodes=8, gpus=8)
    cached = make_plan(BASE, [*changes, "data.cache.dir=/x", "data.cache.max_bytes=1"], nodes=8, gpus=8)
    assert cached.data.num_samples == split.num_samples


@pytest.mark.parametrize(
    ("nodes", "gpus", "size", "gpu"), [(1, 1, "nano", "h100"), (64, 8, "giant", "l40s"), (8, 8, "base", "h200")]
)
def test_page_fits_80_columns_and_ends_with_the_next_command(nodes: int, gpus: int, size: str, gpu: str) -> None:
    changes = [f"model.size={size}", "objective.frame_order.mask_ratio=0.9", "data.run_length=16", "data.workers=0"]
    found = make_plan(BASE, changes, nodes=nodes, gpus=gpus, gpu=gpu)
    lines = page(replace(found, path=Path("configs/vit_base_k400.yaml")), layers=True)
    assert max(len(line) for line in lines[:-1]) <= 80
    command = "doctor" if nodes == 1 else "submit"
    assert lines[-1].startswith(f"next: tubelet {command} configs/vit_base_k400.yaml model.size={size}")
    if command == "submit":
        workers = load_config(BASE, [*changes, *found.changes]).data.workers
        assert workers > 0
        resources = f"--nodes {nodes} --gpus {gpus} --sbatch=--cpus-per-task={workers + 1}"
        assert lines[-1].endswith(resources)
    text = "\n".join(lines)
    for heading in ("parameters", "memory per GPU", "recommended", "network", "data:", "time:", "checkpoints:"):
        assert f"\n{heading}" in text
    assert "  16,384" in text
    assert text.count("assumed") >= 4


def test_layers_add_up(base: Any) -> None:
    rows = base.to_json()["layers"]
    assert sum(row["parameters"] for row in rows) == base.network.num_parameters
    assert sum(row["training_flops"] for row in rows) == base.network.training_flops
    [total] = [line for line in page(base, layers=True) if line.startswith("all ")]
    assert total.split()[1] == f"{base.network.num_parameters:,}"


def test_command_prints_json_and_complains_in_words() -> None:
    found = CliRunner().invoke(app, ["plan", str(BASE), "--nodes", "2", "--gpus", "8", "--json"])
    assert found.exit_code == 0
    plan = json.loads(found.stdout)
    assert plan["parameters"]["all"] == 94_210_944
    assert {(row["stage"], row["offload"]) for row in plan["memory"]} == {
        (stage, offload) for stage in range(4) for offload in (False, True)
    } - {(0, True)}
    refused = CliRunner().invoke(app, ["plan", str(BASE), "--nodes", "2", "--gpus", "8", "--gpu", "x"])
    assert isinstance(refused.exception, UserError)


def test_works_where_torch_is_not_installed() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'deepspeed', 'webdataset', 'wandb', 'transformers', 'av'): sys.modules[name] = None\n"
        "from launch.cli import app\n"
        f"app(['plan', {str(BASE)!r}, '--nodes', '8', '--gpus', '8', '--layers'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("next: tubelet submit")
