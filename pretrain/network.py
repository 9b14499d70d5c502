"""The network of a config as a list of layers: parameters, operations and what each keeps for the backward pass.

Arithmetic only, for a login node without torch. Tests hold every figure against the real thing: parameters against
`Pretraining.named_parameters()`, operations against `Pretraining.training_flops()`, kept bytes against autograd.

Legend: N tokens of a clip  V visible, M masked ones  S slots  D width  E decoder width  P values of one tubelet
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from pretrain.config import Config
from pretrain.geometry import visible_cells
from pretrain.model.sizes import (
    PATCH_VALUES,
    SIZES,
    Grid,
    Size,
    blocks_flops,
    decoder_flops,
    embed_flops,
    encoder_flops,
)

Mode = Literal["fp32", "bf16", "autocast"]
"""Arithmetic of forward and backward: fp32, a model cast to bf16 (stages 1 to 3), fp32 weights used as bf16 (0)."""
FP32_BYTES, BF16_BYTES = 4, 2


@dataclass(frozen=True)
class Weight:
    """One trained parameter."""

    name: str
    numel: int
    is_decayed: bool
    """Weights of linear layers, which are the optimizer's first group."""


@dataclass(frozen=True)
class Kept:
    """Numbers of one clip that a layer keeps for the backward pass."""

    values: int = 0
    """In the dtype of the arithmetic."""
    norm_inputs: int = 0
    """Inputs of norms: under autocast fp32 copies of them are kept."""
    fp32: int = 0

    def num_bytes(self, mode: Mode) -> int:
        """Bytes for one clip."""
        value_bytes = FP32_BYTES if mode == "fp32" else BF16_BYTES
        norm_bytes = BF16_BYTES if mode == "bf16" else FP32_BYTES
        return self.values * value_bytes + self.norm_inputs * norm_bytes + self.fp32 * FP32_BYTES

    def times(self, passes: int) -> Kept:
        """Of a layer that runs several times in a step."""
        return Kept(self.values * passes, self.norm_inputs * passes, self.fp32 * passes)


@dataclass(frozen=True)
class Layer:
    """One part of the network, as it is used in a forward pass of all objectives."""

    name: str
    weights: tuple[Weight, ...]
    flops: int = 0
    """One clip, forward, matmuls and attention, all its passes."""
    input_flops: int = 0
    """Of these, those whose backward pass needs no gradient of the input: pixels."""
    kept: Kept = field(default_factory=Kept)
    input_kept: Kept | None = None
    """Of a block, what is kept where activations are recomputed: its inputs. Other layers: None."""
    passes: int = 1

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(weight.numel for weight in self.weights)

    @property
    def training_flops(self) -> int:
        """Forward and backward, as `Objective.training_flops` counts them."""
        return 3 * self.flops - self.input_flops


@dataclass(frozen=True)
class Network:
    """All layers, in the order of the parameters."""

    layers: tuple[Layer, ...]
    num_decoded: int
    """M where frames are reconstructed, else 0."""

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Every parameter in the order of `named_parameters()`."""
        return tuple(weight for layer in self.layers for weight in layer.weights)

    @cached_property
    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(layer.num_parameters for layer in self.layers)

    @property
    def training_flops(self) -> int:
        """Of one clip, forward and backward."""
        return sum(layer.training_flops for layer in self.layers)

    def parts(self) -> dict[str, int]:
        """Parameters of encoder and of each objective."""
        sums: dict[str, int] = {}
        for layer in self.layers:
            words = layer.name.split(".")
            part = " ".join(words[1:3]) if words[0] == "objectives" and words[1] == "masked_frame" else words[0]
            part = "frame_order head" if layer.name.startswith("objectives.frame_order") else part
            sums[part] = sums.get(part, 0) + layer.num_parameters
        return sums

    def kept_bytes(self, mode: Mode, *, recompute: bool) -> int:
        """What autograd keeps of one clip between forward and backward pass."""
        kept = (layer.input_kept if recompute and layer.input_kept else layer.kept for layer in self.layers)
        return sum(part.num_bytes(mode) for part in kept)

    def largest_block_bytes(self, mode: Mode) -> int:
        """What the recomputation of one block brings back, for one clip."""
        blocks = [layer for layer in self.layers if layer.input_kept is not None]
        return max(layer.kept.num_bytes(mode) // layer.passes for layer in blocks)

    def work_bytes(self, mode: Mode) -> int:
        """Short-lived tensors of one clip while the loss is made, beside what is kept (`normalised_pixels`): the
        prediction, the masked pixels, and three stages of their normalisation; one of these five is kept.
        """
        return self.num_decoded * PATCH_VALUES * (3 * FP32_BYTES + (FP32_BYTES if mode == "fp32" else BF16_BYTES))

    def cast_bytes(self, mode: Mode) -> int:
        """bf16 copies of the linear layers' weights that autocast keeps from forward to backward pass."""
        return BF16_BYTES * sum(w.numel for w in self.weights if w.is_decayed) if mode == "autocast" else 0


def network_of(config: Config) -> Network:
    """The layers of a config's encoder and objectives."""
    size, grid = SIZES[config.model.size], Grid.of(config.data.frames, config.data.size)
    masked, order = config.objective.masked_frame, config.objective.frame_order
    passes = [grid.slots * visible_cells(grid.cells, section.mask_ratio) for section in (masked, order) if section]
    layers = list(_encoder(size, passes))
    num_decoded = 0
    if masked is not None:
        num_decoded = grid.num_tokens - passes[0]
        layers += _decoder(size, passes[0], num_decoded)
    if order is not None:
        layers.append(_order_head(size, grid.slots))
    return Network(tuple(layers), num_decoded)


def _encoder(size: Size, passes: list[int]) -> Iterator[Layer]:
    embedding = sum(embed_flops(size, num_visible) for num_visible in passes)
    yield Layer(
        "encoder.embed",
        _linear("encoder.embed", PATCH_VALUES, size.width),
        embedding,
        embedding,
        Kept(values=sum(passes) * PATCH_VALUES),
        passes=len(passes),
    )
    block = (
        sum(encoder_flops(size, num_visible) - embed_flops(size, num_visible) for num_visible in passes) // size.depth
    )
    for number in range(size.depth):
        name = f"encoder.blocks.{number}"
        yield _block(name, size.width, size.heads, size.mlp_width, sum(passes), block, len(passes))
    yield _norm("encoder.norm", size.width, sum(passes), len(passes))


def _decoder(size: Size, num_visible: int, num_masked: int) -> list[Layer]:
    name, width, num_tokens = "objectives.masked_frame.decoder", size.decoder_width, num_visible + num_masked
    blocks = blocks_flops(num_tokens, width=width, mlp_width=size.decoder_mlp_width, depth=size.decoder_depth)
    head = 2 * num_masked * width * PATCH_VALUES
    embed = decoder_flops(size, num_visible, num_masked) - blocks - head
    return [
        Layer(f"{name}.mask_token", (Weight(f"{name}.mask_token", width, False),)),
        Layer(
            f"{name}.embed",
            (Weight(f"{name}.embed.weight", size.width * width, True),),
            embed,
            kept=Kept(values=num_visible * size.width),
        ),
        *(
            _block(
                f"{name}.blocks.{number}",
                width,
                size.decoder_heads,
                size.decoder_mlp_width,
                num_tokens,
                blocks // size.decoder_depth,
                1,
            )
            for number in range(size.decoder_depth)
        ),
        _norm(f"{name}.norm", width, num_masked, 1),
        Layer(
            f"{name}.head",
            _linear(f"{name}.head", width, PATCH_VALUES),
            head,
            # beside its input the difference to the target, which the square needs
            kept=Kept(values=num_masked * width, fp32=num_masked * PATCH_VALUES),
        ),
    ]


def _order_head(size: Size, slots: int) -> Layer:
    name = "objectives.frame_order"
    return Layer(
        "objectives.frame_order.head",
        (*_norm_weights(f"{name}.norm", size.width), *_linear(f"{name}.head", size.width, slots)),
        2 * slots * size.width * slots,
        kept=Kept(values=slots * size.width, norm_inputs=slots * size.width, fp32=3 * slots * slots),
    )


def _block(name: str, width: int, heads: int, mlp_width: int, tokens: int, flops: int, passes: int) -> Layer:
    """Kept of a token: the inputs of both norms; what the norms give (2 D); queries and values with their biases
    (2 D), the product they were cut from, which the keys keep alive (3 D), what attention gives (D); the hidden layer
    before and after GELU. In fp32 mean and deviation of the norms, and a sum for each head.
    """
    weights = (
        *_norm_weights(f"{name}.norm1", width),
        Weight(f"{name}.attention.q_bias", width, False),
        Weight(f"{name}.attention.v_bias", width, False),
        Weight(f"{name}.attention.qkv.weight", 3 * width * width, True),
        *_linear(f"{name}.attention.proj", width, width),
        *_norm_weights(f"{name}.norm2", width),
        *_linear(f"{name}.mlp.fc1", width, mlp_width),
        *_linear(f"{name}.mlp.fc2", mlp_width, width),
    )
    kept = Kept(values=tokens * (8 * width + 2 * mlp_width), norm_inputs=tokens * 2 * width, fp32=tokens * (4 + heads))
    return Layer(name, weights, flops, 0, kept, Kept(values=tokens * width), passes)


def _norm(name: str, width: int, tokens: int, passes: int) -> Layer:
    kept = Kept(norm_inputs=tokens * width, fp32=2 * tokens)
    return Layer(name, _norm_weights(name, width), kept=kept, passes=passes)


def _norm_weights(name: str, width: int) -> tuple[Weight, Weight]:
    return Weight(f"{name}.weight", width, False), Weight(f"{name}.bias", width, False)


def _linear(name: str, inputs: int, outputs: int) -> tuple[Weight, Weight]:
    return Weight(f"{name}.weight", inputs * outputs, True), Weight(f"{name}.bias", outputs, False)
