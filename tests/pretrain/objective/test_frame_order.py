from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pretrain.model.embed import patchify, take
from pretrain.model.sizes import PATCH_VALUES, SIZES, Grid
from pretrain.model.vit import Encoder
from pretrain.objective import Pretraining
from pretrain.objective.frame_order import FrameOrder, slot_motion
from pretrain.objective.loss import ClipKeys
from pretrain.sections import FrameOrderConfig, MaskedFrameConfig, ObjectiveConfig
from shards.errors import UserError

NANO = SIZES["nano"]
GRID = Grid.of(16, 64)
S = GRID.slots


def keys(num_clips: int, first: int = 0, epoch: int = 0) -> ClipKeys:
    zeros = torch.zeros(num_clips, dtype=torch.int64)
    return ClipKeys(7, zeros + epoch, torch.arange(first, first + num_clips), zeros)


def build(grid: Grid = GRID, **config: object) -> tuple[Encoder, FrameOrder]:
    torch.manual_seed(0)
    section = FrameOrderConfig.model_validate({"mask_ratio": 0.75, **config})
    return Encoder(NANO, grid.num_tokens), FrameOrder(section, NANO, grid)


def patches(num_clips: int, frames: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return patchify(torch.randn(num_clips, 3, frames, 64, 64, generator=generator))


# ------------------------------------------------------------------ the shuffle


@settings(max_examples=60, deadline=None)
@given(slots=st.integers(3, 16), data=st.data())
def test_exactly_the_wanted_number_of_slots_moves(slots: int, data: st.DataObject):
    num_moved = data.draw(st.none() | st.integers(2, slots))
    _, objective = build(Grid(slots, 2, 2), num_moved=num_moved)
    order_BS = objective.plan(keys(4, first=data.draw(st.integers(0, 10**9))))["order_BS"]
    assert torch.equal(order_BS.sort(dim=1).values, torch.arange(slots).expand(4, -1))
    moved = (order_BS != torch.arange(slots)).sum(dim=1)
    assert (moved == (slots if num_moved is None else num_moved)).all()


def test_all_derangements_are_equally_likely():
    _, objective = build(Grid(4, 2, 2))
    num_draws = 3600
    counts = Counter(tuple(row) for row in objective.plan(keys(num_draws))["order_BS"].tolist())
    assert len(counts) == 9  # derangements of four
    expected = num_draws / 9
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 2 * 8


def test_any_slots_may_be_the_ones_that_move():
    _, objective = build(Grid(5, 2, 2), num_moved=2)
    num_draws = 3000
    counts = Counter(tuple(row) for row in objective.plan(keys(num_draws))["order_BS"].tolist())
    assert len(counts) == 10  # pairs of five
    assert sum((count - num_draws / 10) ** 2 / (num_draws / 10) for count in counts.values()) < 2 * 9


def test_plan_is_the_same_in_any_micro_batch_and_another_in_each_epoch():
    _, objective = build()
    whole = objective.plan(keys(4))
    for b in range(4):
        alone = objective.plan(keys(1, first=b))
        assert all(torch.equal(alone[name][0], whole[name][b]) for name in whole)
    assert not torch.equal(objective.plan(keys(4, epoch=1))["order_BS"], whole["order_BS"])


def test_shuffling_then_embedding_equals_embedding_then_permuting():
    encoder, objective = build()
    plan = objective.plan(keys(2))
    patches_BNP = patches(2)
    embedded: list[Tensor] = []
    encoder.embed.register_forward_hook(lambda _module, _args, output: embedded.append(output.detach()))
    objective(encoder, patches_BNP, plan)
    tokens_BND = encoder.embed(patches_BNP).detach()
    slots_BSX = tokens_BND.view(2, S, -1)
    permuted_BND = take(slots_BSX, plan["order_BS"]).view(2, GRID.num_tokens, -1)
    torch.testing.assert_close(embedded[0], take(permuted_BND, plan["visible_BV"]), rtol=1e-5, atol=1e-6)


def test_nothing_runs_before_the_shuffle():
    encoder, objective = build()
    plan = objective.plan(keys(1))
    patches_BNP = patches(1)
    calls: list[tuple[nn.Module, Tensor]] = []
    for module in [*encoder.modules(), *objective.modules()]:
        if module is not objective:
            module.register_forward_pre_hook(lambda module, args: calls.append((module, args[0].detach().clone())))
    objective(encoder, patches_BNP, plan)
    shuffled_BNP = patches_BNP.view(1, S, -1)[:, plan["order_BS"][0]].view(1, GRID.num_tokens, -1)
    first_module, first_input = calls[0]
    assert first_module is encoder
    assert torch.equal(first_input, shuffled_BNP[:, plan["visible_BV"][0]])  # raw pixels, already shuffled
    assert calls[1][0] is encoder.embed
    assert torch.equal(calls[1][1], first_input)


def test_positions_belong_to_the_slots_and_not_to_what_stands_there():
    encoder, objective = build()
    plan = objective.plan(keys(1))
    seen: list[Tensor] = []
    encoder.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    objective(encoder, patches(1), plan)
    assert torch.equal(seen[0], plan["visible_BV"])


# ------------------------------------------------------------------ the question


def answer_with(objective: FrameOrder, logits_BSS: Tensor) -> None:
    """Make the head say `logits_BSS` whatever it is asked."""
    objective.head.register_forward_hook(lambda _module, _args, output: output * 0 + logits_BSS)


def test_the_label_of_a_slot_is_where_its_pixels_stood():
    encoder, objective = build()
    plan = objective.plan(keys(2))
    patches_BNP = patches(2)
    # What now stands at slot s came from slot order[s]: recovered here from the pixels alone.
    shown = patches_BNP.view(2, S, -1)
    fed: list[Tensor] = []
    encoder.register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    objective(encoder, patches_BNP, plan)
    cells = plan["visible_BV"][:, : objective.num_shown] % GRID.cells
    origin_BS = torch.empty(2, S, dtype=torch.int64)
    for b in range(2):
        candidates = shown[b].view(S, GRID.cells, PATCH_VALUES)[:, cells[b]].flatten(1)
        for s, piece in enumerate(fed[0][b].view(S, -1)):
            origin_BS[b, s] = (candidates == piece).all(dim=1).nonzero().item()
    assert torch.equal(origin_BS, plan["order_BS"])
    answer_with(objective, 50.0 * nn.functional.one_hot(origin_BS, S).float())
    loss = objective(encoder, patches_BNP, plan)
    assert float(loss.value_B.detach().max()) < 1e-6
    assert torch.equal(loss.parts["accuracy"].sum_B, loss.parts["accuracy"].count_B)


def test_only_moved_slots_are_asked_about():
    encoder, objective = build(num_moved=3)
    plan = objective.plan(keys(4))
    in_place = nn.functional.one_hot(torch.arange(S), S).float()
    answer_with(objective, 5.0 * in_place)  # right for every slot that did not move
    loss = objective(encoder, patches(4), plan)
    assert torch.equal(loss.parts["accuracy"].count_B, torch.full((4,), 3.0))
    assert not loss.parts["accuracy"].sum_B.any()
    expected = math.log(math.exp(5) + S - 1)
    torch.testing.assert_close(loss.value_B.detach(), torch.full((4,), expected))
    torch.testing.assert_close(loss.parts["chance"].sum_B, torch.full((4,), 3 / (S - 1)))


def test_chance_is_what_an_even_guess_over_the_other_slots_costs():
    encoder, objective = build()
    answer_with(objective, -1e9 * nn.functional.one_hot(torch.arange(S), S).float())
    loss = objective(encoder, patches(2), objective.plan(keys(2)))
    torch.testing.assert_close(loss.value_B.detach(), torch.full((2,), math.log(S - 1)))


# ------------------------------------------------------------------ shortcuts


@pytest.mark.slow
@pytest.mark.parametrize("leaks", [False, True])
def test_without_pixels_accuracy_stays_at_chance(leaks: bool):
    """Trained on black clips with the gate off and tested on other draws: positions give nothing away.

    The control shows that the test can fail: where tokens keep the positions they had before the shuffle, the same
    training reads the answer off them.
    """
    grid = Grid.of(16, 32)
    encoder, objective = build(grid, min_motion=0, mask_ratio=0.75)
    plan: dict[str, Tensor] = {}

    def keep_positions(_: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return args[0], take((args[1] // grid.cells)[..., None], plan["order_BS"])[..., 0] * grid.cells

    if leaks:
        encoder.register_forward_pre_hook(keep_positions)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *objective.parameters()], lr=1e-3)
    num_clips = 32
    black_BNP = torch.zeros(num_clips, grid.num_tokens, PATCH_VALUES)
    for step in range(100):
        plan = objective.plan(keys(num_clips, epoch=step))
        optimizer.zero_grad()
        objective(encoder, black_BNP, plan).value_B.mean().backward()
        optimizer.step()
    correct = asked = 0.0
    with torch.no_grad():
        for step in range(100, 120):
            plan = objective.plan(keys(num_clips, epoch=step))
            part = objective(encoder, black_BNP, plan).parts["accuracy"]
            correct += float(part.sum_B.sum())
            asked += float(part.count_B.sum())
    chance = 1 / (S - 1)
    binomial_error = math.sqrt(chance * (1 - chance) / asked)
    assert asked == 20 * num_clips * S
    if leaks:
        assert correct / asked > 0.5
    else:
        assert correct / asked < chance + 4 * binomial_error


def test_the_loss_sends_no_gradient_into_the_decoder():
    config = ObjectiveConfig(masked_frame=MaskedFrameConfig(mask_ratio=0.75), frame_order=FrameOrderConfig())
    model = Pretraining("nano", config, frames=16, size=64, seed=0)
    losses = model(torch.randn(2, 3, 16, 64, 64), model.plan(keys(2)))
    losses["frame_order"].value_B.sum().backward()
    for name, parameter in model.named_parameters():
        if "decoder" in name:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None, name
    assert float(model.encoder.embed.weight.grad.abs().max()) > 0


# ------------------------------------------------------------------ the motion gate


def test_static_clips_ask_nothing_cost_nothing_and_are_counted():
    encoder, objective = build()
    static = torch.randn(1, 3, 1, 64, 64).expand(1, 3, 16, 64, 64)
    patches_BNP = torch.cat([patchify(static), patches(1)])
    loss = objective(encoder, patches_BNP, objective.plan(keys(2)))
    assert loss.value_B.detach().tolist()[0] == 0
    assert float(loss.value_B.detach()[1]) > 0
    assert loss.parts["gated"].sum_B.tolist() == [S, 0]
    assert loss.parts["gated"].count_B.tolist() == [S, S]
    assert loss.parts["accuracy"].count_B.tolist() == [0, S]
    assert loss.parts["chance"].count_B.tolist() == [0, S]
    loss.value_B.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*encoder.parameters(), *objective.parameters()])


def test_a_wholly_gated_micro_batch_keeps_its_graph():
    encoder, objective = build()
    loss = objective(encoder, torch.zeros(2, GRID.num_tokens, PATCH_VALUES), objective.plan(keys(2)))
    loss.value_B.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in [*encoder.parameters(), *objective.parameters()])


def test_slots_that_repeat_their_neighbour_are_not_asked_about():
    encoder, objective = build()
    frames = torch.randn(1, 3, 16, 64, 64, generator=torch.Generator().manual_seed(2))
    frames[:, :, 6:8] = frames[:, :, 4:6]  # slots 2 and 3 look the same
    plan = objective.plan(keys(1))
    loss = objective(encoder, patchify(frames), plan)
    assert loss.parts["accuracy"].count_B.tolist() == [S - 2]
    assert loss.parts["gated"].sum_B.tolist() == [2]
    # ...wherever they stand now: with answers right for slots 2 and 3 alone, nothing counts as right
    logits = torch.zeros(1, S, S)
    for s, origin in enumerate(plan["order_BS"][0].tolist()):
        logits[0, s, origin if origin in (2, 3) else (origin + 1) % S] = 9.0
    answer_with(objective, logits)
    assert objective(encoder, patchify(frames), plan).parts["accuracy"].sum_B.tolist() == [0]


def test_motion_is_measured_in_grey_levels_of_the_pixels():
    frames = torch.zeros(1, 3, 8, 32, 32)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
    for slot, level in enumerate((10, 12, 15, 15)):
        frames[0, :, 2 * slot : 2 * slot + 2] = level / 255 / std
    motion = slot_motion(patchify(frames).view(1, 4, -1)) * 255
    torch.testing.assert_close(motion, torch.tensor([[2.0, 2.0, 0.0, 0.0]]), rtol=0, atol=1e-3)


def test_the_threshold_is_in_grey_levels():
    frames = torch.zeros(1, 3, 16, 64, 64)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
    for slot in range(S):
        frames[0, :, 2 * slot : 2 * slot + 2] = 2 * slot / 255 / std
    for min_motion, num_asked in ((1.9, S), (2.1, 0)):
        encoder, objective = build(min_motion=min_motion)
        loss = objective(encoder, patchify(frames), objective.plan(keys(1)))
        assert loss.parts["accuracy"].count_B.tolist() == [num_asked]


# ------------------------------------------------------------------ refusals


def test_clips_of_two_slots_are_refused():
    with pytest.raises(UserError, match=r"data\.frames is 4; it must hold at least 3 slots .*: use 6 or more"):
        build(Grid.of(4, 64))


def test_more_moved_slots_than_there_are_are_refused():
    with pytest.raises(UserError, match=r"objective\.frame_order\.num_moved is 9; .*: use 8"):
        build(num_moved=9)
