"""Probe: how far do frozen features alone sort labelled videos? k nearest neighbours by cosine, nothing trained.

The same network with random weights is measured beside it, on the same clips: a random video Transformer already
sorts some data by brightness and texture, so only the difference was learned.

Legend: N clips, D feature width, K neighbours, Q queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain.downstream.clips import open_samples
from pretrain.downstream.features import Features, extract
from pretrain.load import load_export, random_encoder
from shards.errors import UserError
from shards.pack import PackProgress

MAX_NEIGHBOURS = 10
TEMPERATURE = 0.07
"""Of the vote exp(similarity / T), as in the kNN evaluation of DINO (arXiv 2104.14294, appendix F.1 uses 0.07)."""

Protocol = Literal["train against val", "leave one group out", "leave one clip out"]


@dataclass(frozen=True)
class ProbeResult:
    """What was measured, on what, and the three numbers to hold against each other."""

    measured: str
    """One sentence."""
    export: str
    data: str
    protocol: Protocol
    accuracy: float
    """Share of the queries whose class was named, with the exported weights."""
    random_accuracy: float
    """Mean of `random_accuracies`."""
    random_accuracies: tuple[float, ...]
    """The same network with random weights, one per seed."""
    chance: float
    """Best constant answer: share of the most frequent class among the queries."""
    neighbours: int
    num_classes: int
    num_bank: int
    """Clips that can be neighbours."""
    num_queries: int
    skipped: dict[str, int]
    """Videos that could not be used, by reason."""
    notes: tuple[str, ...]
    """What a reader must know before quoting the numbers."""

    def to_json(self) -> dict[str, Any]:
        """Plain types only."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """For a terminal."""
        return [
            self.measured,
            f"exported weights  {self.accuracy:6.1%}",
            f"random weights    {self.random_accuracy:6.1%}  "
            f"(mean of {len(self.random_accuracies)}: {', '.join(f'{a:.1%}' for a in self.random_accuracies)})",
            f"constant answer   {self.chance:6.1%}",
            *(f"skipped {count} videos: {reason}" for reason, count in sorted(self.skipped.items())),
            *(f"note: {note}" for note in self.notes),
        ]


def probe(
    export: str | Path,
    data: str | Path,
    *,
    num_random: int = 3,
    seed: int = 0,
    batch: int = 8,
    device: str = "cpu",
    progress: Callable[[PackProgress], None] | None = None,
) -> ProbeResult:
    """kNN accuracy of frozen, mean-pooled features on labelled data, beside random weights and a constant answer.

    Args:
        export: Folder written by `tubelet export`.
        data: Folder with a subfolder per class (or `train/CLASS` and `val/CLASS`), or a packed data set.
        num_random: Networks with random weights to average over.
        seed: Seed of the first random network.
        batch: Clips per forward pass.
        device: Where to compute.
        progress: Told how far a folder of videos is read.

    Raises:
        UserError: unreadable export or data, fewer than two classes, or too few usable videos.
    """
    if num_random < 1:
        raise UserError(f"num_random is {num_random}; it must be at least 1: the comparison is the point")
    exported = load_export(export)
    encoders = [exported.encoder]
    encoders += [random_encoder(exported.geometry, seed=seed + number) for number in range(num_random)]
    with open_samples(data, exported.geometry, progress=progress) as samples:
        if len(samples.labels) < 2:
            raise UserError(
                f"{data} has {len(samples.labels)} labelled class(es); a probe needs at least 2: "
                "give a folder with one subfolder of videos per class"
            )
        found = extract(encoders, samples, exported.geometry, batch=batch, device=device)
        labels = samples.labels
    if len(found.labels_N) < 2:
        raise UserError(
            f"{data} has {len(found.labels_N)} usable videos ({_reasons(found.skipped)}); "
            f"a probe needs at least 2 of {exported.geometry.frames} frames or more: give longer videos"
        )
    protocol, allowed_QN, queries_Q, notes = _choose_protocol(found, labels)
    labels_N = found.labels_N
    neighbours = min(MAX_NEIGHBOURS, int(allowed_QN.sum(1).min()))
    accuracies = [
        accuracy(features_ND, labels_N, queries_Q, allowed_QN, neighbours, len(labels))
        for features_ND in found.features
    ]
    num_bank = int(allowed_QN.any(0).sum())
    counts = torch.bincount(labels_N[queries_Q], minlength=len(labels))
    return ProbeResult(
        measured=(
            f"top-1 accuracy of {neighbours} nearest neighbours by cosine (features centred, votes weighted by "
            f"exp(similarity/{TEMPERATURE})) on frozen mean-pooled features of the middle clip of every sample, "
            f"{protocol}: {len(queries_Q)} queries against {num_bank} clips, {len(labels)} classes"
        ),
        export=str(export),
        data=str(data),
        protocol=protocol,
        accuracy=accuracies[0],
        random_accuracy=sum(accuracies[1:]) / num_random,
        random_accuracies=tuple(accuracies[1:]),
        chance=float(counts.max() / counts.sum()),
        neighbours=neighbours,
        num_classes=len(labels),
        num_bank=num_bank,
        num_queries=len(queries_Q),
        skipped=found.skipped,
        notes=notes,
    )


def accuracy(
    features_ND: Tensor,
    labels_N: Tensor,
    queries_Q: Tensor,
    allowed_QN: Tensor,
    neighbours: int,
    num_classes: int,
) -> float:
    """Share of `queries_Q` (int64 rows of the features) whose class wins the vote of their nearest allowed rows.

    Features are centred over all N and compared by cosine in fp32. `allowed_QN` is bool; a query must allow at least
    `neighbours` rows. Two classes with equal votes: the lower number, as torch's argmax has it.
    """
    centred_ND = features_ND.float() - features_ND.float().mean(0)
    unit_ND = nn.functional.normalize(centred_ND, dim=1)
    correct = 0
    for start in range(0, len(queries_Q), 1024):
        rows_Q = queries_Q[start : start + 1024]
        similar_QN = (unit_ND[rows_Q] @ unit_ND.T).masked_fill(~allowed_QN[start : start + 1024], float("-inf"))
        nearest = similar_QN.topk(neighbours, dim=1)
        votes_QC = torch.zeros(len(rows_Q), num_classes)
        votes_QC.scatter_add_(1, labels_N[nearest.indices], (nearest.values / TEMPERATURE).exp())
        correct += int((votes_QC.argmax(1) == labels_N[rows_Q]).sum())
    return correct / len(queries_Q)


def _choose_protocol(found: Features, labels: tuple[str, ...]) -> tuple[Protocol, Tensor, Tensor, tuple[str, ...]]:
    """Which clips are asked (rows), and which clips each may be compared with (bool [Q, N])."""
    labels_N, groups_N, held_out_N = found.labels_N, found.groups_N, found.held_out_N
    if held_out_N.any() and (~held_out_N).any():
        num_classes = len(labels)
        in_bank_C = torch.bincount(labels_N[~held_out_N], minlength=num_classes) > 0
        asked_C = torch.bincount(labels_N[held_out_N], minlength=num_classes) > 0
        unseen = [labels[label] for label in range(num_classes) if bool(asked_C[label] & ~in_bank_C[label])]
        if not unseen:
            queries_Q = held_out_N.nonzero().flatten()
            return "train against val", (~held_out_N).expand(len(queries_Q), -1), queries_Q, ()
        note = f"the train split has no video of {', '.join(unseen[:5])}, so the splits were put together"
        notes: tuple[str, ...] = (note,)
    else:
        notes = ()
    queries_Q = torch.arange(len(labels_N))
    itself_NN = torch.eye(len(labels_N), dtype=torch.bool)
    same_class_NN = labels_N[:, None] == labels_N[None, :]
    other_group_NN = groups_N[:, None] != groups_N[None, :]
    has_twin_N = (same_class_NN & ~itself_NN).any(1)
    has_stranger_N = (same_class_NN & other_group_NN).any(1)
    if not has_twin_N.any():
        raise UserError(
            f"every class has a single usable video ({_reasons(found.skipped)}); a probe compares videos of one "
            "class with each other: give at least two per class"
        )
    if bool((has_stranger_N == has_twin_N).all()):
        return "leave one group out", other_group_NN, queries_Q, notes
    notes += (
        "some class comes from a single source, so clips of one source lie on both sides: "
        "this shows that the pieces work together, not what the features are worth on new videos",
    )
    return "leave one clip out", ~itself_NN, queries_Q, notes


def _reasons(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "nothing was left out"
