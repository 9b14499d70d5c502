"""How to pack: what a sample looks like, how tars are filled, and what goes into which split."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Literal

from shards.encode import Encoding
from shards.errors import UserError
from shards.probe import Limits


@dataclass(frozen=True)
class PackOptions:
    """How to pack. `preset` train encodes for training, copy stores each file as it is, as one sample."""

    preset: Literal["train", "copy"] = "train"
    short_side: int = 256
    max_frames: int = 128
    max_rate: float = 30.0
    stride: int = 4
    for_rate: float | None = None
    """Frames per second that training will ask for, whatever the rate of the source; takes the place of `stride`."""
    min_frames: int = 16
    val_fraction: float = 0.1
    shard_bytes: int = 256_000_000
    workers: int = 0
    """0 = one per processor."""
    seed: int = 0
    limits: Limits = field(default_factory=Limits)

    @property
    def encoding(self) -> Encoding:
        """The part that decides what a sample looks like."""
        return Encoding(
            short_side=self.short_side,
            max_frames=self.max_frames,
            max_rate=self.max_rate,
            stride=self.stride,
            min_frames=self.min_frames,
            for_rate=self.for_rate,
        )

    @property
    def digest(self) -> str:
        """Names all that decides about the bytes of a packing: not the number of workers."""
        row = {name: value for name, value in asdict(self).items() if name != "workers"}
        return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Raise UserError for values that cannot work, all of them at once."""
        rules = {
            f"pack.preset is {self.preset!r}; it must be train or copy": self.preset in ("train", "copy"),
            f"pack.short_side is {self.short_side}; it must be at least 32": self.short_side >= 32,
            f"pack.stride is {self.stride}; it must be at least 1": self.stride >= 1,
            f"pack.for_rate is {self.for_rate}; it must lie above 0, at most 240": (
                self.for_rate is None or 0 < self.for_rate <= 240
            ),
            f"pack.min_frames is {self.min_frames}; it must be at least 2": self.min_frames >= 2,
            f"pack.max_frames is {self.max_frames}; it must be at least twice pack.min_frames ({self.min_frames})": (
                self.max_frames >= 2 * self.min_frames
            ),
            f"pack.max_rate is {self.max_rate:g}; it must lie above 0, at most 240": 0 < self.max_rate <= 240,
            f"pack.val_fraction is {self.val_fraction:g}; it must lie in [0, 1)": 0 <= self.val_fraction < 1,
            f"pack.shard_bytes is {self.shard_bytes}; it must be at least 1000": self.shard_bytes >= 1000,
            f"pack.workers is {self.workers}; it must be at least 0": self.workers >= 0,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise UserError("; ".join(broken) + ": change that")
