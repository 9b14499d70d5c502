"""Checkpoint -> a folder that transformers opens, proved before it gets its name.

    checkpoint -> our parameters -> their names -> files in a temporary folder -> transformers opens it and must
    give our features and our loss from the same uint8 frames -> card -> rename

Nothing of the run leaves in the folder but numbers: no paths, no URLs, no host names (C14).
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]  # os.PathLike of unknown
from torch import Tensor

from pretrain import names
from pretrain.batch import IMAGENET_MEAN, IMAGENET_STD
from pretrain.card import write_card
from pretrain.checkpoint import Checkpoint, load_parameters, newest
from pretrain.load import CONFIG_FILE, PROVENANCE_FILE, Geometry
from pretrain.model.sizes import CHANNELS, PATCH, SIZES, TUBELET
from pretrain.model.vit import NORM_EPS
from pretrain.names import BiasNames
from pretrain.proof import Proof, prove
from shards.errors import UserError

FORMAT = "tubelet export"
FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
PROCESSOR_FILE = "preprocessor_config.json"
CARD_FILE = "README.md"

PILLOW_BILINEAR = 2
"""The number that processor files use for it."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how close transformers comes to it."""

    folder: Path
    architecture: str
    """Class that the folder was written for."""
    step: int | None
    """Optimizer step of the checkpoint."""
    num_parameters: int
    proof: Proof
    notes: tuple[str, ...]
    """What a reader must know."""

    def to_json(self) -> dict[str, Any]:
        """Plain types only."""
        return {
            "folder": str(self.folder),
            "architecture": self.architecture,
            "step": self.step,
            "num_parameters": self.num_parameters,
            "differences": self.proof.differences,
            "transformers": self.proof.transformers_version,
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        return [
            f"{self.folder}: {self.architecture}, {self.num_parameters:,} parameters, step {self.step}",
            *(f"transformers {self.proof.transformers_version} agrees: {line}" for line in self.proof.lines()),
            *(f"note: {note}" for note in self.notes),
        ]


def export(run_or_checkpoint: str | Path, dst: str | Path, *, biases: BiasNames = "v5") -> ExportReport:
    """Write the newest checkpoint of a run, or one checkpoint, as a transformers folder.

    Args:
        run_or_checkpoint: Run folder or checkpoint folder.
        dst: New or empty folder, or an earlier export, which is replaced in one step.
        biases: Spelling of the q and v biases (pretrain/names.py): "v5" for transformers 5, "v4" for 4.

    Raises:
        UserError: no whole checkpoint, `dst` holds something else, or transformers does not agree.
    """
    source = Path(run_or_checkpoint)
    if not source.is_dir():
        raise UserError(f"{source} is no folder; it must be a run or one of its checkpoints: give runs/NAME")
    check_destination(Path(dst))
    folder = source if (source / "manifest.json").is_file() else None
    if folder is None and (found := newest(source)) is not None:
        folder = found.folder
    state, config = load_parameters(folder or source)
    step = Checkpoint(folder).facts.step if folder else None
    return export_state(state, config, Path(dst), step=step, biases=biases)


def export_state(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dst: Path,
    *,
    step: int | None = None,
    biases: BiasNames = "v5",
) -> ExportReport:
    """As `export`, from parameters in memory: the state dict of `Pretraining` and the run's config as nested dicts."""
    check_destination(dst)
    geometry = geometry_of(config)
    has_decoder = names.has_decoder(state)
    architecture = "VideoMAEForPreTraining" if has_decoder else "VideoMAEModel"
    theirs = names.to_transformers(state, biases=biases)
    notes = () if has_decoder else ("the run has no masked_frame objective: the folder holds the encoder only",)
    place = dst.resolve()  # a link is followed, so that the last rename stays on one file system
    staging = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        save_file(theirs, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        settings = model_settings(geometry, architecture)
        _write_json(staging / CONFIG_FILE, settings)
        _write_json(staging / PROCESSOR_FILE, processor_settings(geometry))
        _write_json(staging / PROVENANCE_FILE, _provenance(geometry, config, step))
        proof = prove(staging, state, config, geometry)
        card = write_card(
            title=f"VideoMAE {_section(config, 'model').get('size')}, pretrained with tubelet",
            config=config,
            architecture=settings,
            step=step,
            differences=proof.differences,
            bias_names=biases,
            has_decoder=has_decoder,
        )
        (staging / CARD_FILE).write_text(card)
        _put_in_place(staging, place)
    except OSError as error:
        raise UserError(
            f"export to {dst} failed ({error.strerror}: {error.filename}); give a writable place"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ExportReport(dst, architecture, step, sum(value.numel() for value in theirs.values()), proof, notes)


def check_destination(dst: Path) -> None:
    """Refuse to write over anything but an earlier export. Raises `UserError`."""
    place = dst.resolve()
    if not place.name or place == Path.cwd():
        raise UserError(
            f"export folder is {dst}; it must not be the root or the folder you are in, as it is put in place whole: "
            "give another name, like runs/NAME/export"
        )
    if not dst.exists():
        return
    if not dst.is_dir():
        raise UserError(f"export folder is {dst}; it must not be a file: give another name")
    if any(dst.iterdir()) and not _is_export(dst):
        raise UserError(
            f"export folder {dst} holds files that are no earlier export; "
            "it must be new, empty, or an earlier export: give another name"
        )


def geometry_of(config: Mapping[str, Any]) -> Geometry:
    """Shapes that the run's config fixes. Raises `UserError` where it does not."""
    model, data = _section(config, "model"), _section(config, "data")
    try:
        return Geometry(SIZES[model["size"]], int(data["frames"]), int(data["size"]), int(data["stride"]))
    except KeyError as error:
        raise UserError(
            f"the checkpoint's config lacks or does not know {error}: use the tubelet that wrote it"
        ) from error


def model_settings(geometry: Geometry, architecture: str) -> dict[str, Any]:
    """config.json: every value that shapes the network or its loss written out, whatever the library's defaults."""
    size = geometry.size
    return {
        "architectures": [architecture],
        "model_type": "videomae",
        "dtype": "float32",
        "image_size": geometry.pixels,
        "patch_size": PATCH,
        "num_channels": CHANNELS,
        "num_frames": geometry.frames,
        "tubelet_size": TUBELET,
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": size.mlp_width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": NORM_EPS,
        "qkv_bias": True,
        "qv_bias": True,
        "use_mean_pooling": False,
        "decoder_hidden_size": size.decoder_width,
        "decoder_num_hidden_layers": size.decoder_depth,
        "decoder_num_attention_heads": size.decoder_heads,
        "decoder_intermediate_size": size.decoder_mlp_width,
        "norm_pix_loss": True,
    }


def processor_settings(geometry: Geometry) -> dict[str, Any]:
    """preprocessor_config.json. Mean and deviation are ImageNet's: the processor's defaults are 0.5, while the loss
    of `VideoMAEForPreTraining` always un-normalises with ImageNet's.
    """
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "video_processor_type": "VideoMAEVideoProcessor",
        "do_resize": True,
        "size": {"shortest_edge": geometry.pixels},
        "resample": PILLOW_BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": geometry.pixels, "width": geometry.pixels},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def _provenance(geometry: Geometry, config: Mapping[str, Any], step: int | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "size": _section(config, "model").get("size"),
        "stride": geometry.stride,
        "mask_ratio": _section(_section(config, "objective"), "masked_frame").get("mask_ratio"),
        "step": step,
    }


def _is_export(folder: Path) -> bool:
    try:
        return json.loads((folder / PROVENANCE_FILE).read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def _put_in_place(staging: Path, dst: Path) -> None:
    """Everything on disk, then one rename. An earlier export is exchanged in one system call where there is one."""
    for file in [*staging.iterdir(), staging]:
        _fsync(file)
    if not (dst.is_dir() and any(dst.iterdir())):
        staging.rename(dst)
    elif not _exchange(staging, dst):
        old = dst.with_name(f".{dst.name}.{os.getpid()}.old")
        dst.rename(old)
        staging.rename(dst)
        shutil.rmtree(old)
    _fsync(dst.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Linux's renameat2(RENAME_EXCHANGE): both names change owner at one moment. False where it is not offered."""
    at_current_folder, rename_exchange = -100, 2
    function: Any = getattr(ctypes.CDLL(None), "renameat2", None)
    if function is None:
        return False
    names_given = os.fsencode(first), os.fsencode(second)
    return function(at_current_folder, names_given[0], at_current_folder, names_given[1], rename_exchange) == 0


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section: Any = config.get(name)
    return cast(Mapping[str, Any], section) if isinstance(section, Mapping) else {}
