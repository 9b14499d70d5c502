"""Our config -> DeepSpeed; one optimizer step; every state tensor in and out as named slices. Owner of deepspeed.

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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
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
from pretrain.world import World

STATE_KEYS: dict[str, tuple[str, ...]] = {
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "Adam": ("exp_avg", "exp_avg_sq"),
    "SGD": ("momentum_buffer",),
}


@dataclass(frozen=True)
class Slice:
    """Elements [offset, offset + numel) of the flattened state `state` of parameter `name`, held by this rank."""

    name: str
    state: str
    offset: int
    values_K: Tensor
    """fp32, one dimension."""


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
        self._sharded: Any = built[1]
        self._optimizer: torch.optim.Optimizer = optimizer if zero.stage == 0 else self._sharded.optimizer
        self.module = cast(Pretraining, self._engine.module)
        self.state_keys = STATE_KEYS[type(optimizer).__name__]
        if type(optimizer) is torch.optim.SGD and optimizer.defaults["momentum"] == 0:
            self.state_keys = ()
        self._make_states()

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

    # ------------------------------------------------------------------------------------------ states

    @property
    def optimizer_steps(self) -> int:
        """Steps the optimizer applied; Adam's bias correction depends on it."""
        for state in self._optimizer.state.values():
            if "step" in state:
                return int(state["step"])
        return int(self._engine.global_steps)

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> full shape of every trained parameter."""
        return {
            name: tuple(cast(Any, p).ds_shape if self._stage == 3 else p.shape)
            for name, p in self.module.named_parameters()
        }

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers, equal on all ranks."""
        stored = self.module.state_dict().keys()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in stored}

    def _flat_states(self) -> list[Tensor]:
        """The tensors that torch's optimizer really updates: flat partitions, or at stage 0 the parameters."""
        if self._stage == 0:
            return [cast(Tensor, p) for group in self._optimizer.param_groups for p in group["params"]]
        if self._stage == 3:
            return list(self._sharded.fp32_partitioned_groups_flat)
        if hasattr(self._sharded, "fp32_groups_flat_partition"):  # bf16 at stage 1
            return list(self._sharded.fp32_groups_flat_partition)
        return list(self._sharded.single_partition_of_fp32_groups)

    def _make_states(self) -> None:
        """Create the optimizer's states now instead of in its first step, so that they can be read and restored."""
        for flat in self._flat_states():
            state = self._optimizer.state[flat]
            if self._optimizer.__class__ is not torch.optim.SGD:
                state["step"] = torch.tensor(0.0)
            for key in self.state_keys:
                state[key] = torch.zeros_like(flat, requires_grad=False)
        if self._stage in (1, 2):
            self._sharded._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def slices(self) -> Iterator[Slice]:
        """Every state this rank owns, each element of it owned by exactly one rank. Views, not copies."""
        for name, parameter in self.module.named_parameters():
            for state in ("fp32", *self.state_keys):
                owned = self._owned(parameter, state)
                if owned is not None and owned[1].numel():
                    yield Slice(name, state, *owned)

    @torch.no_grad()
    def restore(self, read: Callable[[str, str, int, int], Tensor], steps: int) -> None:
        """Fill every state from `read(name, state, offset, length) -> fp32`, whatever layout wrote it."""
        for name, parameter in self.module.named_parameters():
            for state in ("fp32", *self.state_keys):
                self._fill(name, parameter, state, read)
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(steps))
        self._engine.global_steps = steps
        self._publish_masters()

    @torch.no_grad()
    def restore_buffers(self, read: Callable[[str], Tensor]) -> None:
        """Fill the persistent buffers; `read(name)` gives flat fp32 values."""
        for name, buffer in self.buffers().items():
            buffer.copy_(read(name).view_as(buffer))

    def _owned(self, parameter: Any, state: str) -> tuple[int, Tensor] | None:
        """(offset, flat fp32 values) of the part of a state that this rank writes into a checkpoint."""
        if self._stage == 0:
            full = parameter.detach() if state == "fp32" else self._optimizer.state[parameter][state]
            begin, end = _share(full.numel(), self._world)
            return begin, full.reshape(-1)[begin:end]
        if self._stage == 3:
            part, offset, length = self._partition(parameter, state)
            return offset, part.reshape(-1)[:length]
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        fragment = mapping.get_hp_fragment() if state == "fp32" else mapping.get_optim_state_fragment(state)
        return int(mapping.lp_fragment_address.start), fragment.reshape(-1)

    def _fill(self, name: str, parameter: Any, state: str, read: Callable[[str, str, int, int], Tensor]) -> None:
        if self._stage == 0:
            full = parameter.data if state == "fp32" else self._optimizer.state[parameter][state]
            full.copy_(read(name, state, 0, full.numel()).view_as(full))
        elif self._stage == 3:
            part, offset, length = self._partition(parameter, state)
            if length:
                part.reshape(-1)[:length] = read(name, state, offset, length).to(part.device)
        elif (owned := self._owned(parameter, state)) is not None:
            offset, values_K = owned
            values_K.copy_(read(name, state, offset, values_K.numel()))

    def _partition(self, parameter: Any, state: str) -> tuple[Tensor, int, int]:
        """Stage 3: (this rank's padded partition as a view, offset in the parameter, how much of it is real)."""
        key = None if state == "fp32" else state
        part, _ = self._sharded._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=key
        )
        offset = self._world.rank * part.numel()
        return part, offset, max(0, min(part.numel(), parameter.ds_numel - offset))

    def _publish_masters(self) -> None:
        """Write the restored fp32 masters into the parameters that the forward pass uses."""
        if self._stage in (1, 2):
            self._sharded.update_lp_params()
        elif self._stage == 3:
            for group in range(len(self._sharded.fp16_groups)):
                self._sharded._reassign_or_swap_out_partitioned_parameters(group)
            kept_whole = self._sharded.persistent_parameters
            if len(kept_whole):
                kept_whole[0].partition(kept_whole)
                kept_whole[0].all_gather(kept_whole)


def _is_finite_B(losses: Mapping[str, Loss]) -> Tensor:
    return torch.stack([torch.isfinite(loss.value_B.detach()) for loss in losses.values()]).all(0)


def _share(numel: int, world: World) -> tuple[int, int]:
    """An even cut of [0, numel): at stage 0 every rank has all, and each writes a part."""
    return numel * world.rank // world.size, numel * (world.rank + 1) // world.size
