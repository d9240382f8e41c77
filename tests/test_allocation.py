"""Allocation: hand-computed plans, exact counts under ties, limits and what they hold back."""

from __future__ import annotations

from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.allocation import Allocation, Global, Limits, Uniform, allocate
from lightning_prune.types import PruningPlan

TIES = {name: torch.ones(size) for name, size in {"a": 4, "b": 6, "c": 10}.items()}


def removed(plan: PruningPlan) -> dict[str, list[int]]:
    return {name: indices.tolist() for name, indices in plan.removed.items()}


class TestUniform:
    def test_the_lowest_scores_of_each_group_go(self) -> None:
        scores = {"a": torch.tensor([3.0, 1.0, 2.0, 0.5]), "b": torch.tensor([9.0, 8.0])}
        assert removed(allocate(scores, 0.5, Uniform())) == {"a": [1, 3], "b": [1]}
        assert removed(allocate(scores, 0.25, Uniform())) == {"a": [3], "b": [1]}
        assert removed(allocate(scores, 0.2, Uniform())) == {"a": [3]}

    @pytest.mark.parametrize(("ratio", "gone"), [(0.0, 0), (0.04, 0), (0.05, 1), (0.29, 3), (0.5, 5), (0.94, 9)])
    def test_counts_are_rounded_to_the_nearest(self, ratio: float, gone: int) -> None:
        assert len(allocate({"a": torch.arange(10.0)}, ratio, Uniform())) == gone

    def test_equal_scores_go_from_the_front(self) -> None:
        assert removed(allocate(TIES, 0.5, Uniform())) == {"a": [0, 1], "b": [0, 1, 2], "c": [0, 1, 2, 3, 4]}

    def test_the_ratio_counts_against_the_dense_model(self) -> None:
        scores = {"a": torch.arange(6.0)}
        assert removed(allocate(scores, 0.5, Uniform(), dense={"a": 10})) == {"a": [0]}
        assert removed(allocate(scores, 0.3, Uniform(), dense={"a": 10})) == {}
        assert removed(allocate(scores, 0.8, Uniform(), dense={"a": 10})) == {"a": [0, 1, 2, 3]}


class TestGlobal:
    def test_the_lowest_scores_of_all_go(self) -> None:
        scores = {"a": torch.tensor([3.0, 1.0, 2.0, 0.5]), "b": torch.tensor([9.0, 0.1])}
        assert removed(allocate(scores, 0.5, Global())) == {"a": [1, 3], "b": [1]}
        assert removed(allocate(scores, 2 / 3, Global())) == {"a": [1, 2, 3], "b": [1]}

    def test_equal_scores_go_in_the_order_of_the_groups(self) -> None:
        assert removed(allocate(TIES, 0.25, Global(), Limits(min_channels=1))) == {"a": [0, 1, 2], "b": [0, 1]}

    def test_what_one_group_must_keep_another_gives(self) -> None:
        scores = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        plan = allocate(scores, 0.5, Global())
        assert removed(plan) == {"a": [0], "b": [0, 1]}
        assert plan.held_back == {"a": "keeps 1 channels in place of 0: min_channels=1"}

    def test_channels_that_went_before_count(self) -> None:
        scores = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        assert removed(allocate(scores, 0.5, Global(), dense={"a": 6, "b": 4})) == {"a": [0, 1]}
        assert removed(allocate(scores, 0.2, Global(), dense={"a": 6, "b": 4})) == {}

    def test_groups_that_count_but_cannot_go_are_made_up_for(self) -> None:
        scores = {"b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        assert removed(allocate(scores, 0.25, Global(), dense={"a": 4, "b": 4})) == {"b": [0, 1]}


SCORES = st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=12), min_size=1, max_size=5)
RATIOS = st.floats(0, 0.95)


def named(lists: list[list[float]]) -> dict[str, Tensor]:
    return {f"g{place}": torch.tensor(values) for place, values in enumerate(lists)}


def planned(
    scores: dict[str, Tensor], ratio: float, allocation: Allocation, limits: Limits | None = None
) -> PruningPlan | None:
    """Allocate, or return None where the ratio would leave nothing."""
    try:
        return allocate(scores, ratio, allocation, limits)
    except ValueError:
        return None


class TestInvariants:
    @given(SCORES, RATIOS)
    def test_uniform_counts_are_exact(self, lists: list[list[float]], ratio: float) -> None:
        scores = named(lists)
        plan = planned(scores, ratio, Uniform())
        if plan is None:
            assert all(floor(ratio * len(values) + 0.5) == len(values) for values in scores.values())
            return
        for name, values in scores.items():
            count = min(floor(ratio * len(values) + 0.5), len(values) - 1)
            assert len(plan.removed.get(name, ())) == count
            emptied = floor(ratio * len(values) + 0.5) == len(values)
            assert (name in plan.held_back) == (emptied and len(values) > 1)

    @given(SCORES, RATIOS)
    def test_global_counts_are_exact(self, lists: list[list[float]], ratio: float) -> None:
        scores = named(lists)
        plan, total = planned(scores, ratio, Global()), sum(map(len, lists))
        asked = floor(ratio * total + 0.5)
        if plan is None:
            assert asked == total
        else:
            assert len(plan) == min(asked, total - len(lists))

    @given(
        SCORES,
        RATIOS,
        st.sampled_from([Uniform(), Global(), Uniform(0.5), Global(0.3)]),
        st.integers(1, 4),
        st.sampled_from([None, 2, 4]),
    )
    def test_plans_keep_to_their_limits(
        self, lists: list[list[float]], ratio: float, allocation: Allocation, least: int, multiple: int | None
    ) -> None:
        scores = named(lists)
        plan = planned(scores, ratio, allocation, Limits(least, multiple))
        for name, indices in (plan.removed if plan else {}).items():
            values, width = scores[name], len(scores[name]) - len(indices)
            assert len(indices) > 0
            assert indices.tolist() == sorted(set(indices.tolist()))
            assert width >= least
            assert len(indices) <= allocation.cap * len(values) + 1e-6
            assert multiple is None or width % multiple == 0
            stays = torch.ones(len(values), dtype=torch.bool)
            stays[indices] = False
            assert values[indices].max() <= values[stays].min()

    @given(SCORES, RATIOS, st.sampled_from([Uniform(), Global()]))
    def test_the_same_scores_give_the_same_plan(
        self, lists: list[list[float]], ratio: float, allocation: Allocation
    ) -> None:
        first, second = (planned(named(lists), ratio, allocation) for _ in range(2))
        assert (first and removed(first)) == (second and removed(second))


class TestLimits:
    @pytest.mark.parametrize(("least", "left"), [(1, 2), (2, 2), (3, 3), (8, 8), (50, 10)])
    def test_min_channels(self, least: int, left: int) -> None:
        plan = allocate({"a": torch.arange(10.0)}, 0.8, Uniform(), Limits(min_channels=least))
        assert 10 - len(plan) == left
        expected = {} if left == 2 else {"a": f"keeps {left} channels in place of 2: min_channels={least}"}
        assert plan.held_back == expected

    @pytest.mark.parametrize(
        ("size", "ratio", "multiple", "width"),
        [
            (32, 0.5, 8, 16),
            (32, 0.4, 8, 16),
            (32, 0.3, 8, 24),
            (32, 0.99, 8, 8),
            (10, 0.5, 4, 4),
            (10, 0.4, 4, 8),
            (6, 0.5, 8, 6),
        ],
    )
    def test_round_to(self, size: int, ratio: float, multiple: int, width: int) -> None:
        scores = {"a": torch.arange(float(size)), "large": torch.arange(1000.0)}
        plan = allocate(scores, ratio, Uniform(), Limits(round_to=multiple))
        assert size - len(plan.removed.get("a", ())) == width

    def test_rounding_up_is_reported(self) -> None:
        plan = allocate({"a": torch.arange(32.0)}, 0.4, Uniform(), Limits(round_to=8))
        assert plan.held_back == {}
        plan = allocate({"a": torch.arange(32.0)}, 0.7, Uniform(), Limits(round_to=16))
        assert plan.held_back == {"a": "keeps 16 channels in place of 10: round_to=16"}

    def test_nothing_asked_is_nothing_removed(self) -> None:
        assert len(allocate({"a": torch.arange(10.0)}, 0.0, Uniform(), Limits(round_to=8))) == 0

    @pytest.mark.parametrize(("cap", "gone"), [(1.0, 8), (0.8, 8), (0.5, 5), (0.25, 2), (0.01, 0)])
    @pytest.mark.parametrize("kind", [Uniform, Global])
    def test_cap(self, kind: type[Allocation], cap: float, gone: int) -> None:
        plan = allocate({"a": torch.arange(10.0)}, 0.8, kind(cap))
        assert len(plan) == gone
        expected = {} if gone == 8 else {"a": f"keeps {10 - gone} channels in place of 2: cap={cap}"}
        assert plan.held_back == expected

    def test_all_causes_are_named(self) -> None:
        plan = allocate({"a": torch.arange(10.0), "b": torch.arange(100.0)}, 0.95, Uniform(0.6), Limits(2, 8))
        assert plan.held_back["a"] == "keeps 8 channels in place of 0: min_channels=2, cap=0.6, round_to=8"

    @pytest.mark.parametrize("value", [0, -3])
    def test_limits_below_one_are_errors(self, value: int) -> None:
        with pytest.raises(ValueError, match=rf"`min_channels` is .*1 or more; got {value}"):
            Limits(min_channels=value)
        with pytest.raises(ValueError, match=rf"`round_to` is .*1 or more, .*; got {value}"):
            Limits(round_to=value)

    @pytest.mark.parametrize("cap", [0.0, -0.1, 1.1, float("nan")])
    def test_bad_caps_are_errors(self, cap: float) -> None:
        with pytest.raises(ValueError, match=rf"`cap` is .*in \(0, 1\]; got {cap}"):
            Uniform(cap)


class TestRatios:
    @pytest.mark.parametrize("kind", [Uniform, Global])
    def test_a_ratio_that_leaves_nothing_is_an_error(self, kind: type[Allocation]) -> None:
        with pytest.raises(
            ValueError,
            match=r"`pruning_ratio` 0\.9 would leave no channel in any of the 2 groups \(the largest has 4\)",
        ):
            allocate({"a": torch.arange(4.0), "b": torch.arange(1.0)}, 0.9, kind())

    def test_no_scores_give_no_plan(self) -> None:
        assert len(allocate({}, 0.5, Uniform())) == 0

    @pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, 50, float("nan")])
    def test_ratios_outside_are_errors(self, ratio: float) -> None:
        with pytest.raises(
            ValueError, match=rf"`pruning_ratio` is the fraction of channels to remove, in \[0, 1\); got {ratio}"
        ):
            prune(_net(), torch.zeros(1, 4), pruning_ratio=ratio)

    def test_an_unknown_unit_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"one of 'channels', 'params', 'macs', 'memory', 'latency'; got 'flops'"):
            prune(_net(), torch.zeros(1, 4), pruning_ratio=0.5, of="flops")  # type: ignore[arg-type]

    @pytest.mark.parametrize("of", ["params", "macs"])
    def test_the_smallest_plan_that_reaches_the_ratio(self, of: str) -> None:
        """Linear(4, w) and Linear(w, 3): 8 w + 3 parameters and 7 w multiply-accumulates for w channels."""
        net = _net()
        record = prune(net, torch.zeros(1, 4), pruning_ratio=0.5, of=of)  # type: ignore[arg-type]
        width = {"params": 31, "macs": 32}[of]
        assert net[0].out_features == width
        assert record.reached == pytest.approx({"params": 1 - (8 * 31 + 3) / (8 * 64 + 3), "macs": 0.5}[of])

    @pytest.mark.parametrize("of", ["params", "macs"])
    def test_an_unreachable_ratio_takes_all_there_is_and_says_so(self, of: str) -> None:
        net = nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 100))
        record = prune(net, torch.zeros(1, 4), pruning_ratio=0.95, of=of, min_channels=2)  # type: ignore[arg-type]
        assert net[0].out_features == 2
        assert record.reached < record.asked == 0.95
        assert record.held_back["0"] == "keeps 2 channels in place of 0: min_channels=2"

    @pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6, 0.9])
    @pytest.mark.parametrize("kind", [Uniform, Global])
    def test_ratios_of_parameters_are_reached_whenever_they_can_be(self, ratio: float, kind: type[Allocation]) -> None:
        net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        record = prune(net, torch.zeros(1, 4), pruning_ratio=ratio, of="params", allocation=kind())
        assert ratio <= record.reached < ratio + 0.05


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))


class TestEventCap:
    def test_it_counts_against_what_a_group_still_has(self) -> None:
        scores = {"a": torch.arange(8.0), "b": 10 + torch.arange(8.0)}
        plan = allocate(scores, 0.5, Global(event_cap=0.5))
        assert {name: indices.tolist() for name, indices in plan.removed.items()} == {
            "a": [0, 1, 2, 3],
            "b": [0, 1, 2, 3],
        }
        assert plan.held_back == {"a": "keeps 4 channels in place of 0: min_channels=1, event_cap=0.5"}
        left = {"a": torch.arange(4.0), "b": 10 + torch.arange(4.0)}
        plan = allocate(left, 0.75, Global(event_cap=0.5), dense={"a": 8, "b": 8})
        assert {name: len(indices) for name, indices in plan.removed.items()} == {"a": 2, "b": 2}

    @pytest.mark.parametrize("cap", [0.0, -0.1, 1.5])
    def test_a_cap_out_of_range_is_refused(self, cap: float) -> None:
        with pytest.raises(ValueError, match=rf"`event_cap` is the fraction .* in \(0, 1\]; got {cap}"):
            Global(event_cap=cap)
