"""What failed trials teach: groups that give in step, groups that are alike, and single channels."""

from __future__ import annotations

import copy
from fractions import Fraction
from math import gcd

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import PruneRecord, find_groups, prune
from lightning_prune.allocation import Allocation, Global, Limits, Uniform
from lightning_prune.lessons import Lessons, kinds_of
from lightning_prune.shares import equal_shares
from lightning_prune.types import PruningPlan
from lightning_prune.verification import Trial

WIDTH, HEADS = 48, 3
TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """As it is written most often: one width is taken for the other, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Net(nn.Module):
    def __init__(self, blocks: int = 2, inner: type[nn.Module] = Attention) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(inner() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


def zeroed(model: nn.Module, record: PruneRecord) -> nn.Module:
    """Write zeros where the cut took something away."""
    twin = copy.deepcopy(model)
    for name, tensor in twin.named_parameters():
        for dim, kept in record.kept.get(name, {}).items():
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[list(kept)] = False
            tensor.data.index_fill_(dim, gone.nonzero().squeeze(1), 0)
    return twin


class TestInStep:
    @pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5, 0.6])
    def test_the_width_follows_the_heads_and_zeroing_equals_removing(self, ratio: float) -> None:
        model = Net().double()
        dense = copy.deepcopy(model)
        record = prune(model, TOKENS.double(), pruning_ratio=ratio)
        (block, other), width = model.blocks, model.embed.out_features
        assert block.heads == other.heads < HEADS
        assert width * HEADS == block.heads * WIDTH
        assert "in step with blocks.0.qkv" in record.held_back["embed"]
        wanted = zeroed(dense, record)(TOKENS.double())
        assert torch.allclose(model(TOKENS.double()), wanted, rtol=1e-12)

    def test_what_is_in_step_already_is_left_as_planned(self) -> None:
        model = Net()
        record = prune(model, TOKENS, pruning_ratio=1 / 3)
        assert (model.embed.out_features, model.blocks[0].heads) == (32, 2)
        assert not {"embed", "blocks.0.qkv", "blocks.1.qkv"} & record.held_back.keys()

    def test_every_block_follows_where_the_heads_are_ranked_together(self) -> None:
        model = Net(3)
        with torch.no_grad():
            model.blocks[1].qkv.weight.mul_(5)
        record = prune(model, TOKENS, pruning_ratio=0.3, allocation=Global())
        heads = {block.heads for block in model.blocks}
        assert len(heads) == 1
        assert model.embed.out_features == heads.pop() * WIDTH // HEADS
        assert record.params.removed > 0.2
        model(TOKENS).sum().backward()

    @pytest.mark.parametrize("allocation", [Uniform(), Global()], ids=["uniform", "global"])
    def test_again_after_a_cut(self, allocation: Allocation) -> None:
        model = Net()
        prune(model, TOKENS, pruning_ratio=0.3, allocation=allocation)
        before = model.embed.out_features
        prune(model, TOKENS, pruning_ratio=0.6, allocation=allocation)
        assert model.embed.out_features * HEADS == model.blocks[0].heads * WIDTH
        assert model.embed.out_features < before

    def test_the_search_for_a_cost_knows_of_it(self) -> None:
        record = prune(Net(), TOKENS, pruning_ratio=0.5, of="macs")
        assert 0.5 <= record.reached < 0.62  # a third of the width goes at a time

    @pytest.mark.parametrize(("multiple", "heads"), [(2, 2), (5, 3)])
    def test_no_further_than_the_limits(self, multiple: int, heads: int) -> None:
        model = Net()
        prune(model, TOKENS, pruning_ratio=0.5, round_to=multiple)
        assert (model.blocks[0].heads, model.embed.out_features) == (heads, heads * 16)

    def test_a_width_that_must_stay_holds_the_heads(self) -> None:
        model = Net()
        record = prune(model, TOKENS, pruning_ratio=0.5, ignore=["embed"])
        assert model.blocks[0].heads == HEADS
        assert "shape" in record.held_back["blocks.0.qkv"]


class Narrow(nn.Module):
    """Its width stands in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().reshape(-1, 24)).reshape_as(x)


class TestAlike:
    def test_groups_like_two_that_were_refused_are_refused_with_the_reason(self) -> None:
        model = Net(6, Narrow)
        record = prune(model, TOKENS, pruning_ratio=0.5)
        refused = {name: record.held_back[f"blocks.{name}.up"] for name in range(6)}
        assert all("the cut would move its channels" in reason for reason in refused.values())
        assert sum("is like others" in reason for reason in refused.values()) == 4
        assert model.embed.out_features == WIDTH // 2

    def test_another_shape_is_another_kind(self) -> None:
        model = Net(4, Narrow)
        model.blocks[3] = nn.Sequential(nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH))
        groups = find_groups(model, TOKENS)
        kinds = kinds_of(model, groups)
        assert kinds["blocks.0.up"] == kinds["blocks.1.up"] != kinds["blocks.3.0"]
        prune(model, TOKENS, pruning_ratio=0.5)
        assert [model.blocks[2].up.out_features, model.blocks[3][0].out_features] == [24, 10]


SCORES = {name: torch.arange(4.0) for name in "abc"}
ALL_BUT_ONE = PruningPlan(dict.fromkeys("abc", torch.arange(3)))
HALF = PruningPlan(dict.fromkeys("abc", torch.arange(2)))


def learnt(*trials: Trial, plan: PruningPlan, kinds: dict[str, str] | None = None) -> Lessons:
    lessons = Lessons()
    for trial in trials:
        lessons.learn(trial, plan, SCORES, kinds or {})
    return lessons


class TestLessons:
    def test_a_single_channel_gets_another_chance_and_then_no_more(self) -> None:
        failed = Trial(None, refused={"a": "no"})  # type: ignore[arg-type]
        lessons = learnt(failed, plan=ALL_BUT_ONE)
        assert not lessons.refused
        plan = lessons.apply(ALL_BUT_ONE, SCORES, Limits())
        assert {name: len(gone) for name, gone in plan.removed.items()} == {"a": 2, "b": 3, "c": 3}
        assert plan.held_back["a"].startswith("keeps 2 channels")
        lessons.learn(failed, plan, SCORES, {})
        assert lessons.refused == {"a": "no"}

    def test_single_channels_of_a_kind_are_spared_together(self) -> None:
        trials = [Trial(None, refused={name: "no"}) for name in "ab"]  # type: ignore[arg-type]
        lessons = learnt(*trials, plan=ALL_BUT_ONE, kinds=dict.fromkeys("abc", "alike"))
        assert {len(gone) for gone in lessons.apply(ALL_BUT_ONE, SCORES, Limits()).removed.values()} == {2}
        assert not lessons.refused

    def test_groups_in_step_with_one_another_are_in_step_with_all(self) -> None:
        steps = [Trial(None, refused={"a": "no"}, in_step=pair) for pair in ({"a", "b"}, {"b", "c"}, {"a", "c"})]  # type: ignore[arg-type]
        lessons = learnt(*steps[:2], plan=HALF)
        tried = PruningPlan({**HALF.removed, "a": torch.arange(1)})
        assert len({len(gone) for gone in lessons.apply(tried, SCORES, Limits()).removed.values()}) == 1
        assert not lessons.refused
        lessons.learn(steps[2], tried, SCORES, {})  # which is known, and did not help
        assert lessons.refused == {"a": "no"}
        assert not lessons.apply(tried, SCORES, Limits()).removed

    @pytest.mark.parametrize(("limits", "left"), [(Limits(min_channels=4), 4), (Limits(round_to=2), 2)])
    def test_the_limits_hold_for_those_in_step(self, limits: Limits, left: int) -> None:
        lessons = learnt(Trial(None, refused={"a": "no"}, in_step={"a", "b"}), plan=HALF)  # type: ignore[arg-type]
        tried = PruningPlan({**HALF.removed, "a": torch.arange(3)})
        plan = lessons.apply(tried, SCORES, limits)
        assert {4 - len(plan.removed.get(name, ())) for name in "ab"} == {left}


class TestShares:
    @given(
        widths=st.lists(st.integers(1, 12), min_size=2, max_size=4),
        part=st.integers(1, 8),
        data=st.data(),
        step=st.sampled_from([1, 2, 3]),
    )
    def test_the_same_fraction_of_all_nearest_to_the_widest(
        self, widths: list[int], part: int, data: st.DataObject, step: int
    ) -> None:
        sizes = {str(place): width * part for place, width in enumerate(widths)}
        gone = {name: data.draw(st.integers(0, size - 1)) for name, size in sizes.items()}
        shares = equal_shares(sizes, gone, lambda name, left: left % step == 0)
        assert len({Fraction(shares[name], size) for name, size in sizes.items()}) == 1
        assert all(0 <= shares[name] < size for name, size in sizes.items())
        assert not any(shares.values()) or all((sizes[name] - shares[name]) % step == 0 for name in sizes)
        widest = max(sizes, key=lambda name: sizes[name])
        if step == 1:
            common = gcd(*sizes.values())
            possible = [sizes[widest] * share // common for share in range(common)]
            assert abs(shares[widest] - gone[widest]) == min(abs(count - gone[widest]) for count in possible)

    def test_nothing_where_no_fraction_is_whole(self) -> None:
        assert equal_shares({"a": 4, "b": 9}, {"a": 2, "b": 4}, least=1) == {"a": 0, "b": 0}
