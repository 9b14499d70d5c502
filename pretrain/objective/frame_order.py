"""Frame order: say which time slot each shuffled slot came from.

A second encoder pass sees a clip whose slots (tubelets of two frames) stand in another order. They are shuffled as
raw pixels, before any layer runs and before positions are added, so that a position says where a slot stands now and
nothing says where it stood. After HERO's frame order modelling (arXiv 2005.00200), without its trivial targets: the
shuffle is a derangement, and only slots that moved are asked about.

Legend: B clips  S slots  V visible tokens = S * K shown cells  N tokens  P values of one tubelet  D width
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.geometry import visible_cells
from pretrain.model.embed import Linear, take
from pretrain.model.mask import num_tube_uniforms, tube_mask
from pretrain.model.sizes import PATCH_VALUES, TUBELET, Grid, Size, encoder_flops
from pretrain.model.vit import Encoder
from pretrain.objective.loss import ClipKey, ClipKeys, Loss, Objective, Part
from pretrain.objective.targets import unnormalise
from pretrain.sections import FrameOrderConfig
from shards.errors import UserError

MIN_SLOTS = 3
"""With two slots the only derangement is the swap, and the answer is known without looking."""
HEAD_NORM_EPS = 1e-6
GREY_LEVELS = 255.0


class FrameOrder(Objective):
    """Cross-entropy of the original slot, over the slots of a clip that moved and whose neighbours look different.

    Convention: order_BS[b, s] is the original slot of what now stands at slot s, and the label of slot s.
    Parts: `accuracy` over the slots asked about; `chance` = 1 / (S - 1), the best that can be done without pixels, over
    the same; `gated`, the share of moved slots not asked about because nothing moves there (a static clip: all,
    and its loss is 0).
    """

    def __init__(
        self, config: FrameOrderConfig, size: Size, grid: Grid, *, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        if grid.slots < MIN_SLOTS:
            raise UserError(
                f"data.frames is {grid.slots * TUBELET}; it must hold at least {MIN_SLOTS} slots of {TUBELET} frames "
                f"for objective.frame_order: use {MIN_SLOTS * TUBELET} or more"
            )
        num_moved = grid.slots if config.num_moved is None else config.num_moved
        if not 2 <= num_moved <= grid.slots:
            raise UserError(
                f"objective.frame_order.num_moved is {num_moved}; it must lie between 2 and the {grid.slots} slots of "
                f"a clip: use {min(max(num_moved, 2), grid.slots)}"
            )
        self.weight = config.weight
        self.num_moved = num_moved
        self.min_motion = config.min_motion / GREY_LEVELS
        self.num_shown = visible_cells(grid.cells, config.mask_ratio)
        self.num_encoded = grid.slots * self.num_shown
        self.size, self.grid = size, grid
        self.norm = nn.LayerNorm(size.width, eps=HEAD_NORM_EPS)
        self.head = Linear(size.width, grid.slots)

    def plan(self, keys: ClipKeys) -> dict[str, Tensor]:
        """order_BS, and visible_BV: a tube mask of this objective's own."""
        orders = [self._order(key) for key in keys]
        masks = [
            tube_mask(
                key.uniform("frame_order.mask", num_tube_uniforms(self.grid.cells)),
                slots=self.grid.slots,
                cells=self.grid.cells,
                num_shown=self.num_shown,
            )
            for key in keys
        ]
        return {
            "order_BS": torch.as_tensor(np.stack(orders)),
            "visible_BV": torch.as_tensor(np.stack([mask.visible_V for mask in masks])),
        }

    def forward(
        self, encoder: Encoder, patches_BNP: Tensor, plan: Mapping[str, Tensor], *, baselines: bool = False
    ) -> Loss:
        """Shuffle, encode, ask. There is no other baseline than chance, which is always given."""
        order_BS, visible_BV = plan["order_BS"], plan["visible_BV"]
        # A tube shows the same cells in every slot, so masking first and shuffling then is shuffling the whole clip.
        slots_BSX = rearrange(take(patches_BNP, visible_BV), "b (s k) p -> b s (k p)", s=self.grid.slots)
        shuffled_BVP = rearrange(take(slots_BSX, order_BS), "b s (k p) -> b (s k) p", k=self.num_shown)
        latent_BVD: Tensor = encoder(shuffled_BVP, visible_BV)
        slot_BSD = rearrange(latent_BVD, "b (s k) d -> b s k d", k=self.num_shown).mean(dim=2)
        logits_BSS: Tensor = self.head(self.norm(slot_BSD)).float()

        moved_BS = order_BS != torch.arange(self.grid.slots, device=order_BS.device)
        asked_BS = moved_BS & (slot_motion(slots_BSX) >= self.min_motion).gather(1, order_BS)
        entropy_BS = F.cross_entropy(logits_BSS.transpose(1, 2), order_BS, reduction="none")
        count_B = asked_BS.sum(dim=1)
        value_B = (entropy_BS * asked_BS).sum(dim=1) / count_B.clamp(min=1)
        return Loss(value_B, self._parts(logits_BSS.detach(), order_BS, moved_BS, asked_BS))

    def flops(self) -> int:
        """One encoder pass over the visible tubelets and the head."""
        head = 2 * self.grid.slots * self.size.width * self.grid.slots
        return encoder_flops(self.size, self.num_encoded) + head

    def _order(self, key: ClipKey) -> NDArray[np.int64]:
        """Original slot of each slot: `num_moved` slots, drawn evenly, changed among themselves, none in its place."""
        order_S = np.arange(self.grid.slots, dtype=np.int64)
        chosen = np.argsort(key.uniform("frame_order.slots", self.grid.slots), kind="stable")[: self.num_moved]
        order_S[chosen] = chosen[_derangement(key, self.num_moved)]
        return order_S

    def _parts(self, logits_BSS: Tensor, order_BS: Tensor, moved_BS: Tensor, asked_BS: Tensor) -> dict[str, Part]:
        count_B = asked_BS.sum(dim=1).float()
        correct_BS = (logits_BSS.argmax(dim=-1) == order_BS) & asked_BS
        return {
            "accuracy": Part(correct_BS.sum(dim=1).float(), count_B),
            "chance": Part(count_B / (self.grid.slots - 1), count_B),
            "gated": Part((moved_BS & ~asked_BS).sum(dim=1).float(), moved_BS.sum(dim=1).float()),
        }


def _derangement(key: ClipKey, num_slots: int) -> NDArray[np.int64]:
    """A permutation without fixed point, all equally likely: drawn until one has none (e times on average)."""
    for attempt in itertools.count():
        drawn = np.argsort(key.uniform(f"frame_order.order.{attempt}", num_slots), kind="stable")
        if not (drawn == np.arange(num_slots)).any():
            return drawn
    raise AssertionError("count() does not end")


@torch.no_grad()
def slot_motion(slots_BSX: Tensor) -> Tensor:
    """How much each slot of an ordered clip differs from the neighbour most like it: fp32 [B, S], values in [0, 1].

    Mean absolute difference over the pixels given, frame by frame. 0 where a slot repeats its neighbour: then nobody
    could say which of the two it is. X is any number of whole tubelets, as the model takes them.
    """
    values_BSKCI = unnormalise(rearrange(slots_BSX, "b s (k p) -> b s k p", p=PATCH_VALUES))
    step_BT = values_BSKCI.diff(dim=1).abs().mean(dim=(2, 3, 4))
    infinite_B1 = torch.full_like(step_BT[:, :1], torch.inf)
    return torch.minimum(torch.cat([infinite_B1, step_BT], dim=1), torch.cat([step_BT, infinite_B1], dim=1))
