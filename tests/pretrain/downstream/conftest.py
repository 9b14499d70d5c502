"""One small export for all tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pretrain import names
from pretrain.export import model_settings
from pretrain.load import Geometry
from pretrain.model.sizes import SIZES
from pretrain.objective import Pretraining
from pretrain.sections import MaskedFrameConfig, ObjectiveConfig


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of an export of an untrained nano network, written without the proof (which loads transformers)."""
    geometry = Geometry(SIZES["nano"], frames=8, pixels=64, stride=4)
    objective = ObjectiveConfig(masked_frame=MaskedFrameConfig(mask_ratio=0.75))
    model = Pretraining("nano", objective, frames=8, size=64, seed=0)
    folder = tmp_path_factory.mktemp("downstream") / "export"
    folder.mkdir()
    save_file(names.to_transformers(model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model_settings(geometry, "VideoMAEForPreTraining")))
    (folder / "tubelet.json").write_text(
        json.dumps({"format": "tubelet export", "stride": geometry.stride, "mask_ratio": 0.75})
    )
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
