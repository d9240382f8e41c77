"""Allocation by cost: orders worked out by hand, the same as a search from scratch, limits, units, prune events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import inf, nan
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import aiming, history_of, load_pruned, prune, save_pruned
from lightning_prune.allocation import Allocation, ByCost, Global, Limits, allocate
from lightning_prune.cost import Costs, costs, planned_macs
from lightning_prune.cost.price import ShapeOf, memory
from lightning_prune.criteria import BNScale, Criterion, Magnitude, Random
from lightning_prune.cut import Cut
from lightning_prune.graph import read
from lightning_prune.inputs import Inputs
from lightning_prune.pruner import Request, draft_cut
from lightning_prune.steps import Step
from lightning_prune.types import PruneRecord, PruningPlan, Unit

INPUT = torch.zeros(1, 6)
TIME_LEFT = aiming.time_left


def build(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLUs between them, the groups "0", "2", ..."""
    layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


NET = build(6, 3, 2, 1)
SCORES = {"0": torch.tensor([4.0, 2.0, 3.0]), "2": torch.tensor([1.0, 9.0])}
COSTS = Costs(NET, read(NET, INPUT))

WIDE = build(6, 4, 6, 3, 2)
WIDE_GRAPH = read(WIDE, INPUT)
WIDE_COSTS = Costs(WIDE, WIDE_GRAPH)
WIDE_SIZES = {"0": 4, "2": 6, "4": 3}


def order(allocation: Allocation, scores: Mapping[str, Tensor] = SCORES) -> str:
    """Tell which group gives the first channel, the second, ..."""
    dense = {name: len(values) for name, values in scores.items()}
    total, nothing = sum(dense.values()), dict.fromkeys(scores, 0)
    widths = [allocation.widths(scores, dense, count / total, nothing) for count in range(total + 1)]
    return "".join(next(name for name in scores if one[name] > other[name]) for one, other in pairwise(widths))


def given_away(plan: PruningPlan) -> dict[str, int]:
    return {name: len(indices) for name, indices in plan.removed.items()}


class TestOrder:
    """6 * 3 + 3 * 2 + 2 * 1 = 26 MACs; a channel of "0" saves 6 + the width of "2", one of "2" the width of "0" + 1."""

    def test_without_weight_of_the_cost_the_lowest_score_goes(self) -> None:
        assert order(ByCost(0).knowing(COSTS)) == "20002"

    def test_the_loss_less_what_is_saved(self) -> None:
        """2 - 8 < 1 - 4; 3 - 8 < 1 - 3; then a last channel saves nothing: 1 - 2 < 4; 4 < 9."""
        assert order(ByCost(26, scale="raw").knowing(COSTS)) == "00202"

    def test_the_loss_per_saving_and_of_equal_ones_the_smaller_loss(self) -> None:
        """2 / 8 = 1 / 4: the smaller loss goes, then 2 / 7 and 3 / 7 before the last channels, 4 and 9."""
        assert order(ByCost().knowing(COSTS)) == "20002"
        scores = {**SCORES, "2": torch.tensor([1.5, 9.0])}
        assert order(ByCost().knowing(COSTS), scores) == "00202"

    def test_savings_are_those_of_the_moment(self) -> None:
        """1 / 4 < 2.88 / 9; then 1.36 / 4 < 2.88 / 8, though 2.88 / 9 was less."""
        net = build(6, 3, 3, 1)
        known = Costs(net, read(net, INPUT))
        scores = {"0": torch.tensor([2.88, 9.0, 9.0]), "2": torch.tensor([1.0, 1.36, 9.0])}
        assert order(ByCost().knowing(known), scores).startswith("220")

    def test_equal_channels_go_in_the_order_of_the_groups(self) -> None:
        net = build(3, 3, 3, 3)
        scores = {"0": torch.ones(3), "2": torch.ones(3)}
        assert order(ByCost(3).knowing(Costs(net, read(net, torch.zeros(1, 3)))), scores).startswith("0")

    def test_zeros_go_first_wherever_they_are(self) -> None:
        scores = {"0": torch.tensor([1.0, 1.0, 1.0]), "2": torch.tensor([0.0, 9.0])}
        assert order(ByCost().knowing(COSTS), scores).startswith("2")

    @pytest.mark.parametrize("size", [1e-6, 1, 1e6])
    def test_a_beta_in_medians_suits_scores_of_any_size(self, size: float) -> None:
        scores = {name: size * values for name, values in SCORES.items()}
        assert order(ByCost(26 / 3).knowing(COSTS), scores) == order(
            ByCost(26 * size, scale="raw").knowing(COSTS), scores
        )
        assert order(ByCost(26 / 3).knowing(COSTS), scores) == "00202"

    def test_scores_of_0_are_no_part_of_the_median(self) -> None:
        scores = {"0": torch.tensor([2.0, 3.0, 4.0]), "2": torch.tensor([0.0, 0.0])}
        assert order(ByCost(26 / 3).knowing(COSTS), scores) == order(ByCost(26, scale="raw").knowing(COSTS), scores)
        nothing = {name: torch.zeros_like(values) for name, values in scores.items()}
        assert order(ByCost(1).knowing(COSTS), nothing) == "00202"

    @pytest.mark.parametrize(("of", "first"), [("macs", "0"), ("params", "2"), ("memory", "0")])
    def test_what_the_cost_counts(self, of: Unit, first: str) -> None:
        """A convolution on large maps costs MACs and memory, a wide linear layer parameters."""
        net = nn.Sequential(*(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), *build(4, 5, 500))
        known = Costs(net, read(net, torch.zeros(1, 3, 16, 16)))
        scores = {"0": torch.ones(4), "3": torch.ones(5)}
        assert order(ByCost(of=of).knowing(known), scores)[0] == {"0": "0", "2": "3"}[first]


SCORE_LISTS = st.tuples(
    *(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0]), min_size=size, max_size=size)
        for size in WIDE_SIZES.values()
    )
)
RATIOS = st.floats(0, 0.92)


def named(lists: tuple[list[float], ...]) -> dict[str, Tensor]:
    return {name: torch.tensor(values) for name, values in zip(WIDE_SIZES, lists, strict=True)}


def searched(scores: Mapping[str, Tensor], beta: float | None, count: int) -> dict[str, int]:
    """Take `count` channels, each the best of all, with MACs counted from scratch for every candidate."""
    gone = dict.fromkeys(scores, 0)

    def left(**more: int) -> int:
        counts = {name: gone[name] + more.get(f"g{name}", 0) for name in gone}
        return planned_macs(WIDE_GRAPH, PruningPlan({name: torch.arange(n) for name, n in counts.items() if n}))

    def rank(name: str) -> tuple[float, float]:
        loss = float(scores[name].sort().values[gone[name]])
        last = gone[name] == len(scores[name]) - 1
        saved = 0 if last else (left() - left(**{f"g{name}": 1})) / WIDE_GRAPH.macs
        if beta is None:
            return (loss / saved if saved else inf), loss
        return loss - beta * saved, loss

    for _ in range(count):
        open_ = [name for name in scores if gone[name] < len(scores[name]) - 1]
        gone[min(open_, key=rank)] += 1
    return {name: count for name, count in gone.items() if count}


class TestInvariants:
    @settings(max_examples=40, deadline=None)
    @given(SCORE_LISTS, st.sampled_from([None, 0.0, 1.0, 5.0, 40.0]), st.integers(0, 10))
    def test_the_same_as_a_search_from_scratch(
        self, lists: tuple[list[float], ...], beta: float | None, count: int
    ) -> None:
        scores, allocation = named(lists), ByCost(beta, scale="raw").knowing(WIDE_COSTS)
        plan = allocate(scores, count / sum(WIDE_SIZES.values()), allocation)
        assert given_away(plan) == searched(scores, beta, count)

    @given(SCORE_LISTS, RATIOS, st.integers(1, 3), st.floats(0.3, 1))
    def test_without_beta_it_is_global(
        self, lists: tuple[list[float], ...], ratio: float, least: int, cap: float
    ) -> None:
        scores, limits = named(lists), Limits(least)
        one = allocate(scores, ratio, Global(cap), limits)
        other = allocate(scores, ratio, ByCost(0, cap=cap).knowing(WIDE_COSTS), limits)
        assert {name: indices.tolist() for name, indices in one.removed.items()} == {
            name: indices.tolist() for name, indices in other.removed.items()
        }
        assert one.held_back == other.held_back

    @given(
        SCORE_LISTS,
        RATIOS,
        st.sampled_from([ByCost(), ByCost(20.0), ByCost(cap=0.5), ByCost(3.0, event_cap=0.4)]),
        st.integers(1, 4),
        st.sampled_from([None, 2, 3]),
    )
    def test_plans_keep_to_their_limits(
        self, lists: tuple[list[float], ...], ratio: float, allocation: ByCost, least: int, multiple: int | None
    ) -> None:
        scores = named(lists)
        plan = allocate(scores, ratio, allocation.knowing(WIDE_COSTS), Limits(least, multiple))
        for name, gone in given_away(plan).items():
            width = len(scores[name]) - gone
            assert width >= least
            assert width % (multiple or 1) == 0
            assert gone <= min(allocation.cap, allocation.event_cap) * len(scores[name]) + 1e-6

    @given(SCORE_LISTS, RATIOS, st.sampled_from([ByCost(), ByCost(20.0)]))
    def test_exactly_so_many_go(self, lists: tuple[list[float], ...], ratio: float, allocation: ByCost) -> None:
        plan = allocate(named(lists), ratio, allocation.knowing(WIDE_COSTS))
        assert len(plan) == min(int(ratio * 13 + 0.5), 10)

    def test_what_holds_back_is_told(self) -> None:
        scores = {"0": torch.arange(4.0), "2": 10 + torch.arange(6.0), "4": 20 + torch.arange(3.0)}
        plan = allocate(scores, 0.7, ByCost(0, cap=0.5).knowing(WIDE_COSTS), Limits(min_channels=2))
        assert plan.held_back["0"] == "keeps 2 channels in place of 0: min_channels=2"
        assert plan.held_back["2"] == "keeps 3 channels in place of 1: min_channels=2, cap=0.5"

    def test_channels_that_went_before_count(self) -> None:
        plan = allocate(SCORES, 0.5, ByCost().knowing(COSTS), dense={"0": 6, "2": 4})
        assert len(plan) == 0
        assert len(allocate(SCORES, 0.6, ByCost().knowing(COSTS), dense={"0": 6, "2": 4})) == 1

    def test_savings_are_fractions_of_the_dense_cost(self) -> None:
        """2 - 10 * 8 / 26 < 1 - 10 * 4 / 26, but of the 6 * 6 + 6 * 2 + 2 = 50 that there were it is the other way."""
        allocation = ByCost(10, scale="raw").knowing(COSTS)
        assert given_away(allocate(SCORES, 0.2, allocation)) == {"0": 1}
        assert given_away(allocate(SCORES, 0.5, allocation, dense={"0": 6, "2": 2})) == {"2": 1}


class TestArguments:
    @pytest.mark.parametrize("beta", [-0.1, nan, inf, -inf])
    def test_bad_betas(self, beta: float) -> None:
        with pytest.raises(ValueError, match=rf"`beta` is .*0 or more; got {beta}. None needs no choice"):
            ByCost(beta)

    def test_bad_names(self) -> None:
        with pytest.raises(ValueError, match=r"`of` is .*'macs', 'memory', 'latency'; got 'channels'.*Global\(\)"):
            ByCost(of="channels")
        with pytest.raises(ValueError, match=r"`scale` is .*'raw' or 'median'; got 'mean'"):
            ByCost(scale="mean")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"`cap` is .*in \(0, 1\]; got 0"):
            ByCost(cap=0)

    def test_costs_must_be_known(self) -> None:
        with pytest.raises(ValueError, match=r"ByCost does not know what channels cost. Say `allocation\.knowing"):
            allocate(SCORES, 0.5, ByCost())

    def test_what_is_told_of_a_model_stays_out_of_the_rule(self) -> None:
        rule = ByCost(2.0, cap=0.5)
        assert rule.knowing(COSTS) is not rule
        assert repr(rule) == repr(rule.knowing(COSTS)) == "ByCost(beta=2.0, of='macs', scale='median', cap=0.5)"
        assert repr(ByCost()) == "ByCost(beta=None, of='macs', scale='median')"
        with pytest.raises(ValueError, match="does not know"):
            allocate(SCORES, 0.5, rule)

    def test_other_rules_do_not_ask(self) -> None:
        assert Global().knowing(COSTS).widths(SCORES, {"0": 3, "2": 2}, 0.4, {"0": 0, "2": 0}) == {"0": 2, "2": 1}


def convolutions() -> nn.Sequential:
    """A layer on large maps, and one on small maps: the first's channels cost 16 times as many MACs."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(4)),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(16, 10),
    )


IMAGES = torch.zeros(1, 3, 32, 32)


def widths(record: PruneRecord) -> list[int]:
    return [record.channels[name].after for name in ("0", "4")]


class TestPrune:
    @pytest.mark.parametrize("criterion", [Magnitude(), BNScale(), Random(3)])
    @pytest.mark.parametrize("beta", [None, 30.0])
    def test_what_is_expensive_becomes_thin(self, criterion: Criterion, beta: float | None) -> None:
        torch.manual_seed(0)
        by_cost = prune(
            convolutions(), IMAGES, pruning_ratio=0.5, of="macs", criterion=criterion, allocation=ByCost(beta)
        )
        assert 0.5 <= by_cost.reached < 0.57  # a channel of the first layer is 6 % of all
        first, second = widths(by_cost)
        assert first < second

    @pytest.mark.parametrize("of", ["channels", "params", "macs", "memory"])
    def test_every_unit_is_reached_and_no_more_than_needed(self, of: Unit) -> None:
        record = prune(convolutions(), IMAGES, pruning_ratio=0.5, of=of, allocation=ByCost())
        assert 0.5 <= record.reached < 0.58
        assert record.of == of

    def test_the_order_is_worked_out_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Unit] = []
        original = Costs.of
        monkeypatch.setattr(Costs, "of", lambda self, unit: asked.append(unit) or original(self, unit))
        prune(convolutions(), IMAGES, pruning_ratio=0.5, of="params", allocation=ByCost(of="memory"))
        assert asked == ["memory"]

    def test_the_dense_model_counts_in_several_events(self) -> None:
        net = convolutions()
        first = prune(net, IMAGES, pruning_ratio=0.3, of="macs", allocation=ByCost())
        second = prune(net, IMAGES, pruning_ratio=0.6, of="macs", allocation=ByCost())
        assert 0.3 <= first.reached < 0.36
        assert 0.6 <= second.reached < 0.66

    def test_limits_reach_it(self) -> None:
        net = convolutions()
        record = prune(
            net, IMAGES, pruning_ratio=0.5, of="macs", allocation=ByCost(cap=0.5), min_channels=4, round_to=4
        )
        assert [width % 4 for width in widths(record)] == [0, 0]
        assert min(widths(record)) >= 8


def activations(net: nn.Module) -> float:
    """Count the elements that a forward pass makes, by a reading of the network as it is."""
    return sum(memory(step, lambda shape, _: shape) for step in next(iter(read(net, IMAGES).runs.values())).steps)


class TestMemory:
    def test_it_is_that_of_the_network_that_is_left(self) -> None:
        net = convolutions()
        dense = activations(net)
        for ratio in (0.3, 0.6):
            record = prune(net, IMAGES, pruning_ratio=ratio, of="memory")
            assert record.reached == pytest.approx(1 - activations(net) / dense, abs=1e-12)
            assert record.reached >= ratio

    def test_records_travel(self, tmp_path: Any) -> None:
        net = convolutions()
        record = prune(net, IMAGES, pruning_ratio=0.5, of="memory")
        save_pruned(net, tmp_path / "net.pt")
        assert history_of(load_pruned(convolutions(), tmp_path / "net.pt")) == (record,)
        assert str(record).startswith("asked 50.0% of memory, reached 5")

    def test_what_cannot_be_reached_is_told(self) -> None:
        record = prune(convolutions(), IMAGES, pruning_ratio=0.9, of="memory", min_channels=8)
        assert record.reached < 0.6
        assert "min_channels=8" in record.held_back["0"]


def clock(slope: float) -> Callable[[nn.Module, Cut, Inputs], float]:
    """A clock by which a layer takes 1 ms and so much more for each of the channels that it makes."""

    def time_left(model: nn.Module, cut: Cut, inputs: Inputs) -> float:
        weights = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
        made = {name: layer.out_channels for name, layer in weights.items()}
        left = {name: len(cut.kept.get(name, {}).get(0, range(count))) for name, count in made.items()}
        return (2 + slope * sum(left.values())) / (2 + slope * sum(made.values()))

    return time_left


class TestLatency:
    @pytest.fixture(autouse=True)
    def _slow_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A layer takes 1 ms and a hundredth more for each of the channels that it makes."""

        def price(step: Step, shape_of: ShapeOf) -> float:
            return 1 + 0.01 * shape_of(*step.outputs[0])[1] if step.name == "aten.convolution.default" else 0.0

        monkeypatch.setattr(costs, "LatencyPrice", lambda graph, model: price)
        monkeypatch.setattr(aiming, "time_left", clock(0.01))

    def test_what_is_reached_is_what_is_measured(self) -> None:
        record = prune(convolutions(), IMAGES, pruning_ratio=0.1, of="latency")
        first, second = widths(record)
        assert record.reached == pytest.approx(1 - (2 + 0.01 * (first + second)) / 2.32)
        assert first + second == 32 - 24  # 0.232 ms are 23.2 channels

    def test_the_dense_model_is_predicted_anew(self) -> None:
        net = convolutions()
        prune(net, IMAGES, pruning_ratio=0.5)
        record = prune(net, IMAGES, pruning_ratio=0.1, of="latency")
        assert record.reached == pytest.approx(1 - (2 + 0.01 * sum(widths(record))) / 2.32)

    def test_more_than_there_is_to_gain(self) -> None:
        record = prune(convolutions(), IMAGES, pruning_ratio=0.5, of="latency")
        assert widths(record) == [1, 1]
        assert record.reached == pytest.approx(1 - 2.02 / 2.32)

    @pytest.mark.parametrize("slope", [0.005, 0.03, 0.2])
    def test_what_is_asked_is_measured(self, slope: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """The prediction is wrong by far; the network that is left is put on the clock."""
        monkeypatch.setattr(aiming, "time_left", clock(slope))
        asked = 0.5 * (1 - 2 / (2 + slope * 32))
        net = convolutions()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        draft = draft_cut(net, IMAGES, Request(asked, of="latency"))
        assert draft.record.reached == pytest.approx(asked, abs=0.03)
        assert 1 - (2 + slope * sum(widths(draft.record))) / (2 + slope * 32) == pytest.approx(draft.record.reached)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    def test_what_cannot_be_timed_is_predicted(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(model: nn.Module, cut: Cut, inputs: Inputs) -> float:
            raise RuntimeError("no clock")

        monkeypatch.setattr(aiming, "time_left", broken)
        record = prune(convolutions(), IMAGES, pruning_ratio=0.1, of="latency")
        assert record.reached == pytest.approx(1 - (2 + 0.01 * sum(widths(record))) / 2.32)
        assert "cannot be timed (no clock)" in caplog.text

    def test_the_clock_is_that_of_the_network_after_the_cut(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 1500), nn.ReLU(), nn.Linear(1500, 64)).train()
        cut = draft_cut(net, torch.zeros(256, 64), Request(0.9)).cut
        assert TIME_LEFT(net, cut, Inputs((torch.zeros(256, 64),))) < 0.6
        assert net.training
        assert net[0].out_features == 1500

    def test_allocation_by_latency(self) -> None:
        record = prune(convolutions(), IMAGES, pruning_ratio=0.05, of="latency", allocation=ByCost(of="latency"))
        assert record.reached >= 0.05


def test_widths_that_the_machine_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.cost.costs.preferred_multiple", lambda price: 8)
    net = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 2, 3))
    record = prune(net, torch.zeros(1, 1, 8, 8), pruning_ratio=0.4, round_to="auto")
    assert [change.after for change in record.channels.values()][:2] == [16, 16]
    with pytest.raises(ValueError, match=r"`round_to` is the multiple.*or \"auto\"; got 'eight'"):
        prune(net, torch.zeros(1, 1, 8, 8), pruning_ratio=0.4, round_to="eight")  # type: ignore[arg-type]
