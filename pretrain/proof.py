"""Does transformers compute what was trained? The export is opened by it and compared with our own modules.

Both sides start from the same uint8 frames: ours as training sees them (`to_model_input`), theirs through the saved
processor. Compared are the pixel values, the features of all tokens, and the loss under the same masks, in fp32 on
the CPU. Owner of transformers.

Legend: B clips  C channels  T frames  H, W pixels  N tokens  D width  P values of a tubelet
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain import names
from pretrain.batch import COLOR_RGB24
from pretrain.data.decode import Frames
from pretrain.downstream.view import middle_crops
from pretrain.load import Geometry, encode
from pretrain.model.embed import patchify, take
from pretrain.model.vit import Encoder
from pretrain.objective import ClipKeys
from pretrain.objective.masked_frame import MaskedFrame
from pretrain.sections import MaskedFrameConfig
from shards.errors import UserError

TOLERANCE = 1e-5
"""Largest absolute difference, for values up to 1; relative to the largest value where that is more than 1."""
NUM_CLIPS = 2


@dataclass(frozen=True)
class Difference:
    """One comparison: the largest absolute difference, and the largest absolute value on our side."""

    absolute: float
    scale: float

    @property
    def is_close(self) -> bool:
        """Within TOLERANCE. NaN is not."""
        return self.absolute <= TOLERANCE * max(1.0, self.scale)


@dataclass(frozen=True)
class Proof:
    """Evidence that the folder is what was trained."""

    transformers_version: str
    compared: dict[str, Difference]

    @property
    def differences(self) -> dict[str, float]:
        """Largest absolute difference by what was compared."""
        return {what: difference.absolute for what, difference in self.compared.items()}

    def lines(self) -> list[str]:
        """For a terminal."""
        return [
            f"{what} within {difference.absolute:.1e} (largest value {difference.scale:.2g})"
            for what, difference in self.compared.items()
        ]


def prove(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], geometry: Geometry) -> Proof:
    """Open `folder` with transformers and compare it with our modules on random textured clips.

    Also opens it as `VideoMAEForVideoClassification`. `state` holds our parameters, `config` is the run's.

    Raises:
        UserError: a parameter did not arrive, or a comparison is off by more than TOLERANCE.
    """
    import transformers  # seconds to import: only where an export is made

    library: Any = transformers
    frames_BTHWC = _textured_frames(geometry)
    with torch.no_grad(), _quiet(library):
        processor = library.AutoImageProcessor.from_pretrained(str(folder))
        theirs_BTCHW = torch.cat([processor(list(clip), return_tensors="pt")["pixel_values"] for clip in frames_BTHWC])
        ours_BCTHW = middle_crops([_as_decoded(clip) for clip in frames_BTHWC], geometry.pixels)
        compared = {"pixel values": _difference(ours_BCTHW, theirs_BTCHW.transpose(1, 2))}

        encoder = Encoder(geometry.size, geometry.grid.num_tokens)
        encoder.load_state_dict(_part(state, names.ENCODER))
        encoder.eval()
        has_decoder = names.has_decoder(state)
        theirs = _open(library, "VideoMAEModel", folder, extra=names.is_decoder_of_theirs)
        compared["features"] = _difference(encode(encoder, ours_BCTHW), theirs(theirs_BTCHW).last_hidden_state)
        if has_decoder:
            theirs = _open(library, "VideoMAEForPreTraining", folder)
            compared |= _compare_losses(encoder, theirs, ours_BCTHW, theirs_BTCHW, state, config, geometry)
        _open(
            library,
            "VideoMAEForVideoClassification",
            folder,
            extra=names.is_decoder_of_theirs,
            absent=_is_classifier,
        )
    proof = Proof(str(library.__version__), compared)
    off = [line for line, difference in zip(proof.lines(), compared.values(), strict=True) if not difference.is_close]
    if off:
        raise UserError(
            f"transformers {proof.transformers_version} does not reproduce this network to {TOLERANCE:g} "
            f"({'; '.join(off)}); nothing was exported: install the transformers version of constraints.txt"
        )
    return proof


def _compare_losses(
    encoder: Encoder,
    theirs: Any,
    ours_BCTHW: Tensor,
    theirs_BTCHW: Tensor,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    geometry: Geometry,
) -> dict[str, Difference]:
    """Predictions and loss of the masked-frame objective under the masks that training would draw."""
    section = cast(Mapping[str, Any], config["objective"]["masked_frame"])
    objective = MaskedFrame(MaskedFrameConfig.model_validate(section), geometry.size, geometry.grid).eval()
    objective.decoder.load_state_dict(_part(state, names.DECODER))
    numbers_B = torch.arange(NUM_CLIPS)
    plan = objective.plan(ClipKeys(0, torch.zeros_like(numbers_B), numbers_B, torch.zeros_like(numbers_B)))
    patches_BNP, visible_BV = patchify(ours_BCTHW), plan["visible_BV"]
    predicted_BMP = objective.decoder(encoder(take(patches_BNP, visible_BV), visible_BV), visible_BV, plan["masked_BM"])
    loss = objective(encoder, patches_BNP, plan).value_B.mean()
    hidden_BN = torch.zeros(NUM_CLIPS, geometry.grid.num_tokens, dtype=torch.bool)
    hidden_BN.scatter_(1, plan["masked_BM"], True)
    output = theirs(theirs_BTCHW, bool_masked_pos=hidden_BN)
    return {"predictions": _difference(predicted_BMP, output.logits), "loss": _difference(loss, output.loss)}


Where = Callable[[str], bool]


def _nowhere(name: str) -> bool:
    del name
    return False


def _is_classifier(name: str) -> bool:
    return name.startswith("classifier.")


def _open(library: Any, name: str, folder: Path, *, extra: Where = _nowhere, absent: Where = _nowhere) -> Any:
    """Open with one of transformers' classes. Every parameter must arrive, but for those that a class does not have
    (`extra`) or that training makes anew (`absent`).
    """
    model, info = getattr(library, name).from_pretrained(str(folder), output_loading_info=True)
    strangers = sorted(key for key in info["unexpected_keys"] if not extra(key))
    missing = sorted(key for key in info["missing_keys"] if not absent(key))
    garbled = [str(entry) for entry in info["mismatched_keys"]]
    problems = [f"{len(found)} {what} ({found[0]}, …)" for what, found in _named(strangers, missing, garbled) if found]
    if problems:
        raise UserError(
            f"transformers {library.__version__} opens the export as {name} with {' and '.join(problems)}; "
            "nothing was exported: install the transformers version of constraints.txt, or export with other `biases`"
        )
    return model.eval()


def _named(*found: list[str]) -> Iterator[tuple[str, list[str]]]:
    return zip(("unread parameters", "missing parameters", "parameters of another shape"), found, strict=True)


def _textured_frames(geometry: Geometry) -> NDArray[np.uint8]:
    """Random uint8 clips [B, T, H, W, C]. Textured, because in flat tubelets the target is rounding noise."""
    shape = (NUM_CLIPS, geometry.frames, geometry.pixels, geometry.pixels, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _as_decoded(frames_THWC: NDArray[np.uint8]) -> Frames:
    """Whole RGB frames as a decoder would hand them over."""
    num_frames, height, width, _ = frames_THWC.shape
    return Frames(frames_THWC.reshape(num_frames, -1), height, width, COLOR_RGB24)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.float() for name, value in state.items() if name.startswith(prefix)}


def _difference(ours: Tensor, theirs: Tensor) -> Difference:
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    return Difference(float((ours - theirs).abs().max()), float(ours.abs().max()))


@contextmanager
def _quiet(library: Any) -> Generator[None]:
    """Keep progress bars and load reports off the terminal: what matters in them is checked and told above."""
    logging = library.logging
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
