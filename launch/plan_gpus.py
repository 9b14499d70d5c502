"""Graphics cards that a plan can be made for: facts from the makers' data sheets, and a price that is an assumption."""

from __future__ import annotations

from dataclasses import dataclass

from shards.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One card, as a cluster node has it."""

    name: str
    memory_bytes: int
    """Of the data sheet, in powers of ten: a little less than the card has."""
    peak_flops: dict[str, float]
    """Precision -> dense operations per second, as in `pretrain.meter.PEAK_FLOPS`."""
    power_w: int
    """Maximum board power."""
    dollars_per_hour: float
    """Assumed: on-demand clouds ask about this for one card in a node of eight."""
    inside_bytes_per_s: float
    """To the other cards of its node, one direction: NVLink, or PCIe."""
    outside_bytes_per_s: float
    """Assumed, to other nodes: a network card of 400, 200 or 100 Gb/s for each GPU."""

    def link_bytes_per_s(self, nodes: int) -> float:
        """What the slowest link of a ring over so many nodes carries for one GPU."""
        return self.inside_bytes_per_s if nodes == 1 else self.outside_bytes_per_s


GB = 1_000_000_000

GPUS: dict[str, Gpu] = {
    "h100": Gpu("H100", 80 * GB, {"bf16": 989e12, "fp32": 67e12}, 700, 3.0, 450e9, 50e9),
    "h200": Gpu("H200", 141 * GB, {"bf16": 989e12, "fp32": 67e12}, 700, 3.8, 450e9, 50e9),
    "a100": Gpu("A100", 80 * GB, {"bf16": 312e12, "fp32": 19.5e12}, 400, 1.8, 300e9, 25e9),
    "l40s": Gpu("L40S", 48 * GB, {"bf16": 362e12, "fp32": 91.6e12}, 350, 1.2, 32e9, 12.5e9),
}
"""NVIDIA data sheets: H100 SXM5 (2023), H200 SXM (2024), A100 80GB SXM4 (2021), L40S (2023)."""


def gpu_named(name: str) -> Gpu:
    """The card of that name. Raises UserError for one that is not in the table."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise UserError(f"--gpu is {name}; it must be one of {', '.join(GPUS)}: name the nearest of these")
    return gpu
