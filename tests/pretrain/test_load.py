"""Opening an export without transformers, and what is said of folders that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pretrain import names
from pretrain.export import model_settings
from pretrain.load import (
    DEFAULT_STRIDE,
    Geometry,
    encode,
    load_encoder,
    load_export,
    load_state,
    random_encoder,
)
from pretrain.model.decoder import Decoder
from pretrain.model.sizes import SIZES
from pretrain.model.vit import Encoder
from shards.errors import UserError

GEOMETRY = Geometry(SIZES["nano"], frames=6, pixels=32, stride=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of an export, written without the proof."""
    torch.manual_seed(0)
    encoder = Encoder(GEOMETRY.size, GEOMETRY.grid.num_tokens)
    decoder = Decoder(GEOMETRY.size, GEOMETRY.grid.num_tokens)
    torch.nn.init.normal_(encoder.blocks[0].attention.q_bias)  # pyright: ignore
    state = {names.ENCODER + name: value for name, value in encoder.state_dict().items()}
    state |= {names.DECODER + name: value for name, value in decoder.state_dict().items()}
    path = tmp_path / "export"
    path.mkdir()
    save_file(names.to_transformers(state), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(model_settings(GEOMETRY, "VideoMAEForPreTraining")))
    (path / "tubelet.json").write_text(json.dumps({"format": "tubelet export", "stride": 3, "mask_ratio": 0.5}))
    return path


def edit(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


def test_load_opens_encoder_decoder_and_geometry(folder: Path) -> None:
    exported = load_export(folder)
    assert exported.geometry == GEOMETRY
    assert exported.decoder is not None
    assert not exported.encoder.training
    stored = load_file(folder / "model.safetensors")
    qkv = exported.encoder.blocks[0].attention.qkv.weight  # pyright: ignore
    assert torch.equal(qkv[128:256], stored["videomae.encoder.layer.0.attention.attention.key.weight"])  # pyright: ignore
    features_BND = encode(load_encoder(folder), torch.randn(2, 3, 6, 32, 32))
    assert features_BND.shape == (2, 12, 128)


def test_folder_that_transformers_saved_itself_opens_too(folder: Path, tmp_path: Path) -> None:
    theirs = transformers.VideoMAEForPreTraining.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "saved")
    for name, value in load_state(folder).items():
        assert torch.equal(load_state(tmp_path / "saved")[name], value), name
    assert load_export(tmp_path / "saved").geometry.stride == DEFAULT_STRIDE

    fresh = transformers.VideoMAEForPreTraining(theirs.config)
    fresh.save_pretrained(tmp_path / "fresh")  # with the old names of the biases
    assert "decoder.decoder_layers.0.attention.attention.q_bias" in load_file(tmp_path / "fresh" / "model.safetensors")
    assert load_state(tmp_path / "fresh").keys() == load_state(folder).keys()

    theirs.videomae.save_pretrained(tmp_path / "encoder")
    assert load_export(tmp_path / "encoder").decoder is None

    classifier = transformers.VideoMAEForVideoClassification.from_pretrained(folder, num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    assert torch.equal(load_encoder(tmp_path / "classifier").norm.weight, load_encoder(folder).norm.weight)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "vit"),
        ("patch_size", 14),
        ("tubelet_size", 1),
        ("layer_norm_eps", 1e-6),
        ("use_mean_pooling", True),
        ("qv_bias", False),
    ],
)
def test_architecture_that_is_not_ours_is_named(key: str, value: Any, folder: Path) -> None:
    edit(folder, **{key: value})
    with pytest.raises(UserError, match=rf"config\.json: {key} is {value!r}; it must be"):
        load_encoder(folder)


def test_what_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is not there; give a folder written by `tubelet export`"):
        load_encoder(tmp_path / "nowhere")
    edit(folder, hidden_size=192)
    with pytest.raises(UserError, match=r"do not fit its config\.json"):
        load_encoder(folder)
    edit(folder, hidden_size=128, num_frames="many")
    with pytest.raises(UserError, match="lacks or garbles"):
        load_encoder(folder)
    edit(folder, num_frames=6)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=r"cannot be read .* export again"):
        load_encoder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \*\.safetensors"):
        load_encoder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_encoder(folder)


def test_parameter_that_is_missing_or_strange_is_named(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, "videomae.head.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"head\.weight"):
        load_encoder(folder)
    del stored["videomae.encoder.layer.3.attention.attention.value.bias"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"blocks\.3\.attention\.v_bias"):
        load_encoder(folder)


def test_random_encoder_follows_its_seed_and_leaves_the_global_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second, third = (random_encoder(GEOMETRY, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.embed.weight, second.embed.weight)
    assert not torch.equal(first.embed.weight, third.embed.weight)


def test_load_needs_no_training_library(folder: Path) -> None:
    code = (
        "import sys\n"
        "blocked = ['deepspeed', 'wandb', 'webdataset', 'decord', 'av', 'transformers', 'fsspec', 'PIL', 'rich']\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"
        "from pretrain.load import load_encoder\n"
        f"print(type(load_encoder({str(folder)!r})).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "Encoder", done.stderr


def test_file_in_the_place_of_an_export_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").touch()
    with pytest.raises(UserError, match=r"video\.mp4 is not a folder; EXPORT must be a folder that"):
        load_export(tmp_path / "video.mp4")
