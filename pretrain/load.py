"""Exported folder -> nn.Module. For whoever uses a pretrained network: needs torch and safetensors, nothing else.

    encoder = load_encoder("runs/demo/export")
    features_BND = encoder(patchify(frames_BCTHW), positions_BN)

Folders of published VideoMAE checkpoints open too, as long as they keep the encoder's final norm
(`use_mean_pooling: false`) and have tubelets of 2 x 16 x 16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]  # os.PathLike of unknown
from torch import Tensor, nn

from pretrain import names
from pretrain.model.decoder import Decoder
from pretrain.model.embed import patchify
from pretrain.model.sizes import CHANNELS, PATCH, TUBELET, Grid, Size
from pretrain.model.vit import NORM_EPS, Encoder
from shards.errors import UserError

CONFIG_FILE = "config.json"
PROVENANCE_FILE = "tubelet.json"
"""Marks a folder as our export; says where the weights come from and at which stride the frames were taken."""
DEFAULT_STRIDE = 4
"""Where the folder does not say: VideoMAE's."""


@dataclass(frozen=True)
class Geometry:
    """Everything that fixes the shapes of a network and of its input."""

    size: Size
    frames: int
    """T: frames of a clip."""
    pixels: int
    """H and W of a clip."""
    stride: int
    """Every n-th frame is taken."""

    @property
    def grid(self) -> Grid:
        """The tubelet grid."""
        return Grid.of(self.frames, self.pixels)


@dataclass(frozen=True)
class Export:
    """An opened export: modules on the CPU, fp32, in eval mode."""

    path: Path
    geometry: Geometry
    encoder: Encoder
    decoder: Decoder | None
    """None where the folder has no decoder."""
    provenance: Mapping[str, Any]
    """Content of tubelet.json; empty for folders made by others."""


def load_encoder(path: str | Path) -> Encoder:
    """The pretrained encoder: fp32, CPU, eval mode. `forward(patches_BVP, visible_BV int64) -> latent_BVD`.

    Raises:
        UserError: the folder cannot be read or is no VideoMAE of this geometry.
    """
    return load_export(path).encoder


def load_export(path: str | Path) -> Export:
    """Encoder, decoder and geometry of an exported folder. Raises `UserError` as `load_encoder` does."""
    folder = Path(path)
    geometry, provenance = read_geometry(folder)
    state = load_state(folder)
    encoder = Encoder(geometry.size, geometry.grid.num_tokens)
    _fill(encoder, state, names.ENCODER, folder)
    decoder = None
    if names.has_decoder(state):
        decoder = Decoder(geometry.size, geometry.grid.num_tokens)
        _fill(decoder, state, names.DECODER, folder)
        decoder.eval()
    encoder.eval()
    return Export(folder, geometry, encoder, decoder, provenance)


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The parameters under our names, fp32: what `train.init_from` needs. Raises `UserError`."""
    folder = Path(path)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors; it must be a folder written by `tubelet export`: export one")
    state: dict[str, Tensor] = {}
    try:
        for file in files:
            state.update(load_file(file))
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights in {folder} cannot be read ({error}); the file is damaged: export again") from error
    try:
        ours = names.from_transformers({name: value for name, value in state.items() if not _is_head(name)})
    except KeyError as error:
        raise UserError(
            f"{folder} holds a parameter {error} that is none of VideoMAE's: give another folder"
        ) from error
    return {name: value.to(torch.float32) for name, value in ours.items()}


def read_geometry(folder: Path) -> tuple[Geometry, dict[str, Any]]:
    """Shapes from config.json and the content of tubelet.json, without reading weights. Raises `UserError`."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; EXPORT must be a folder that `tubelet export` wrote: give that")
    architecture = _read_json(folder / CONFIG_FILE, required=True)
    provenance = _read_json(folder / PROVENANCE_FILE, required=False)
    required: dict[str, Any] = {
        "model_type": "videomae",
        "patch_size": PATCH,
        "tubelet_size": TUBELET,
        "num_channels": CHANNELS,
        "hidden_act": "gelu",
        "qv_bias": True,
        "layer_norm_eps": NORM_EPS,
        "use_mean_pooling": False,
    }
    defaults: dict[str, Any] = {"model_type": None, "use_mean_pooling": True}
    for key, value in required.items():
        found = architecture.get(key, defaults.get(key, value))
        if found != value:
            raise UserError(f"{folder / CONFIG_FILE}: {key} is {found!r}; it must be {value!r}: give another export")
    try:
        size = Size(
            width=architecture["hidden_size"],
            depth=architecture["num_hidden_layers"],
            heads=architecture["num_attention_heads"],
            mlp_width=architecture["intermediate_size"],
            decoder_width=architecture.get("decoder_hidden_size", 384),
            decoder_depth=architecture.get("decoder_num_hidden_layers", 4),
            decoder_heads=architecture.get("decoder_num_attention_heads", 6),
        )
        geometry = Geometry(
            size=size,
            frames=int(architecture["num_frames"]),
            pixels=int(architecture["image_size"]),
            stride=int(provenance.get("stride", DEFAULT_STRIDE)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_FILE} lacks or garbles {error}: export again") from error
    return geometry, provenance


def random_encoder(geometry: Geometry, *, seed: int) -> Encoder:
    """The same network as it is before training: what an export is compared with. torch's global state is kept."""
    with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]  # torch: untyped
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]  # torch: untyped
        return Encoder(geometry.size, geometry.grid.num_tokens).eval()


def encode(encoder: nn.Module, frames_BCTHW: Tensor) -> Tensor:
    """All tubelets of whole clips through the encoder: float32 model input -> features_BND."""
    patches_BNP = patchify(frames_BCTHW)
    positions_BN = torch.arange(patches_BNP.shape[1], device=patches_BNP.device).expand(len(patches_BNP), -1)
    return encoder(patches_BNP, positions_BN)


def _fill(module: nn.Module, state: Mapping[str, Tensor], prefix: str, folder: Path) -> None:
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(own, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"weights in {folder} do not fit its {CONFIG_FILE} ({reason}): export again") from error


def _is_head(name: str) -> bool:
    """Classifiers of fine-tuned folders are no part of the encoder."""
    return name.startswith(("classifier.", "fc_norm."))


def _read_json(file: Path, *, required: bool) -> dict[str, Any]:
    try:
        content: Any = json.loads(file.read_text())
    except FileNotFoundError as error:
        if not required:
            return {}
        raise UserError(f"{file} is not there; give a folder written by `tubelet export`") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); export again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object; export again")
    return content  # pyright: ignore[reportUnknownVariableType]  # parsed JSON
