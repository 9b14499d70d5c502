"""`tubelet plan`: what a config needs on so many GPUs, before one of them is asked for.

    config ─ pretrain.network ─┬─ memory per stage (pretrain.memory) ─ choice of stage and micro batch (plan_choice)
                               ├─ traffic (plan_traffic) ─ storage, decoding (plan_data)
                               └─ time, cost, checkpoints, failures (plan_simulate) ─ page (plan_page)

Arithmetic on a login node: no torch, no DeepSpeed, seconds. What is assumed is named in the output as assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.plan_choice import Choice, Option, check_ranks, choose, options_of, round_down
from launch.plan_data import (
    DataFacts,
    Storage,
    cores_needed,
    look_at_data,
    refuse_too_much,
    storage_of,
)
from launch.plan_gpus import Gpu, gpu_named
from launch.plan_simulate import HOUR_S, LLAMA, SIZES, Saving, ettr_table, simulate, young_daly_s
from launch.plan_traffic import Traffic, traffic_of
from pretrain.config import Config, load_config
from pretrain.memory import arithmetic, checkpoint_bytes
from pretrain.network import Network, network_of
from shards.errors import UserError

ASSUMED_MFU = 0.30
"""Of the data sheet's peak. Others report 0.33 to 0.47 for language models (torchtitan, Megatron-LM)."""
BLOCK_S = 0.3e-3
"""Assumed: a GPU is not asked faster than this for forward and backward pass of one block, however small it is (about
40 kernels of 8 microseconds). Small models with small micro batches are bound by it."""
NODE_WRITE_BYTES_PER_S = 1e9
ALL_WRITE_BYTES_PER_S = 20e9
"""Assumed: what a node writes to shared storage, and what the storage takes from all nodes together."""
MIN_WRITE_S = 1.0
"""Files, checksums, fsync and the agreement of the ranks take about this long however little there is to write."""
BACKGROUND_STALL = 0.2
"""A save in the background stalls training for at most this share of a plain one (README, checkpoints)."""
SHORTEST_INTERVAL_S, LONGEST_INTERVAL_S = 60.0, 3600.0
"""However unreliable the machines, and however reliable: people and schedulers stop jobs too."""
MAX_WORKERS = 16
"""Per GPU, that a plan proposes: nodes have about 12 to 28 cores for each card, and the trainer needs one as well."""
SEED = 0


@dataclass(frozen=True)
class Time:
    """How long, how much."""

    step_s: float
    """Computing and then sending: nothing is taken to overlap."""
    compute_s: float
    send_s: float
    hours: float
    """Of training that counts."""
    wall_hours: float
    """With saves and failures."""
    kwh: float
    """Of the boards at their full power: no processors, no cooling."""
    dollars: float
    clips_per_s: float
    mfu: float


@dataclass(frozen=True)
class Checkpoints:
    """How often to save."""

    num_bytes: int
    """One checkpoint, all ranks together."""
    write_bytes_per_s: float
    saving: Saving
    mtbf_s: float
    every_steps: int


@dataclass(frozen=True)
class Plan:
    """Everything that `tubelet plan` says."""

    path: Path
    overrides: tuple[str, ...]
    config: Config
    nodes: int
    gpus: int
    gpu: Gpu
    network: Network
    data: DataFacts
    options: tuple[Option, ...]
    choice: Choice
    traffic: dict[int, Traffic]
    """Stage -> collectives of a step at the chosen micro batch."""
    time: Time
    storage: Storage
    cores: tuple[float, float]
    """Processor cores per node that decode fast enough, by the lower and the higher figure."""
    checkpoints: Checkpoints
    ettr: float
    """Of this run on this many GPUs."""
    ettr_by_size: dict[int, dict[str, float]]

    @property
    def world_size(self) -> int:
        """Ranks: one per GPU."""
        return self.nodes * self.gpus

    @property
    def changes(self) -> tuple[str, ...]:
        """Overrides that turn the config into what is recommended, those that change something."""
        config, option = self.config, self.choice.option
        wanted: list[tuple[str, Any, Any]] = [
            ("zero.stage", config.zero.stage, option.stage),
            ("zero.offload", config.zero.offload, option.offload),
            ("train.micro_batch", config.train.micro_batch, self.choice.micro_batch),
            ("train.activation_checkpointing", config.train.activation_checkpointing, option.recompute),
            ("checkpoint.every_steps", config.checkpoint.every_steps, self.checkpoints.every_steps),
        ]
        kept, every = config.checkpoint.keep_every_steps, self.checkpoints.every_steps
        if kept % every:
            wanted.append(("checkpoint.keep_every_steps", kept, max(1, round(kept / every)) * every))
        workers = min(MAX_WORKERS, -(-self.cores[0] // self.gpus))
        if config.data.workers < workers:
            wanted.append(("data.workers", config.data.workers, int(workers)))
        return tuple(f"{key}={str(new).lower()}" for key, old, new in wanted if old != new)

    def to_json(self) -> dict[str, Any]:
        """The plan for a machine; sizes in bytes, times in seconds unless the name says otherwise."""
        return {
            "nodes": self.nodes,
            "gpus_per_node": self.gpus,
            "gpu": asdict(self.gpu),
            "parameters": {"all": self.network.num_parameters, **self.network.parts()},
            "training_flops_per_clip": self.network.training_flops,
            "memory": [option.to_json() for option in self.options],
            "recommended": {**self.choice.to_json(), "overrides": list(self.changes)},
            "traffic": {
                str(stage): {**asdict(traffic), "sent_bytes": traffic.sent(self.world_size)}
                for stage, traffic in self.traffic.items()
            },
            "time": asdict(self.time),
            "data": asdict(self.data),
            "storage": asdict(self.storage),
            "cores_per_node": list(self.cores),
            "checkpoints": asdict(self.checkpoints),
            "ettr": self.ettr,
            "ettr_by_gpus": {str(size): rates for size, rates in self.ettr_by_size.items()},
            "layers": [
                {
                    "name": layer.name,
                    "parameters": layer.num_parameters,
                    "training_flops": layer.training_flops,
                    "activation_bytes": layer.kept.num_bytes(
                        arithmetic(self.config.train.precision, self.choice.option.stage)
                    ),
                }
                for layer in self.network.layers
            ],
        }


def make_plan(
    path: Path, overrides: Sequence[str] = (), *, nodes: int, gpus: int, gpu: str = "h100", mfu: float = ASSUMED_MFU
) -> Plan:
    """Plan the run of a config on `nodes` x `gpus` cards.

    Raises UserError for a config with problems, and for a plan that cannot work: more ranks than clips, a model that
    fits no stage, more bytes or requests than storage gives. The message says what to change.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu is {mfu:g}; it must be a share of the peak, above 0 and at most 1: 0.3 is common")
    config, card = load_config(path, overrides), gpu_named(gpu)
    world_size = nodes * gpus
    check_ranks(config, world_size)
    network, facts = network_of(config), look_at_data(config)
    options = tuple(options_of(network, config, world_size=world_size, max_pixels=facts.max_pixels, gpu=card))
    choice = choose(network, config, options, world_size=world_size, max_pixels=facts.max_pixels, gpu=card)
    traffic = {
        stage: traffic_of(
            network,
            stage=stage,
            mode=arithmetic(config.train.precision, stage),
            num_micro_steps=choice.num_micro_steps,
        )
        for stage in range(4)
    }
    compute_s = _compute_s(config, network, choice, card, mfu)
    send_s = traffic[choice.option.stage].sent(world_size) / card.link_bytes_per_s(nodes)
    step_s = compute_s + send_s
    clips_per_s = config.train.global_batch / step_s
    storage = storage_of(config, facts, clips_per_s, nodes)
    refuse_too_much(config, facts, storage)
    checkpoints = _checkpoints(config, network, step_s, nodes, world_size)
    saving, work_s = checkpoints.saving, config.train.steps * step_s
    ettr = simulate(saving, mtbf_s=checkpoints.mtbf_s, seed=SEED, work_s=work_s).ettr
    hours = work_s / HOUR_S
    wall_hours = hours / ettr
    time = Time(
        step_s=step_s,
        compute_s=compute_s,
        send_s=send_s,
        hours=hours,
        wall_hours=wall_hours,
        kwh=wall_hours * world_size * card.power_w / 1000,
        dollars=wall_hours * world_size * card.dollars_per_hour,
        clips_per_s=clips_per_s,
        mfu=mfu,
    )
    return Plan(
        path=path,
        overrides=tuple(overrides),
        config=config,
        nodes=nodes,
        gpus=gpus,
        gpu=card,
        network=network,
        data=facts,
        options=options,
        choice=choice,
        traffic=traffic,
        time=time,
        storage=storage,
        cores=cores_needed(clips_per_s / nodes, config.data.frames),
        checkpoints=checkpoints,
        ettr=ettr,
        ettr_by_size=ettr_table(saving, SIZES, seed=SEED),
    )


def _compute_s(config: Config, network: Network, choice: Choice, gpu: Gpu, mfu: float) -> float:
    """Computing of one step at the assumed MFU, which counts real clips once: fillers and recomputation come on top."""
    flops = network.training_flops
    if choice.option.recompute:
        flops += sum(layer.flops for layer in network.layers if layer.input_kept is not None)
    clips_per_rank = choice.num_micro_steps * choice.micro_batch
    num_blocks = sum(layer.passes for layer in network.layers if layer.input_kept is not None)
    by_peak_s = clips_per_rank * flops / (gpu.peak_flops[config.train.precision] * mfu)
    return max(by_peak_s, choice.num_micro_steps * num_blocks * BLOCK_S)


def _checkpoints(config: Config, network: Network, step_s: float, nodes: int, world_size: int) -> Checkpoints:
    """Young and Daly's interval in whole steps, never shorter than a write takes and never longer than an hour."""
    num_bytes = checkpoint_bytes(network, config.optim)
    rate = min(nodes * NODE_WRITE_BYTES_PER_S, ALL_WRITE_BYTES_PER_S)
    write_s = MIN_WRITE_S + num_bytes / rate
    stall_s = write_s * (BACKGROUND_STALL if config.checkpoint.background else 1)
    mtbf_s = LLAMA.mtbf_s(world_size)
    wanted_s = min(max(young_daly_s(stall_s, mtbf_s), write_s, SHORTEST_INTERVAL_S), LONGEST_INTERVAL_S)
    every_steps = round_down(max(1, int(wanted_s / step_s)))
    saving = Saving(every_steps * step_s, stall_s, write_s)
    return Checkpoints(num_bytes, rate, saving, mtbf_s, min(every_steps, config.train.steps))
