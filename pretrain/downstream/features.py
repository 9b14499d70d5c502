"""Frozen features of labelled videos: one vector per video and network, mean over all tokens of one middle clip.

Legend: N videos, D width, B clips of a forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.decode import Frames
from pretrain.downstream.clips import Samples
from pretrain.downstream.view import middle_crops
from pretrain.load import Geometry, encode
from pretrain.model.vit import Encoder
from shards.errors import SampleError


@dataclass(frozen=True)
class Features:
    """What N usable, labelled videos look like to each network. All tensors on the CPU."""

    features: tuple[Tensor, ...]
    """float32 [N, D], one per network, in the order given."""
    labels_N: Tensor
    """int64."""
    groups_N: Tensor
    """int64: equal for videos of one source."""
    held_out_N: Tensor
    """bool: of a split that is not for training."""
    skipped: dict[str, int]
    """Videos left out, by reason."""


@torch.no_grad()
def extract(
    encoders: Sequence[Encoder], samples: Samples, geometry: Geometry, *, batch: int = 8, device: str = "cpu"
) -> Features:
    """Mean-pooled features of the middle clip of every labelled sample, each decoded once for all networks.

    Samples without a label, with fewer frames than the clip, or that cannot be decoded are counted in `skipped`.
    """
    pooled: list[list[Tensor]] = [[] for _ in encoders]
    for encoder in encoders:
        encoder.to(device).eval()
    skipped: Counter[str] = Counter(samples.rejected)
    used: list[tuple[int, int, bool]] = []
    waiting: list[Frames] = []

    def compute() -> None:
        frames_BCTHW = middle_crops(waiting, geometry.pixels, device)
        for encoder, found in zip(encoders, pooled, strict=True):
            found.append(encode(encoder, frames_BCTHW).float().mean(1).cpu())
        waiting.clear()

    for sample in samples:
        if sample.label < 0:
            skipped["unlabelled"] += 1
            continue
        try:
            waiting.append(sample.middle_clip(geometry.frames, geometry.stride))
        except SampleError as error:
            skipped[error.reason] += 1
            continue
        used.append((sample.label, sample.group, sample.is_held_out))
        if len(waiting) == batch:
            compute()
    if waiting:
        compute()
    empty_ND = torch.zeros(0, geometry.size.width)
    return Features(
        features=tuple(torch.cat(found) if found else empty_ND for found in pooled),
        labels_N=torch.tensor([label for label, _, _ in used], dtype=torch.int64),
        groups_N=torch.tensor([group for _, group, _ in used], dtype=torch.int64),
        held_out_N=torch.tensor([held_out for _, _, held_out in used], dtype=torch.bool),
        skipped=dict(skipped),
    )
