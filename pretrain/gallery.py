"""Pictures of what a checkpoint fills in: original, masked, filled in. Drawn on the CPU from the saved weights."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from pretrain.batch import ClipBatch
from pretrain.checkpoint import Checkpoint, load_parameters
from pretrain.config import Config
from pretrain.data.augment import to_model_input
from pretrain.data.loader import ClipLoader
from pretrain.data.source import held_out
from pretrain.downstream.pictures import fill_in, write_pictures
from pretrain.objective import ClipKeys, Pretraining
from pretrain.objective.masked_frame import MaskedFrame

NUM_HELD_OUT = 4


@torch.no_grad()
def draw(found: Checkpoint, config: Config, batch: ClipBatch, folder: Path, name: str) -> list[Path]:
    """One PNG per clip of a batch, with the masks that training gave these clips. Empty without masked_frame.

    The caption names the step of the weights, the position and the sample.
    """
    if config.objective.masked_frame is None:
        return []
    model = Pretraining(
        config.model.size, config.objective, frames=config.data.frames, size=config.data.size, seed=config.run.seed
    ).eval()
    parameters, _ = load_parameters(found.folder)
    model.load_state_dict(parameters, strict=False)
    objective = model.objectives["masked_frame"]
    assert isinstance(objective, MaskedFrame)
    plan = objective.plan(ClipKeys(config.run.seed, batch.epoch_B, batch.sample_B, batch.draw_B))
    frames_BCTHW = to_model_input(batch, config.data.size)
    pictures = fill_in(model.encoder, objective.decoder, frames_BCTHW, plan["visible_BV"], plan["masked_BM"])
    captions = [
        f"weights of step {found.facts.step}, position {position}, sample {sample}"
        for position, sample in zip(batch.position_B.numpy(), batch.sample_B.numpy(), strict=True)
    ]
    return write_pictures(pictures, folder, name=name, captions=captions)


def draw_held_out(found: Checkpoint, config: Config, folder: Path) -> list[Path]:
    """Pictures of a few held-out clips (of the training split where nothing is held out)."""
    found_out = held_out(config.data)
    settings = (found_out or config.data).model_copy(update={"workers": 0, "clips_per_video": 1})
    with ClipLoader(settings, seed=config.run.seed, global_batch=NUM_HELD_OUT, num_clips=NUM_HELD_OUT) as loader:
        [batch] = itertools.islice(loader, 1)
    return draw(found, config, batch, folder, "training" if found_out is None else "held-out")
