"""What the ranks of a RankPool can be asked to do. Imported by rank.py inside an open process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.agree import Agreement
from pretrain.batch import ClipBatch
from pretrain.checkpoint import Checkpoint, Facts, publish, read_parts, stage, staging_folder, write_part
from pretrain.engine import Engine
from pretrain.ledger import LineageHead
from pretrain.objective import Pretraining
from pretrain.optim import build_optimizer
from pretrain.sections import FrameOrderConfig, MaskedFrameConfig, ObjectiveConfig, OptimConfig, TrainConfig, ZeroConfig
from pretrain.world import world_from_environment
from shards.order import rank_clips

FRAMES, SIZE, SEED = 8, 32, 5


def make_engine(
    *,
    stage: int,
    offload: bool,
    precision: str,
    optimizer: str,
    global_batch: int,
    micro_batch: int,
    seed: int,
    clip_norm: float = 0.5,
    activation_checkpointing: bool = False,
) -> Engine:
    objectives = ObjectiveConfig(
        masked_frame=MaskedFrameConfig(mask_ratio=0.5),
        frame_order=FrameOrderConfig(weight=0.2, mask_ratio=0.5, min_motion=0),
    )
    model = Pretraining(
        "nano", objectives, frames=FRAMES, size=SIZE, seed=seed, activation_checkpointing=activation_checkpointing
    )
    train = TrainConfig(
        steps=10, global_batch=global_batch, micro_batch=micro_batch, precision=precision, clip_norm=clip_norm
    )
    return Engine(
        model,
        build_optimizer(model, OptimConfig(name=optimizer, lr=1e-3)),
        train=train,
        zero=ZeroConfig(stage=stage, offload=offload),
        world=world_from_environment(),
        device=torch.device("cpu"),
        size=SIZE,
        seed=SEED,
    )


def made_up_batches(step: int, engine: Engine, global_batch: int, micro_batch: int) -> list[ClipBatch]:
    """Batches whose pixels depend on the clip number alone, whatever rank and micro step take them."""
    world = world_from_environment()
    batches = []
    for micro_step in range(engine.num_micro_steps):
        clips = rank_clips(
            step, micro_step, global_batch=global_batch, micro_batch=micro_batch, rank=world.rank, world_size=world.size
        )
        planes = [
            np.random.default_rng([7, int(clip)]).integers(0, 256, (FRAMES, SIZE * SIZE * 3 // 2), dtype=np.uint8)
            if clip >= 0
            else np.zeros((FRAMES, SIZE * SIZE * 3 // 2), np.uint8)
            for clip in clips
        ]
        num = len(clips)
        number_B = torch.from_numpy(np.asarray(clips, dtype=np.int64))
        batches.append(
            ClipBatch(
                step=step,
                micro_step=micro_step,
                planes_BTN=torch.from_numpy(np.stack(planes)),
                height_B=torch.full((num,), SIZE, dtype=torch.int32),
                width_B=torch.full((num,), SIZE, dtype=torch.int32),
                crop_B4=torch.tensor([[0.0, 0.0, SIZE, SIZE]] * num),
                flip_B=torch.zeros(num, dtype=torch.bool),
                color_B=torch.zeros(num, dtype=torch.uint8),
                frame_numbers_BT=torch.zeros(num, FRAMES, dtype=torch.int32),
                position_B=number_B,
                epoch_B=torch.zeros(num, dtype=torch.int64),
                draw_B=torch.zeros(num, dtype=torch.int64),
                wanted_B=number_B,
                sample_B=number_B,
                checksum_B=number_B,
                weight_B=(number_B >= 0).float(),
            )
        )
    return batches


def train(
    *,
    steps: list[int],
    stage: int,
    global_batch: int = 8,
    micro_batch: int = 2,
    offload: bool = False,
    precision: str = "fp32",
    optimizer: str = "adamw",
    seed: int = 1,
    load: str | None = None,
    save: str | None = None,
    clip_norm: float = 0.5,
    activation_checkpointing: bool = False,
) -> dict[str, Any]:
    """Train `steps`, from a checkpoint folder or from `seed`; perhaps save; give losses and grad norms."""
    engine = make_engine(
        stage=stage,
        offload=offload,
        precision=precision,
        optimizer=optimizer,
        global_batch=global_batch,
        micro_batch=micro_batch,
        seed=seed,
        clip_norm=clip_norm,
        activation_checkpointing=activation_checkpointing,
    )
    if load is not None:
        checkpoint = Checkpoint(Path(load))
        assert not checkpoint.broken_files(checkpoint.files)
        engine.states.restore(checkpoint.read, checkpoint.facts.optimizer_steps)
    losses, norms = [], []
    for step in steps:
        report = engine.step(made_up_batches(step, engine, global_batch, micro_batch), lr=1e-3 * (step + 1))
        assert report.is_applied
        losses.append(engine.totals(report))
        norms.append(engine.grad_norm())
    if save is not None:
        save_checkpoint(engine, Path(save), steps[-1] + 1)
    return {"losses": losses, "norms": norms, "optimizer_steps": engine.states.optimizer_steps}


def not_finite(*, stage: int, precision: str) -> list[bool]:
    """Is the step applied: with sound weights, and once a weight is infinite on every rank."""
    engine = make_engine(
        stage=stage,
        offload=False,
        precision=precision,
        optimizer="adamw",
        global_batch=4,
        micro_batch=2,
        seed=1,
    )
    applied = [engine.step(made_up_batches(0, engine, 4, 2), lr=1e-3).is_applied]

    def infinite(name: str, state: str, offset: int, length: int) -> torch.Tensor:
        return torch.full((length,), float("inf") if state == "fp32" and name == "encoder.norm.weight" else 0.01)

    engine.states.restore(infinite, 1)
    return [*applied, engine.step(made_up_batches(1, engine, 4, 2), lr=1e-3).is_applied]


def gather_numbers() -> list[dict[str, float]]:
    """Each rank tells a number of its own, under names that differ in number and length, amid a pending round."""
    world, agreement = world_from_environment(), Agreement(60)
    pending = agreement.start_maxima([world.rank])
    mine = {"wait_s": 0.1 + world.rank, **{f"substituted/reason {index}": index for index in range(world.rank)}}
    everyone = agreement.gather(mine)
    assert pending.result() == [world.size - 1]
    return everyone


def save_checkpoint(engine: Engine, run_dir: Path, step: int) -> None:
    world, agreement = world_from_environment(), Agreement(300)
    staging = staging_folder(run_dir, step, 1)
    slices = [(s.name, s.state, s.offset, s.values_K.detach().reshape(-1)) for s in engine.states.slices()]
    write_part(staging, world.rank, slices)
    agreement.wait()
    if world.is_first:
        parts, _ = read_parts(staging, world.size)
        facts = Facts(
            step=step,
            optimizer_steps=engine.states.optimizer_steps,
            attempt=1,
            cursor={},
            config={},
            shapes=engine.states.shapes(),
            versions={},
            changes=[],
        )
        stage(staging, facts, parts, LineageHead("none", ""))
        publish(staging, step)
    agreement.wait()


def resave(*, stage: int, load: str, save: str, step: int, global_batch: int, micro_batch: int, precision: str) -> None:
    """Restore into this layout and save again at once: nothing may be lost on the way."""
    engine = make_engine(
        stage=stage,
        offload=False,
        precision=precision,
        optimizer="adamw",
        global_batch=global_batch,
        micro_batch=micro_batch,
        seed=99,
    )
    checkpoint = Checkpoint(Path(load))
    engine.states.restore(checkpoint.read, checkpoint.facts.optimizer_steps)
    save_checkpoint(engine, Path(save), step)
