"""The plan's arithmetic against what real ranks and a real autograd hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.plan_traffic import traffic_of
from pretrain.config import Config, load_config
from pretrain.memory import arithmetic, checkpoint_bytes, fullest_states, memory_of_run, states_of
from pretrain.model import vit
from pretrain.network import Mode, Network, network_of
from pretrain.objective import ClipKeys, Pretraining

ROOT = Path(__file__).resolve().parents[2]
WORLDS = (1, 2, 4)
LAYOUTS = [(world, stage, precision) for world in WORLDS for stage in range(4) for precision in ("fp32", "bf16")]


def config_of(*changes: str, frame_order: bool = True) -> Config:
    order = ["objective.frame_order.mask_ratio=0.5"] if frame_order else []
    needed = ["run.dir=x", "data.shards=x", "train.steps=9", "train.global_batch=8", "optim.lr=1e-3"]
    return load_config(None, [*needed, "model.size=nano", "objective.masked_frame.mask_ratio=0.5", *order, *changes])


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """(world, rank) -> "PRECISION-STAGE" -> bytes by category, measured."""
    out = tmp_path_factory.mktemp("ranks")
    program = [sys.executable, str(Path(__file__).with_name("zero_states.py")), str(out), ",".join(map(str, WORLDS))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(program, cwd=ROOT, env=environment, check=True, timeout=300)
    logs = "\n".join(log.read_text()[-2000:] for log in sorted(out.glob("*.log")))
    assert len(list(out.glob("*.json"))) == sum(WORLDS), logs
    return {
        (world, rank): json.loads((out / f"{world}-{rank}.json").read_text())
        for world in WORLDS
        for rank in range(world)
    }


@pytest.fixture(scope="module")
def jobs_network() -> Network:
    """The network of tests/dist/jobs.py."""
    return network_of(config_of("data.frames=8", "data.size=32"))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stage", "precision"), LAYOUTS)
def test_states_of_every_rank_are_within_5_percent(
    held: dict[tuple[int, int], dict[str, Any]], jobs_network: Network, world: int, stage: int, precision: str
) -> None:
    for rank in range(world):
        planned = states_of(
            jobs_network.weights, stage=stage, mode=arithmetic(precision, stage), rank=rank, world_size=world
        )
        found = held[world, rank][f"{precision}-{stage}"]
        backward, update = found["backward"], found["update"]
        assert planned.parameters == pytest.approx(backward["parameters"], rel=0.05)
        assert planned.optimizer == pytest.approx(backward["optimizer"], rel=0.05)
        assert planned.gradients == pytest.approx(backward["gradients"], rel=0.05)
        assert planned.gradients_at_update == pytest.approx(update["gradients"], rel=0.05)
        assert backward["buckets"] <= planned.buckets
        whole = planned.parameters + planned.optimizer + planned.gradients
        # Nothing large is left out: what is not a state is a bucket not yet freed, or a batch.
        assert backward["buckets"] + found["unexplained"] <= planned.buckets + 0.05 * whole


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stage", "precision"), LAYOUTS)
def test_collectives_move_what_the_plan_says(
    held: dict[tuple[int, int], dict[str, Any]], jobs_network: Network, world: int, stage: int, precision: str
) -> None:
    sent = held[world, 0][f"{precision}-{stage}"]["sent"]
    planned = traffic_of(jobs_network, stage=stage, mode=arithmetic(precision, stage), num_micro_steps=2)
    small = 0.01 * planned.all_reduce + 4096  # norms and flags
    assert sent.get("all_reduce", 0) + sent.get("reduce", 0) == pytest.approx(planned.all_reduce, rel=0.05, abs=small)
    assert sent.get("reduce_scatter_tensor", 0) == pytest.approx(planned.reduce_scatter, rel=0.05)
    if world > 1:  # one rank alone has nothing to gather
        assert sent.get("all_gather_into_tensor", 0) == pytest.approx(planned.all_gather, rel=0.05)


def kept_by_autograd(config: Config, mode: Mode, batch: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Unique storages that a forward pass keeps for the backward pass, without the parameters."""
    model = Pretraining(
        config.model.size,
        config.objective,
        frames=config.data.frames,
        size=config.data.size,
        seed=0,
        activation_checkpointing=config.train.activation_checkpointing,
    )
    if mode == "bf16":
        model.bfloat16()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    original: Any = vit.checkpoint

    def checkpoint(block: Any, tokens: torch.Tensor, **options: Any) -> Any:
        keep(tokens)  # recomputation holds it in a closure, where autograd's hook does not see it
        return original(block, tokens, **options)

    monkeypatch.setattr(vit, "checkpoint", checkpoint)
    numbers = torch.arange(batch)
    clips = torch.randn(batch, 3, config.data.frames, config.data.size, config.data.size)
    plans = model.plan(ClipKeys(0, numbers, numbers, numbers))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        losses = model(clips, plans)
    assert all(loss.value_B.requires_grad for loss in losses.values())
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("frame_order", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_activations_are_within_15_percent(
    mode: Mode, recompute: bool, frame_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(
        "data.size=64", f"train.activation_checkpointing={str(recompute).lower()}", frame_order=frame_order
    )
    network = network_of(config)
    measured = kept_by_autograd(config, mode, 4, monkeypatch)
    casts = network.cast_bytes(mode)
    if recompute and mode == "autocast":  # blocks keep no weights; autocast's cache holds them until the forward ends
        blocks = [layer for layer in network.layers if layer.input_kept is not None]
        casts -= sum(2 * weight.numel for layer in blocks for weight in layer.weights if weight.is_decayed)
    assert 4 * network.kept_bytes(mode, recompute=recompute) + casts == pytest.approx(measured, rel=0.15)


def test_recomputed_block_is_what_a_block_keeps() -> None:
    """The largest one here is the decoder's: 128 tokens of width 64."""
    network = network_of(config_of("data.size=64", "objective.masked_frame.mask_ratio=0.9"))
    block = vit.Block(64, 2, 256)
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mixed = block(torch.randn(4, 128, 64, requires_grad=True))
    assert mixed.requires_grad
    measured = sum(storage.nbytes() for at, storage in kept.items() if at not in own)
    assert 4 * network.largest_block_bytes("fp32") == pytest.approx(measured, rel=0.05)


def test_whole_model_states_follow_the_paper_where_it_applies() -> None:
    """Stage 3 in bf16 for many ranks: 16 W / N (arXiv 1910.02054), 2 W of gathered copies and DeepSpeed's fp32 sums."""
    weights = network_of(config_of("model.size=large", "data.size=224")).weights
    numel = sum(weight.numel for weight in weights)
    states = states_of(weights, stage=3, mode="bf16", rank=0, world_size=64)
    assert states.optimizer == pytest.approx(12 * numel / 64, rel=0.01)
    assert states.gradients == pytest.approx(4 * numel / 64, rel=0.01)
    assert states.parameters == pytest.approx(2 * numel / 64 + 2 * numel, rel=0.01)


@pytest.mark.parametrize(("precision", "on_card", "on_host"), [("bf16", 2 + 2, 6 + 2 + 1), ("fp32", 4, 6 + 2 + 2)])
def test_offload_moves_states_to_the_host(precision: str, on_card: int, on_host: int) -> None:
    """Bytes per parameter of two ranks at stage 2, as looked up once with offload on CPU ranks: masters and moments,
    gradients for the optimizer, parameters on their way back.
    """
    config = config_of(f"train.precision={precision}")
    network = network_of(config)
    states = fullest_states(network, config, stage=2, offload=True, world_size=2, accumulates=True)
    assert states.optimizer == 0
    assert states.parameters + (states.gradients if precision == "bf16" else 0) == pytest.approx(
        on_card * network.num_parameters, rel=0.05
    )
    assert states.host == pytest.approx(on_host * network.num_parameters, rel=0.05)


def test_a_checkpoint_is_masters_and_moments() -> None:
    config = config_of()
    network, sgd = network_of(config), config_of("optim.name=sgd")
    numel = network.num_parameters
    assert checkpoint_bytes(network, config.optim) == 12 * numel
    assert checkpoint_bytes(network, sgd.optim) == 8 * numel
    assert checkpoint_bytes(network, config_of("optim.name=sgd", "optim.momentum=0").optim) == 4 * numel


def test_saves_keep_a_copy_of_a_rank_s_part_of_the_checkpoint() -> None:
    config = config_of()
    network = network_of(config)
    memory = memory_of_run(network, config, 2, 64 * 64)
    assert memory.host == memory.copies == 6 * network.num_parameters
    offloaded = memory_of_run(network, config_of("zero.stage=2", "zero.offload=true"), 2, 64 * 64)
    assert offloaded.host == offloaded.states.host + memory.copies > 12 * network.num_parameters
