"""Every state tensor of a sharded run, in and out as named slices, the same for every stage and number of ranks.

DeepSpeed keeps fp32 masters and moments flat, cut over the ranks, in another way at each stage. Here each is a piece of
a named parameter again: what a checkpoint holds knows nothing of the ranks that wrote it (C8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pretrain.objective import Pretraining
from pretrain.world import World

STATE_KEYS: dict[str, tuple[str, ...]] = {
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "Adam": ("exp_avg", "exp_avg_sq"),
    "SGD": ("momentum_buffer",),
}


BUFFER = "buffer"
"""The state of what is no parameter."""


class Slice(NamedTuple):
    """Elements [offset, offset + numel) of the flattened state `state` of parameter `name`, held by this rank."""

    name: str
    state: str
    offset: int
    values_K: Tensor
    """fp32, one dimension."""


class States:
    """Masters and moments of one rank, where DeepSpeed and torch's optimizer keep them."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, *, stage: int, world: World) -> None:
        """`engine`: DeepSpeed's. `optimizer`: the one it was given; DeepSpeed wraps it, but for stage 0."""
        self._engine, self._sharded, self._stage, self._world = engine, engine.optimizer, stage, world
        self._optimizer: torch.optim.Optimizer = optimizer if stage == 0 else self._sharded.optimizer
        self._module = cast(Pretraining, engine.module)
        self.keys = STATE_KEYS[type(optimizer).__name__]
        """Names of the moments."""
        if type(optimizer) is torch.optim.SGD and optimizer.defaults["momentum"] == 0:
            self.keys = ()
        self._make()

    @property
    def optimizer_steps(self) -> int:
        """Steps the optimizer applied; Adam's bias correction depends on it."""
        for state in self._optimizer.state.values():
            if "step" in state:
                return int(state["step"])
        return int(self._engine.global_steps)

    def shapes(self) -> dict[str, list[int]]:
        """Name -> full shape of every trained parameter and persistent buffer."""
        found = {
            name: list(cast(Any, p).ds_shape if self._stage == 3 else p.shape)
            for name, p in self._module.named_parameters()
        }
        return found | {name: list(buffer.shape) for name, buffer in self._buffers().items()}

    def _buffers(self) -> dict[str, Tensor]:
        """Persistent ones, equal on all ranks."""
        stored = self._module.state_dict().keys()
        return {name: buffer for name, buffer in self._module.named_buffers() if name in stored}

    def _flat_states(self) -> list[Tensor]:
        """The tensors that torch's optimizer really updates: flat partitions, or at stage 0 the parameters."""
        if self._stage == 0:
            return [cast(Tensor, p) for group in self._optimizer.param_groups for p in group["params"]]
        if self._stage == 3:
            return list(self._sharded.fp32_partitioned_groups_flat)
        if hasattr(self._sharded, "fp32_groups_flat_partition"):  # bf16 at stage 1
            return list(self._sharded.fp32_groups_flat_partition)
        return list(self._sharded.single_partition_of_fp32_groups)

    def _make(self) -> None:
        """Create the optimizer's states now instead of in its first step, so that they can be read and restored."""
        for flat in self._flat_states():
            state = self._optimizer.state[flat]
            if self._optimizer.__class__ is not torch.optim.SGD:
                state["step"] = torch.tensor(0.0)
            for key in self.keys:
                state[key] = torch.zeros_like(flat, requires_grad=False)
        if self._stage in (1, 2):
            self._sharded._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def slices(self) -> Iterator[Slice]:
        """Every state this rank owns, each element of it owned by exactly one rank. Views, not copies."""
        for name, parameter in self._module.named_parameters():
            for state in ("fp32", *self.keys):
                owned = self._owned(parameter, state)
                if owned is not None and owned[1].numel():
                    yield Slice(name, state, *owned)
        if self._world.is_first:
            for name, buffer in self._buffers().items():
                yield Slice(name, BUFFER, 0, buffer.reshape(-1))

    @torch.no_grad()
    def restore(self, read: Callable[[str, str, int, int], Tensor], steps: int) -> None:
        """Fill every state from `read(name, state, offset, length) -> fp32`, whatever layout wrote it."""
        for name, parameter in self._module.named_parameters():
            for state in ("fp32", *self.keys):
                self._fill(name, parameter, state, read)
        for name, buffer in self._buffers().items():
            buffer.copy_(read(name, BUFFER, 0, buffer.numel()).view_as(buffer))
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(steps))
        self._engine.global_steps = steps
        self._publish_masters()

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


def _share(numel: int, world: World) -> tuple[int, int]:
    """An even cut of [0, numel): at stage 0 every rank has all, and each writes a part."""
    return numel * world.rank // world.size, numel * (world.rank + 1) // world.size
