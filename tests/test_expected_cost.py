"""The expected cost: numbers worked out by hand, counts of cut models, means over drawn gates, and gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import product
from math import comb
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.cost import Costs, ExpectedCost, count_params
from lightning_prune.cost.price import ShapeOf
from lightning_prune.graph import Graph, read
from lightning_prune.surgery import remove
from lightning_prune.types import PruningPlan, Unit

UNITS: tuple[Unit, ...] = ("channels", "params", "macs", "memory")


class Residual(nn.Module):
    """A trunk that a convolution reads and adds to, then a depthwise and a grouped one, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inside = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.wide = nn.Conv2d(6, 8, 1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 4, 1, groups=2)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, images: Tensor) -> Tensor:
        trunk = self.stem(images)
        trunk = self.norm(trunk + self.inside(trunk.relu()))
        return self.head(self.grouped(self.deep(self.wide(trunk)).relu()).flatten(1))


class Dense(nn.Module):
    """Each layer reads all that were made before it, as in DenseNet."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * at, 4, 1) for at in range(depth))
        self.head = nn.Linear(3 + 4 * depth, 2)

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            images = torch.cat([images, layer(images).relu()], 1)
        return self.head(images.mean((2, 3)))


class Block(nn.Module):
    """Attention of heads of width 4, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.queries, self.keys, self.values = (nn.Linear(12, 12) for _ in range(3))
        self.out = nn.Linear(12, 12)
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, trunk: Tensor) -> Tensor:
        normed = self.norms[0](trunk)
        heads = [part(normed).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.queries, self.keys, self.values)]
        seen = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        trunk = trunk + self.out(seen)
        return trunk + self.down(self.up(self.norms[1](trunk)).relu())


class Transformer(nn.Sequential):
    """A trunk that heads and hidden layers read and add to."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 12), Block(), Block(), nn.Linear(12, 3))


class Trunk(nn.Module):
    """A trunk of two channels that a 2 x 2 weight maps onto itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(1, 2, bias=False)
        self.inside = nn.Linear(2, 2, bias=False)
        self.head = nn.Linear(2, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        trunk = self.stem(inputs)
        return self.head(trunk + self.inside(trunk).relu())


def _deep(depth: int) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(5, 5), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*layers, nn.Linear(5, 2))


NETS: dict[str, tuple[nn.Module, Tensor]] = {
    "mlp": (nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)), torch.zeros(2, 5)),
    "residual": (Residual(), torch.zeros(2, 3, 4, 4)),
    "dense": (Dense(), torch.zeros(1, 3, 4, 4)),
    "transformer": (Transformer(), torch.zeros(2, 5, 4)),
    "trunk": (Trunk(), torch.zeros(1, 1)),
}
GRAPHS = {name: read(net.eval(), inputs) for name, (net, inputs) in NETS.items()}


def free(graph: Graph) -> list[str]:
    return [group.name for group in graph.groups if not group.frozen]


def expected(name: str, unit: Unit) -> ExpectedCost:
    return Costs(NETS[name][0], GRAPHS[name]).expected(unit, free(GRAPHS[name]))


def uniform(cost: ExpectedCost, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return [torch.rand(size, generator=chance, dtype=dtype) for size in cost.groups.values()]


def widths(cost: ExpectedCost, gates: list[Tensor]) -> dict[str, int]:
    return {name: int(gate.sum()) for name, gate in zip(cost.groups, gates, strict=True)}


def counter(net: nn.Module, graph: Graph, unit: Unit) -> Callable[[dict[str, int]], float]:
    """Return what counts the cost at widths, without expectations."""
    if unit == "channels":
        return lambda now: sum(now.values())
    return Costs(net, graph).of(unit).at


def some_gates(cost: ExpectedCost, seed: int) -> list[Tensor]:
    """Draw gates of 0 and 1, one of each group open."""
    gates = [(chance < 0.6).float() for chance in uniform(cost, seed)]
    for gate in gates:
        gate[seed % len(gate)] = 1
    return gates


class TestNumbers:
    """Worked out by hand."""

    @pytest.mark.parametrize(
        ("unit", "dense", "quarter"),
        [("channels", 10, 2.5), ("params", 72, 50 / 4 + 20 / 4 + 2), ("macs", 60, 15), ("memory", 22, 20 / 4 + 2)],
    )
    def test_two_layers(self, unit: Unit, dense: int, quarter: float) -> None:
        net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        cost = Costs(net, read(net, torch.zeros(1, 4))).expected(unit, ["0"])
        assert (cost.dense, cost.groups) == (dense, {"0": 10})
        assert cost([torch.full((10,), 0.25)]).item() == quarter

    def test_two_neighbours(self) -> None:
        net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False), nn.Linear(2, 1))
        cost = Costs(net, read(net, torch.zeros(1, 4))).expected("params", ["0", "2"])
        first, second = torch.tensor([1, 0.5, 0.25]), torch.tensor([0.5, 0.75])
        assert cost([first, second]).item() == 4 * 1.75 + 1.75 * 1.25 + 1.25 + 1

    def test_a_channel_on_both_sides_of_a_weight_counts_squared(self) -> None:
        """Of 0, 1, 1 and 2 channels 0, 1, 1 and 4 weights stay: 1.5 on average; the mean width squared is 1."""
        cost = expected("trunk", "params")
        assert cost.groups == {"stem": 2}
        assert cost([torch.full((2,), 0.5)]).item() == 1 + 1.5 + 1

    def test_a_flattened_channel_takes_its_positions_along(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
        cost = Costs(net, read(net, torch.zeros(1, 3, 6, 6))).expected("params", ["0"])
        assert cost([torch.full((8,), 0.5)]).item() == 4 * (27 + 1 + 16 * 5) + 5

    def test_groups_that_are_not_named_keep_their_widths(self) -> None:
        net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False), nn.Linear(2, 1))
        costs = Costs(net, read(net, torch.zeros(1, 4)))
        assert costs.expected("params", ["2"])([torch.full((2,), 0.5)]).item() == 12 + 3 + 1 + 1
        assert costs.expected("channels", ["2"])([torch.full((2,), 0.5)]).item() == 3 + 1

    def test_the_order_of_the_groups_is_that_of_the_argument(self) -> None:
        net = NETS["mlp"][0]
        costs = Costs(net, GRAPHS["mlp"])
        one, other = costs.expected("macs", ["0", "2"]), costs.expected("macs", ["2", "0"])
        first, second = uniform(one)
        assert list(other.groups) == ["2", "0"]
        assert other([second, first]).item() == pytest.approx(one([first, second]).item())

    @pytest.mark.parametrize("power", [1, 2, 3, 4])
    def test_powers_are_exact(self, power: int) -> None:
        """All 2^4 gates."""
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        graph = read(net, torch.zeros(1, 3))
        labels = graph.labels["2.weight"]
        cost = ExpectedCost(graph, [lambda shape_of: 3.0 * shape_of((1, 4), labels)[1] ** power + 7], ["0"])
        chance = torch.tensor([0.1, 0.9, 0.3, 0.6], dtype=torch.float64)
        mean = 0.0
        for gates in product((0, 1), repeat=4):
            open_ = torch.tensor(gates, dtype=torch.bool)
            mean += torch.where(open_, chance, 1 - chance).prod().item() * (3 * sum(gates) ** power + 7)
        assert cost([chance]).item() == pytest.approx(mean, rel=1e-12)

    def test_a_product_of_shared_and_other_sizes_is_exact(self) -> None:
        """Two groups, each twice: binomial widths, with all their moments known."""
        graph = GRAPHS["mlp"]
        first, second = graph.labels["2.weight"][1], graph.labels["4.weight"][1]

        def share(shape_of: ShapeOf) -> float:
            wide, thin = shape_of((7, 6), (first, second))
            return float(wide**2 * thin**2 + wide * thin)

        def moment(size: int, chance: float, power: int) -> float:
            return sum(comb(size, n) * chance**n * (1 - chance) ** (size - n) * n**power for n in range(size + 1))

        cost = ExpectedCost(graph, [share], ["0", "2"])
        wide, thin = ([moment(size, chance, power) for power in (1, 2)] for size, chance in ((7, 0.2), (6, 0.7)))
        found = cost([torch.full((7,), 0.2, dtype=torch.float64), torch.full((6,), 0.7, dtype=torch.float64)])
        assert found.item() == pytest.approx(wide[1] * thin[1] + wide[0] * thin[0], rel=1e-12)


class TestCertainty:
    """With probabilities 0 and 1 it is the cost of the network without the channels."""

    @settings(max_examples=40, deadline=None)
    @given(st.sampled_from(list(NETS)), st.sampled_from(UNITS), st.integers(0, 2**32))
    def test_it_is_the_planned_cost(self, name: str, unit: Unit, seed: int) -> None:
        cost = expected(name, unit)
        gates = some_gates(cost, seed)
        count = counter(NETS[name][0], GRAPHS[name], unit)
        assert cost(gates).item() == pytest.approx(count(widths(cost, gates)), rel=1e-6)
        assert cost([torch.ones_like(gate) for gate in gates]).item() == pytest.approx(cost.dense, rel=1e-6)

    @pytest.mark.parametrize("name", list(NETS))
    @pytest.mark.parametrize("unit", ["params", "macs"])
    def test_it_is_the_count_of_the_cut_model(self, name: str, unit: Unit) -> None:
        self.compare(*NETS[name], GRAPHS[name], unit)

    @pytest.mark.parametrize("unit", ["params", "macs"])
    def test_of_a_resnet(self, unit: Unit) -> None:
        net = pytest.importorskip("torchvision.models").resnet18(weights=None).eval()
        inputs = torch.zeros(2, 3, 64, 64)
        self.compare(net, inputs, read(net, inputs), unit)

    @staticmethod
    def compare(net: nn.Module, inputs: Tensor, graph: Graph, unit: Unit) -> None:
        cost = Costs(net, graph).expected(unit, free(graph))
        gates, cut = some_gates(cost, seed=4), copy.deepcopy(net)
        gone = {name: (gate == 0).nonzero()[:, 0] for name, gate in zip(cost.groups, gates, strict=True)}
        remove(cut, graph, PruningPlan({name: indices for name, indices in gone.items() if len(indices)}))
        left = count_params(cut) if unit == "params" else read(cut, inputs).macs
        assert left < cost.dense
        assert cost(gates).item() == pytest.approx(left, rel=1e-6)

    @pytest.mark.parametrize("unit", UNITS)
    def test_a_group_can_lose_all_channels(self, unit: Unit) -> None:
        cost = expected("residual", unit)
        gates = [torch.zeros(size) for size in cost.groups.values()]
        assert cost(gates).item() == counter(*_net("residual"), unit)(widths(cost, gates))


def _net(name: str) -> tuple[nn.Module, Graph]:
    return NETS[name][0], GRAPHS[name]


class TestChance:
    @pytest.mark.parametrize("name", list(NETS))
    @pytest.mark.parametrize("unit", ["params", "macs", "memory"])
    def test_it_is_the_mean_over_draws(self, name: str, unit: Unit) -> None:
        self.compare(*_net(name), unit, draws=1000)

    def test_of_a_resnet(self) -> None:
        net = pytest.importorskip("torchvision.models").resnet18(weights=None).eval()
        self.compare(net, read(net, torch.zeros(2, 3, 64, 64)), "params", draws=400)

    @staticmethod
    def compare(net: nn.Module, graph: Graph, unit: Unit, draws: int) -> None:
        cost = Costs(net, graph).expected(unit, free(graph))
        chances, count = uniform(cost, seed=2), counter(net, graph, unit)
        generator = torch.Generator().manual_seed(3)
        drawn = [torch.bernoulli(chance.expand(draws, -1), generator=generator).sum(1).tolist() for chance in chances]
        found = torch.tensor(
            [count(dict(zip(cost.groups, map(int, now), strict=True))) for now in zip(*drawn, strict=True)]
        )
        assert abs(found.mean() - cost(chances)) < 4 * found.std() / draws**0.5

    @pytest.mark.parametrize(("name", "missing"), [("residual", 6 * 9 / 4), ("trunk", 2 / 4)])
    def test_mean_widths_alone_would_be_wrong(self, name: str, missing: float) -> None:
        """Where a trunk maps onto itself, by the kernel's size * p (1 - p) for each channel, here with p = 0.5."""
        cost = expected(name, "params")
        half = [torch.full((size,), 0.5, dtype=torch.float64) for size in cost.groups.values()]
        at_means = counter(*_net(name), "params")({group: size // 2 for group, size in cost.groups.items()})
        assert cost(half).item() == pytest.approx(at_means + missing, rel=1e-12)


class TestGradients:
    @pytest.mark.parametrize("name", list(NETS))
    @pytest.mark.parametrize("unit", UNITS)
    def test_against_finite_differences(self, name: str, unit: Unit) -> None:
        cost = expected(name, unit)
        chances = [chance.requires_grad_() for chance in uniform(cost)]
        assert torch.autograd.gradcheck(lambda *given: cost(given) / cost.dense, chances)

    def test_where_gates_are_shut(self) -> None:
        """A channel of an empty neighbour still costs its own weights: 4 inputs and no outputs."""
        net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False), nn.Linear(2, 1))
        cost = Costs(net, read(net, torch.zeros(1, 4))).expected("params", ["0", "2"])
        first, second = torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)
        cost([first, second]).backward()
        assert first.grad is not None
        assert second.grad is not None
        assert (first.grad.tolist(), second.grad.tolist()) == ([4.0] * 3, [1.0] * 2)

    def test_second_derivatives(self) -> None:
        cost = expected("residual", "macs")
        chances = [chance.requires_grad_() for chance in uniform(cost)]
        assert torch.autograd.gradgradcheck(lambda *given: cost(given) / cost.dense, chances)


class Kernels(TorchDispatchMode):
    """Counts the operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func.name() in ("aten::view", "aten::detach", "aten::_unsafe_view"))
        return func(*args, **(kwargs or {}))


def kernels(net: nn.Module, inputs: Tensor, unit: Unit) -> tuple[int, int]:
    """Count those of the second call, and of its backward."""
    graph = read(net, inputs)
    cost = Costs(net, graph).expected(unit, free(graph))
    logits = [torch.zeros(size, requires_grad=True) for size in cost.groups.values()]
    cost(logits)
    chance = torch.cat([one.sigmoid() for one in logits]).split(list(cost.groups.values()))
    with Kernels() as forward:
        found = cost(chance)
    with Kernels() as backward:
        torch.autograd.grad(found, chance)
    return forward.count, backward.count


class TestSpeed:
    @pytest.mark.parametrize("unit", UNITS)
    def test_the_kernels_do_not_become_more_with_depth(self, unit: Unit) -> None:
        shallow, deep = (kernels(_deep(depth), torch.zeros(1, 5), unit) for depth in (2, 12))
        assert shallow == deep
        assert shallow[0] <= 15
        assert shallow[1] <= 20

    @pytest.mark.parametrize("name", list(NETS))
    def test_they_are_few(self, name: str) -> None:
        forward, backward = kernels(*NETS[name], "macs")
        assert forward <= 15
        assert backward <= 20

    def test_nothing_is_copied_to_the_host(self) -> None:
        """Tensors without memory have nothing to copy."""
        cost = expected("residual", "macs")
        chances = [torch.empty(size, device="meta", requires_grad=True) for size in cost.groups.values()]
        found = cost(chances)
        found.backward()
        assert (found.device.type, found.shape) == ("meta", ())
        assert all(chance.grad is not None and chance.grad.device.type == "meta" for chance in chances)


class TestNumerics:
    def test_float32_keeps_the_counts(self) -> None:
        net = pytest.importorskip("torchvision.models").resnet18(weights=None).eval()
        graph = read(net, torch.zeros(64, 3, 224, 224))
        cost = Costs(net, graph).expected("macs", free(graph))
        single, double = (cost(uniform(cost, dtype=dtype)) for dtype in (torch.float32, torch.float64))
        exact = cost([chance.double() for chance in uniform(cost, dtype=torch.float32)])
        assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
        assert single.item() == pytest.approx(exact.item(), rel=2e-6)
        assert cost([torch.ones(size) for size in cost.groups.values()]).item() == pytest.approx(cost.dense, rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_halves_are_computed_in_float32(self, dtype: torch.dtype) -> None:
        cost = expected("residual", "macs")
        halves = [chance.to(dtype).requires_grad_() for chance in uniform(cost)]
        found = cost(halves)
        found.backward()
        assert found.dtype is torch.float32
        assert found.item() == pytest.approx(cost([half.detach().double() for half in halves]).item(), rel=1e-5)
        assert all(half.grad is not None and half.grad.dtype is dtype for half in halves)

    def test_autocast_changes_nothing(self) -> None:
        cost = expected("residual", "macs")
        chances = uniform(cost, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found = cost(chances)
        assert torch.equal(found, cost(chances))


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda cost: pickle.loads(pickle.dumps(cost))])
    def test_a_copy_says_the_same(self, copied: Callable[[ExpectedCost], ExpectedCost]) -> None:
        cost = expected("residual", "macs")
        chances = uniform(cost)
        before = cost(chances)
        twin = copied(cost)
        assert torch.equal(twin(chances), before)
        assert (twin.groups, twin.dense) == (cost.groups, cost.dense)

    def test_a_first_call_in_inference_mode_does_no_harm(self) -> None:
        with torch.inference_mode():
            cost = expected("residual", "macs")
            cost(uniform(cost, dtype=torch.float32))
        chances = [chance.requires_grad_() for chance in uniform(cost, dtype=torch.float32)]
        cost(chances).backward()
        assert all(chance.grad is not None and chance.grad.gt(0).all() for chance in chances)


class TestErrors:
    @pytest.mark.parametrize("unit", ["latency", "flops"])
    def test_a_unit_that_is_no_polynomial(self, unit: Any) -> None:
        with pytest.raises(ValueError, match=rf"`unit` is .* 'memory'; got '{unit}'.*take \"macs\""):
            expected("mlp", unit)

    @pytest.mark.parametrize(
        ("groups", "got"),
        [(["0", "4"], "'4'"), (["nowhere"], "'nowhere'"), ([], r"\[\]"), (["0", "0"], r"\['0', '0'\]")],
    )
    def test_frozen_and_foreign_groups(self, groups: list[str], got: str) -> None:
        with pytest.raises(ValueError, match=rf"`groups` names channel groups.*got {got}. The model has 0, 2"):
            Costs(*_net("mlp")).expected("macs", groups)

    def test_a_single_string(self) -> None:
        with pytest.raises(TypeError, match="got the string '0': put it in a list"):
            Costs(*_net("mlp")).expected("macs", "0")

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ((7,), "one tensor for each of 2 groups, 0, 2; got 1"),
            ((7, 5), r"of group '2' is .* \(6,\).* of shape \(5,\)"),
        ],
    )
    def test_probabilities_of_other_sizes(self, sizes: tuple[int, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            expected("mlp", "macs")([torch.ones(size) for size in sizes])

    def test_probabilities_that_are_whole_numbers(self) -> None:
        with pytest.raises(ValueError, match=r"'0' is a floating point tensor.*got torch.int64"):
            expected("mlp", "macs")([torch.ones(7, dtype=torch.int64), torch.ones(6)])

    @pytest.mark.parametrize("price", [lambda n: n // 4, lambda n: 2.0**n, lambda n: n**5])
    def test_a_cost_that_is_no_polynomial(self, price: Callable[[int], float]) -> None:
        graph = GRAPHS["mlp"]
        labels = graph.labels["2.weight"]
        with pytest.raises(ValueError, match=r"the one of a part that depends on 0 is none. Leave these out"):
            ExpectedCost(graph, [lambda shape_of: price(shape_of((6, 7), labels)[1])], ["0"])
