"""Our config -> DeepSpeed; one optimizer step. Owner of deepspeed.

The batch loss is the sum of the clips' losses over the constant global batch. DeepSpeed divides by the accumulation and
averages over ranks, so the loss of a micro batch is multiplied by both first (C10).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor

from pretrain.agree import sum_over_ranks
from pretrain.batch import ClipBatch
from pretrain.comm import time_collectives
from pretrain.data.augment import to_model_input
from pretrain.memory import MAX_BUCKET_NUMEL
from pretrain.objective import ClipKeys, Loss, Pretraining
from pretrain.sections import TrainConfig, ZeroConfig
from pretrain.states import States
from pretrain.world import World


@dataclass
class StepReport:
    """What one step measured on this rank: sums and counts, still on the device."""

    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Name -> tensor of two numbers (sum, count)."""
    batches: list[ClipBatch] = field(default_factory=list[ClipBatch])
    """The micro batches as they were consumed; their bookkeeping feeds the ledger."""
    is_finite_B: list[Tensor] = field(default_factory=list[Tensor])
    """Of each micro batch, which clips had only losses that are numbers; on the device."""
    is_applied: bool = True

    def bad_samples(self) -> set[int]:
        """Samples of this rank with a loss that is no number. Waits for the device."""
        return {
            int(sample)
            for batch, is_finite_B in zip(self.batches, self.is_finite_B, strict=True)
            for sample in batch.sample_B[~is_finite_B.cpu()].numpy()
            if sample >= 0
        }

    def add(self, name: str, total: Tensor, count: Tensor) -> None:
        """Add to the running (sum, count) of one name."""
        pair = torch.stack([total.detach().double(), count.detach().double().to(total.device)])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair


def join_ranks(world: World, timeout_s: float) -> torch.device:
    """Open the process group (gloo on CPUs, nccl on GPUs) and say which device this rank computes on."""
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*all_gather_into_tensor.*|.*reduce_scatter.*")
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("LOCAL_SIZE", str(world.local_size))
    # DeepSpeed reads these even where only one rank runs and nothing was launched.
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    for name, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", world.local_rank)):
        os.environ.setdefault(name, str(value))
    deepspeed = _deepspeed()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_s))
    if has_gpu:
        torch.cuda.set_device(world.local_rank)
        return torch.device("cuda", world.local_rank)
    return torch.device("cpu")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _deepspeed() -> Any:
    """DeepSpeed, quiet, and without the shared-memory op that would need a compiler and that training never uses."""
    import deepspeed
    from deepspeed.utils import logger

    cast(Any, deepspeed).ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.WARNING)
    return cast(Any, deepspeed)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """DeepSpeed prints memory figures while it builds its optimizers: into the log with them."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        if printed.getvalue():
            logging.getLogger(__name__).info("deepspeed: %s", printed.getvalue().strip())


def deepspeed_config(
    train: TrainConfig, zero: ZeroConfig, *, world_size: int, num_micro_steps: int, num_parameters: int
) -> dict[str, Any]:
    """The JSON DeepSpeed is given. Everything that has a surprising default is written out.

    bf16 at stage 0 is torch autocast over fp32 weights: DeepSpeed's own stage 0 would add gradients up in bf16.
    Clipping at stage 0 is ours as well: DeepSpeed would not tell the norm. Its buckets of 2 GB are cut to the model.
    """
    is_bf16 = train.precision == "bf16" and zero.stage > 0
    bucket = min(num_parameters, MAX_BUCKET_NUMEL)
    sharding: dict[str, Any] = {"stage": zero.stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if zero.offload:
        sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": num_micro_steps,
        "train_batch_size": train.micro_batch * num_micro_steps * world_size,
        "gradient_clipping": train.clip_norm if zero.stage > 0 else 0.0,
        "bf16": {"enabled": is_bf16, "check_grad_overflow": True} if is_bf16 else {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class Engine:
    """The model, its optimizer and their shards on one rank."""

    def __init__(
        self,
        model: Pretraining,
        optimizer: torch.optim.Optimizer,
        *,
        train: TrainConfig,
        zero: ZeroConfig,
        world: World,
        device: torch.device,
        size: int,
        seed: int,
    ) -> None:
        self.device = device
        self.num_micro_steps = -(-train.global_batch // (train.micro_batch * world.size))
        self._world, self._stage, self._size, self._seed = world, zero.stage, size, seed
        self._global_batch = train.global_batch
        self._autocast = train.precision == "bf16" and zero.stage == 0
        self._whole_norm: Tensor | None = None
        self._hook: Any = None
        if zero.stage == 0:

            def clip(*_: Any) -> None:
                self._clip_whole(train.clip_norm)

            self._hook = optimizer.register_step_pre_hook(clip)
        settings = deepspeed_config(
            train,
            zero,
            world_size=world.size,
            num_micro_steps=self.num_micro_steps,
            num_parameters=sum(p.numel() for p in model.parameters()),
        )
        model.to(device)
        with _quiet():
            built = _deepspeed().initialize(
                model=model,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                optimizer=optimizer,
                config=settings,
            )
        self._engine: Any = built[0]
        self._comm = time_collectives(_deepspeed().comm.comm.cdb)
        self.module = cast(Pretraining, self._engine.module)
        self.states = States(self._engine, optimizer, stage=zero.stage, world=world)

    # ------------------------------------------------------------------------------------------ training

    def step(self, batches: Iterable[ClipBatch], lr: float) -> StepReport:
        """One optimizer step over the micro batches of one global batch (this rank's share of it)."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.train()
        report = StepReport()
        for batch in batches:
            losses, weight_B = self._forward(batch, baselines=False)
            total = self._account(losses, weight_B, report)
            report.is_finite_B.append(_is_finite_B(losses))
            # A loss that is no number can have a gradient that is one: it must not be applied either.
            poison = torch.where(torch.isfinite(total.detach()), 1.0, torch.nan)
            self._engine.backward(total * poison * (self._world.size * self.num_micro_steps / self._global_batch))
            self._engine.step()
            report.batches.append(batch)
        # DeepSpeed drops a step whose gradient is not finite; at stage 0 `_clip_whole` does.
        report.is_applied = bool(self._engine.was_step_applied()) and self._is_finite()
        return report

    @torch.no_grad()
    def evaluate(self, batches: Iterable[ClipBatch]) -> StepReport:
        """Losses, and what trivial predictors would lose on the same tokens. Changes no state."""
        self._engine.eval()
        waited_s, report = self._comm.waited_s, StepReport()
        for batch in batches:
            losses, weight_B = self._forward(batch, baselines=True)
            self._account(losses, weight_B, report)
        self._engine.train()
        self._comm.waited_s = waited_s  # that was no training
        return report

    def _forward(self, batch: ClipBatch, *, baselines: bool) -> tuple[dict[str, Loss], Tensor]:
        moved = batch.to(self.device)
        frames_BCTHW = to_model_input(moved, self._size)
        keys = ClipKeys(self._seed, batch.epoch_B, batch.sample_B, batch.draw_B)
        plans = {
            name: {key: value.to(self.device, non_blocking=True) for key, value in plan.items()}
            for name, plan in self.module.plan(keys).items()
        }
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            losses = cast(dict[str, Loss], self._engine(frames_BCTHW, plans, baselines=baselines))
        return losses, moved.weight_B

    def _account(self, losses: dict[str, Loss], weight_B: Tensor, report: StepReport) -> Tensor:
        """The weighted sum over clips, which is what is differentiated; sums and counts go into the report."""
        total = torch.zeros((), device=self.device)
        count = weight_B.sum()
        for name, loss in losses.items():
            value = (loss.value_B.float() * weight_B).sum()
            total = total + self.module.weights[name] * value
            report.add(f"loss/{name}", value, count)
            for part, pair in loss.parts.items():
                report.add(f"{name}/{part}", (pair.sum_B * weight_B).sum(), (pair.count_B * weight_B).sum())
        report.add("loss", total, count)
        return total

    def totals(self, report: StepReport) -> dict[str, float]:
        """The report's means over all ranks: a collective, for log steps only. A part nobody counted is left out."""
        names = list(report.sums)
        sums_K2 = torch.stack([report.sums[name] for name in names])
        sum_over_ranks(sums_K2)
        sums = dict(zip(names, sums_K2.cpu().numpy(), strict=True))
        return {name: float(total / count) for name, (total, count) in sums.items() if count}

    def means(self, pairs: Sequence[Tensor]) -> list[float]:
        """Each (sum, count) of this rank as a mean over all ranks: one collective for all of them."""
        if not pairs:
            return []
        sums_K2 = torch.stack(list(pairs))
        sum_over_ranks(sums_K2)
        return [float(total / count) for total, count in sums_K2.cpu().numpy()]

    def comm_wait_s(self) -> float | None:
        """Seconds this rank has waited inside collectives of training since the last call; None where the device
        waits and not the processor.
        """
        waited_s, self._comm.waited_s = self._comm.waited_s, 0.0
        return waited_s if self.device.type == "cpu" else None

    def grad_norm(self) -> float | None:
        """Norm of the whole gradient of the last step, before clipping."""
        norm = self._whole_norm if self._stage == 0 else self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _is_finite(self) -> bool:
        return self._whole_norm is None or bool(torch.isfinite(self._whole_norm))

    def _clip_whole(self, clip_norm: float) -> None:
        """Stage 0, just before the optimizer: every rank has the whole gradient. One that is not finite goes, so that
        torch's optimizer leaves weights, moments and its step alone.
        """
        self._whole_norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), clip_norm or float("inf"))
        if not self._is_finite():
            self._engine.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Let go of what DeepSpeed holds on to, so that another engine can be built in this process."""
        if self._hook is not None:
            self._hook.remove()
        self._engine.destroy()


def _is_finite_B(losses: Mapping[str, Loss]) -> Tensor:
    return torch.stack([torch.isfinite(loss.value_B.detach()) for loss in losses.values()]).all(0)
