"""The cost of a plan: numbers worked out by hand, and at every moment what a recount from scratch gives."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune.cost import Costs, PlannedCost, count_params, planned_macs
from lightning_prune.cost.price import ShapeOf, memory
from lightning_prune.cut import cut_shapes, prepare
from lightning_prune.fate import Fate
from lightning_prune.graph import Graph, read
from lightning_prune.steps import Step
from lightning_prune.tensors import named_tensors
from lightning_prune.types import PruningPlan, Unit

UNITS: tuple[Unit, ...] = ("params", "macs", "memory")


class Residual(nn.Module):
    """A trunk that two blocks add to, read by a third convolution and flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(6, width, 3, padding=1) for width in (4, 5))
        self.outer = nn.ModuleList(nn.Conv2d(width, 6, 1) for width in (4, 5))
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 16, 3)

    def forward(self, images: Tensor) -> Tensor:
        trunk = self.stem(images)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            trunk = trunk + outer(inner(trunk).relu_())
        return self.head(self.norm(trunk).flatten(1))


class Dense(nn.Module):
    """Each layer reads all that were made before it, as in DenseNet; the last one with shuffled halves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * depth, 4, 1) for depth in range(3))
        self.mixed = nn.Conv2d(15, 8, 1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 6, 1, groups=2)
        self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            images = torch.cat([images, layer(images).relu()], 1)
        halves = self.deep(self.mixed(images)).chunk(2, 1)
        return self.head(self.grouped(torch.cat(halves[::-1], 1)).mean((2, 3)))


def _linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))


def _flattened() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 16, 5))


def _attention() -> nn.Module:
    return nn.TransformerEncoderLayer(12, 3, 10, batch_first=True)


NETS: dict[str, tuple[nn.Module, Tensor]] = {
    "residual": (Residual(), torch.zeros(2, 3, 4, 4)),
    "dense": (Dense(), torch.zeros(1, 3, 4, 4)),
    "flattened": (_flattened(), torch.zeros(3, 3, 6, 6)),
    "attention": (_attention(), torch.zeros(2, 5, 12)),
}
GRAPHS = {name: read(net.eval(), inputs) for name, (net, inputs) in NETS.items()}
LARGE = ["resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5"]


def accounts(net: nn.Module, graph: Graph) -> dict[Unit, PlannedCost]:
    costs = Costs(net, graph)
    return {unit: costs.of(unit) for unit in UNITS}


def recounted(net: nn.Module, graph: Graph, gone: Counter[str], unit: Unit) -> float:
    """Count from scratch what is left, whichever channels of a group have gone: here the last ones."""
    sizes = {group.name: group.size for group in graph.groups}
    plan = PruningPlan({name: torch.arange(sizes[name])[-count:] for name, count in gone.items() if count})
    if unit == "params":
        return count_params(net, cut_shapes(named_tensors(net), prepare(net, graph, plan).kept))
    if unit == "macs":
        return planned_macs(graph, plan)
    fate, steps = Fate(graph, plan), next(iter(graph.runs.values())).steps
    return sum(memory(step, fate.shape_left) for step in steps)


def counted(account: PlannedCost, graph: Graph, unit: Unit) -> float:
    return account.total / _batch(graph, unit)


class TestNumbers:
    """Worked out by hand."""

    @pytest.mark.parametrize(
        ("unit", "total", "saving"),
        [("macs", 4 * 10 + 10 * 2, 6), ("params", 50 + 22, 4 + 1 + 2), ("memory", 10 + 10 + 2, 2)],
    )
    def test_two_layers(self, unit: Unit, total: int, saving: int) -> None:
        account = accounts(_linear(), read(_linear(), torch.zeros(1, 4)))[unit]
        assert account.total == total
        assert account.saving("0") == saving
        account.remove("0")
        assert (account.total, account.saving("0"), account.widths["0"]) == (total - saving, saving, 9)

    def test_what_is_written_in_place_and_views_take_no_memory(self) -> None:
        account = accounts(_flattened(), read(_flattened(), torch.zeros(1, 3, 6, 6)))["memory"]
        assert account.total == 8 * 16 + 5
        assert account.saving("0") == 16

    def test_the_batch_counts(self) -> None:
        three = accounts(_linear(), read(_linear(), torch.zeros(3, 4)))
        assert [three[unit].total for unit in UNITS] == [72, 3 * 60, 3 * 22]

    def test_a_channel_that_is_flattened_takes_its_positions_along(self) -> None:
        found = accounts(_flattened(), read(_flattened(), torch.zeros(1, 3, 6, 6)))
        assert found["params"].saving("0") == 3 * 9 + 1 + 16 * 5
        assert found["macs"].saving("0") == 16 * 3 * 9 + 16 * 5

    def test_neighbours_save_less_when_a_channel_has_gone(self) -> None:
        net = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        account = accounts(net, read(net, torch.zeros(1, 6)))["macs"]
        assert (account.saving("0"), account.saving("2")) == (6 + 2, 3 + 1)
        assert set(account.remove("0")) == {"0", "2"}
        assert (account.saving("0"), account.saving("2")) == (6 + 2, 2 + 1)
        account.remove("2")
        assert (account.saving("0"), account.saving("2")) == (6 + 1, 0)


class TestRecounts:
    """Whatever goes in whatever order: exactly what a count from scratch gives."""

    @settings(max_examples=15, deadline=None)
    @given(st.sampled_from(list(NETS)), st.integers(0, 2**32), st.integers(0, 16))
    def test_of_small_nets(self, name: str, seed: int, removals: int) -> None:
        self.compare(NETS[name][0], GRAPHS[name], seed, removals)

    @pytest.mark.parametrize("name", LARGE)
    def test_of_large_nets(self, name: str) -> None:
        models = pytest.importorskip("torchvision.models")
        net = getattr(models, name)(weights=None)
        self.compare(net, read(net, torch.zeros(2, 3, 64, 64)), seed=0, removals=200, looked_at=3)

    @staticmethod
    def compare(net: nn.Module, graph: Graph, seed: int, removals: int, looked_at: int = 100) -> None:
        found, chance, gone = accounts(net, graph), random.Random(seed), Counter[str]()
        free = [group.name for group in graph.groups if not group.frozen]
        for _ in range(removals):
            name = chance.choice(free)
            if found["macs"].widths[name] > 1:
                gone[name] += 1
                for account in found.values():
                    account.remove(name)
        for unit, account in found.items():
            assert counted(account, graph, unit) == recounted(net, graph, gone, unit)
            for name in chance.sample(free, min(looked_at, len(free))):
                if account.widths[name] > 1:
                    after = recounted(net, graph, gone + Counter([name]), unit)
                    assert account.saving(name) == _batch(graph, unit) * (recounted(net, graph, gone, unit) - after)

    @pytest.mark.parametrize("name", list(NETS))
    def test_only_the_groups_that_are_named_change_their_savings(self, name: str) -> None:
        net, graph = NETS[name][0], GRAPHS[name]
        free = [group.name for group in graph.groups if not group.frozen and group.size > 1]
        for one in free:
            for account in accounts(net, graph).values():
                before = {other: account.saving(other) for other in free}
                changed = account.remove(one)
                assert all(account.saving(other) == before[other] for other in free if other not in changed)


def _batch(graph: Graph, unit: Unit) -> int:
    """Return by how much the cost of the run is that of an example, where the recount is of an example."""
    return len(graph.inputs.args[0]) if unit == "macs" else 1


class TestOtherWidths:
    @pytest.mark.parametrize("unit", UNITS)
    def test_narrower_and_back(self, unit: Unit) -> None:
        net, graph = NETS["residual"][0], GRAPHS["residual"]
        account = accounts(net, graph)[unit]
        total, widths = account.total, dict(account.widths)
        narrow = account.at({"stem": 3, "inner.0": 1})
        assert _batch(graph, unit) * recounted(net, graph, Counter({"stem": 3, "inner.0": 3}), unit) == narrow
        assert (account.total, account.widths, account.at({})) == (total, widths, total)

    @pytest.mark.parametrize("unit", UNITS)
    def test_wider_ones_are_those_of_the_model_before_it_was_cut(self, unit: Unit) -> None:
        wide = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 2))
        thin = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
        inputs = torch.zeros(1, 4)
        found = accounts(thin, read(thin, inputs))[unit].at({"0": 9, "2": 7})
        assert found == accounts(wide, read(wide, inputs))[unit].total

    def test_a_name_that_is_no_group_is_an_error(self) -> None:
        account = accounts(*_residual())["macs"]
        with pytest.raises(ValueError, match=r"`widths` names 'stem2', which is no channel group"):
            account.at({"stem2": 3})


def _residual() -> tuple[nn.Module, Graph]:
    return NETS["residual"][0], GRAPHS["residual"]


class TestPrices:
    def test_any_price_will_do(self) -> None:
        """One that looks up, by their origin, the tensors that a step reads, and has steps of its own."""
        net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        graph = read(net, torch.zeros(1, 4))
        steps = next(iter(graph.runs.values())).steps
        labels = graph.labels["2.weight"]

        def price(step: Step, shape_of: ShapeOf) -> float:
            return 0.1 * (shape_of((2, 10), labels)[1] // 4) if step.name == "aten.relu.default" else 0.0

        account = PlannedCost(graph, [lambda shape_of, step=step: price(step, shape_of) for step in steps])
        found = []
        for _ in range(5):
            found.append((account.total, account.saving("0")))
            account.remove("0")
        assert found == [(0.2, 0), (0.2, 0), (0.2, 0.1), (0.1, 0), (0.1, 0)]

    def test_what_would_cost_more_saves_nothing(self) -> None:
        graph = read(_linear(), torch.zeros(1, 4))
        labels = graph.labels["0.weight"]
        account = PlannedCost(graph, [lambda shape_of: -float(shape_of((10, 4), labels)[0])])
        assert account.saving("0") == 0
        account.remove("0")
        assert account.total == -9

    def test_only_what_shares_the_group_is_priced_anew(self) -> None:
        graph = GRAPHS["residual"]
        asked: Counter[int] = Counter()

        def noted(number: int, step: Step) -> Any:
            def share(shape_of: ShapeOf) -> float:
                asked[number] += 1
                return step.work.flops(shape_of) if step.work else 0

            return share

        steps = next(iter(graph.runs.values())).steps
        account = PlannedCost(graph, [noted(number, step) for number, step in enumerate(steps)])
        asked.clear()
        account.remove("inner.1")
        assert [steps[number].name for number in asked] == ["aten.convolution.default"] * 2


class TestErrors:
    def test_the_last_channel_stays_and_saves_nothing(self) -> None:
        net = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2))
        account = accounts(net, read(net, torch.zeros(1, 4)))["macs"]
        assert account.saving("0") == 0
        with pytest.raises(ValueError, match=r"`group` '0' has one channel, which cannot go"):
            account.remove("0")

    @pytest.mark.parametrize("name", ["2", "nowhere"])
    @pytest.mark.parametrize("ask", [PlannedCost.remove, PlannedCost.saving])
    def test_frozen_and_foreign_groups_are_errors(self, ask: Any, name: str) -> None:
        account = accounts(_linear(), read(_linear(), torch.zeros(1, 4)))["macs"]
        with pytest.raises(ValueError, match=rf"`group` is a channel group that is not frozen.*got '{name}'.* has 0"):
            ask(account, name)

    def test_channels_are_no_cost(self) -> None:
        costs = Costs(_linear(), read(_linear(), torch.zeros(1, 4)))
        with pytest.raises(ValueError, match=r"one of 'params', 'macs', 'memory', 'latency'; got 'channels'"):
            costs.of("channels")
