"""Parameter names and layouts: ours <-> those of transformers' VideoMAE. Both directions, nothing else.

Three layouts differ. Our patch embedding is a matrix [D, P], theirs a Conv3d kernel [D, 3, 2, 16, 16]: the same
numbers, as P is ordered (channel, time, row, column). Our qkv is one matrix, theirs three. Our mask token is a vector
[E], theirs [1, 1, E].

Biases of q and v have two spellings: `attention.attention.q_bias` (transformers 4 and all published VideoMAE
checkpoints) and `attention.attention.query.bias` (the module's own name in transformers 5, read by every version of
it). Early versions of 5 drop the first spelling with no more than a warning, 4 drops the second, 5.23 reads both.

Legend: D encoder width, E decoder width, P = 3 * 2 * 16 * 16 values of a tubelet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from pretrain.model.sizes import CHANNELS, PATCH, TUBELET

BiasNames = Literal["v5", "v4"]
"""Spelling of the q and v biases: "v5" `query.bias`, "v4" `q_bias`."""

KERNEL = (CHANNELS, TUBELET, PATCH, PATCH)

ENCODER = "encoder."
DECODER = "objectives.masked_frame.decoder."

_BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_BIAS_NAMES: dict[BiasNames, dict[str, str]] = {
    "v5": {"q_bias": "query.bias", "v_bias": "value.bias"},
    "v4": {"q_bias": "q_bias", "v_bias": "v_bias"},
}
_QKV = ("query", "key", "value")


def to_transformers(state: Mapping[str, Tensor], *, biases: BiasNames = "v5") -> dict[str, Tensor]:
    """Our state dict -> `VideoMAEForPreTraining`'s, or `VideoMAEModel`'s (no prefix) where there is no decoder.

    Parameters of other objectives have no place there and are left out. All tensors are contiguous fp32 copies.
    """
    prefix = "videomae." if has_decoder(state) else ""
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith(ENCODER):
            theirs.update(_encoder_to_theirs(prefix, name.removeprefix(ENCODER), value, biases))
        elif name.startswith(DECODER):
            theirs.update(_decoder_to_theirs(name.removeprefix(DECODER), value, biases))
    return {name: value.detach().to(torch.float32).contiguous().clone() for name, value in theirs.items()}


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_transformers`, from either spelling of the biases. Unknown names raise `KeyError`."""
    ours: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        short = name.removeprefix("videomae.")
        part = _split_block(short)
        if part is None:
            ours.update(_single_to_ours(short, value))
            continue
        block, rest = part
        leaf = re.fullmatch(r"attention\.attention\.(query|key|value)\.weight", rest)
        if leaf:
            qkv.setdefault(block, {})[leaf[1]] = value
        else:
            ours[f"{block}{_block_leaf_to_ours(rest)}"] = value
    for block, parts in qkv.items():
        ours[f"{block}attention.qkv.weight"] = torch.cat([parts[which] for which in _QKV])
    return ours


def has_decoder(state: Mapping[str, Tensor]) -> bool:
    """Whether our state dict holds the decoder of the masked-frame objective."""
    return any(name.startswith(DECODER) for name in state)


def is_decoder_of_theirs(name: str) -> bool:
    """Whether a parameter of transformers belongs to what `VideoMAEForPreTraining` has beyond `VideoMAEModel`."""
    return name.startswith(("decoder.", "encoder_to_decoder.", "mask_token"))


def _encoder_to_theirs(prefix: str, name: str, value: Tensor, biases: BiasNames) -> Iterator[tuple[str, Tensor]]:
    if name == "embed.weight":
        yield f"{prefix}embeddings.patch_embeddings.projection.weight", value.reshape(-1, *KERNEL)
    elif name == "embed.bias":
        yield f"{prefix}embeddings.patch_embeddings.projection.bias", value
    elif name.startswith("norm."):
        yield f"{prefix}layernorm.{name.removeprefix('norm.')}", value
    else:
        yield from _block_to_theirs(f"{prefix}encoder.layer.", name, value, biases)


def _decoder_to_theirs(name: str, value: Tensor, biases: BiasNames) -> Iterator[tuple[str, Tensor]]:
    if name == "embed.weight":
        yield "encoder_to_decoder.weight", value
    elif name == "mask_token":
        yield "mask_token", value.reshape(1, 1, -1)
    elif name.startswith(("norm.", "head.")):
        yield f"decoder.{name}", value
    else:
        yield from _block_to_theirs("decoder.decoder_layers.", name, value, biases)


def _block_to_theirs(prefix: str, name: str, value: Tensor, biases: BiasNames) -> Iterator[tuple[str, Tensor]]:
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if found is None:
        raise KeyError(name)
    index, rest = found[1], found[2]
    stem, _, leaf = rest.rpartition(".")
    base = f"{prefix}{index}."
    if rest == "attention.qkv.weight":
        for which, rows in zip(_QKV, value.chunk(3), strict=True):
            yield f"{base}attention.attention.{which}.weight", rows
    elif stem == "attention":
        yield f"{base}attention.attention.{_BIAS_NAMES[biases][leaf]}", value
    else:
        yield f"{base}{_BLOCK_NAMES[stem]}.{leaf}", value


def _split_block(name: str) -> tuple[str, str] | None:
    """Transformers' block parameter -> (our prefix of that block, the rest of their name)."""
    found = re.fullmatch(r"(encoder\.layer|decoder\.decoder_layers)\.(\d+)\.(.+)", name)
    if found is None:
        return None
    ours = ENCODER if found[1] == "encoder.layer" else DECODER
    return f"{ours}blocks.{found[2]}.", found[3]


def _block_leaf_to_ours(rest: str) -> str:
    for spelling in _BIAS_NAMES.values():
        for ours, theirs in spelling.items():
            if rest == f"attention.attention.{theirs}":
                return f"attention.{ours}"
    stem, _, leaf = rest.rpartition(".")
    ours_of = {theirs: ours for ours, theirs in _BLOCK_NAMES.items()}
    return f"{ours_of[stem]}.{leaf}"


def _single_to_ours(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name == "embeddings.patch_embeddings.projection.weight":
        yield f"{ENCODER}embed.weight", value.flatten(1)
    elif name == "embeddings.patch_embeddings.projection.bias":
        yield f"{ENCODER}embed.bias", value
    elif name.startswith("layernorm."):
        yield f"{ENCODER}norm.{name.removeprefix('layernorm.')}", value
    elif name == "encoder_to_decoder.weight":
        yield f"{DECODER}embed.weight", value
    elif name == "mask_token":
        yield f"{DECODER}mask_token", value.flatten()
    elif name.startswith(("decoder.norm.", "decoder.head.")):
        yield f"{DECODER}{name.removeprefix('decoder.')}", value
    else:
        raise KeyError(name)
