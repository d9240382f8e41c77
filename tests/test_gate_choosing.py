"""Which gates a network gets, and their expected cost against a count of what each state of the gates leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product

import pytest
import torch
from difficult_layers import CLASSES, conv, tied
from gated_networks import set_all
from proof import Net, randomise
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_prune.callbacks.gate_costs import dense_cost
from lightning_prune.gates import Choice, ExpectedL0, GateGranularity, choose, decay_gradients
from lightning_prune.graph import Graph, ignored_tensors, read
from lightning_prune.layers import Bernoulli, Gate, HardConcrete
from lightning_prune.layers.gated import input_dim, spread, weight_name
from lightning_prune.layers.gates import Gates
from lightning_prune.tensors import named_modules

CHANNELS: Mapping[str, GateGranularity] = {"*": "channels"}


def perceptron(*widths: int) -> nn.Sequential:
    layers = [each for inner, outer in pairwise(widths) for each in (nn.Linear(inner, outer), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def chosen(
    model: nn.Module, x: Tensor, granularity: Mapping[str, GateGranularity], kind: type[Gate] = HardConcrete
) -> Choice:
    choice = choose(model, read(model, x), granularity, kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for gate in choice.gates.named().values():
            gate.log_alpha.copy_(torch.randn(gate.shape, generator=generator))
    return choice


def test_each_group_has_a_gate_that_its_readers_share() -> None:
    model, x = perceptron(4, 6, 5, 3), torch.zeros(1, 4)
    choice = chosen(model, x, CHANNELS)
    assert {name: gate.shape for name, gate in choice.gates.named().items()} == {"0": (6,), "2": (5,)}
    assert list(choice.gates.read_by()) == ["2", "4"]
    assert all(gate.guarded for gate in choice.gates.named().values())
    assert choice.left == {"4": "frozen: reaches the model's output"}
    assert type(model[2]) is nn.Linear  # the model is not changed


def test_the_first_pattern_that_matches_counts() -> None:
    model, x = perceptron(4, 6, 5, 3), torch.zeros(1, 4)
    patterns: list[tuple[dict[str, GateGranularity], dict[str, tuple[int, ...]]]] = [
        ({"0": "channels"}, {"0": (6,)}),
        ({"[02]": "channels", "*": "channels"}, {"0": (6,), "2": (5,)}),
        ({"*": "inputs"}, {"0:inputs": (4,), "2:inputs": (6,), "4:inputs": (5,)}),
        ({"2": "weights", "0": "inputs"}, {"2:weights": (5, 6), "0:inputs": (4,)}),
        ({"0": "channels", "2": "inputs", "4": "weights"}, {"0": (6,), "2:inputs": (6,), "4:weights": (3, 5)}),
    ]
    for granularity, shapes in patterns:
        choice = chosen(model, x, granularity)
        assert {name: gate.shape for name, gate in choice.gates.named().items()} == shapes
    assert not choice.gates.named()["4:weights"].guarded
    assert choice.gates.named()["2:inputs"].guarded


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        ({"4": "channels"}, r"'4' matches only what cannot be gated \(4: frozen: reaches the model's output\)"),
        ({"conv*": "channels"}, r"'conv\*' matches no channel group; the model has 0, 2, 4"),
        ({"*": "channels", "9": "inputs"}, r"'9' matches no linear layer; the model has 0, 2, 4"),
        ({"1": "weights"}, r"'1' matches no linear layer"),
    ],
)
def test_patterns_that_gate_nothing_are_refused(granularity: dict[str, GateGranularity], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(perceptron(4, 6, 5, 3), torch.zeros(1, 4), granularity)


def test_what_is_ignored_is_left() -> None:
    model, x = perceptron(4, 6, 5, 3), torch.zeros(1, 4)
    ignored = ignored_tensors(model, ["2"])
    graph = read(model, x, ["2"])
    choice = choose(model, graph, {"*": "inputs"}, HardConcrete, ignored=ignored)
    assert choice.gates.named().keys() == {"0:inputs", "4:inputs"}
    with pytest.raises(ValueError, match="2: it is ignored"):
        choose(model, graph, {"2": "weights"}, HardConcrete, ignored=ignored)
    with pytest.raises(ValueError, match="is ignored by the pattern '2'"):
        choose(model, graph, {"0": "channels"}, HardConcrete, ignored=ignored)


def test_readers_whose_weight_is_computed_are_left() -> None:
    model, x = perceptron(4, 6, 5, 3), torch.zeros(1, 4)
    weight_norm(model[2])
    choice = chosen(model, x, CHANNELS)
    assert list(choice.gates.named()) == ["2.parametrizations.weight"]
    assert choice.left["0"] == "the weight of 2, which reads it, is computed"
    with pytest.raises(ValueError, match="2: its weight is computed"):
        chosen(model, x, {"2": "inputs"})


def test_groups_that_nobody_can_watch_are_left() -> None:
    model = Net(
        lambda net, x: net.head(net.rnn(net.a(x))[0]), a=nn.Linear(4, 6), rnn=nn.GRU(6, 5), head=nn.Linear(5, 3)
    )
    with pytest.raises(ValueError, match="a: it is read by something that is no linear, convolutional or attention"):
        chosen(model, torch.zeros(2, 1, 4), {"a": "channels"})


class Linear(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def test_weights_of_an_own_forward_are_not_gated() -> None:
    model, x = nn.Sequential(Linear(4, 6), nn.ReLU(), Linear(6, 3)), torch.zeros(1, 4)
    with pytest.raises(ValueError, match="0: the forward of Linear is its own"):
        chosen(model, x, {"0": "weights"})
    assert chosen(model, x, {"0": "inputs", "*": "channels"}).gates.named().keys() == {"0:inputs", "0"}


def test_shared_weights_have_no_gates_of_one_layer() -> None:
    model, x = tied(8), torch.zeros(1, 3, 5)
    assert model.f.weight is model.g.weight
    for what in ("inputs", "weights"):
        with pytest.raises(ValueError, match="f: it shares its weight with another layer"):
            chosen(model, x, {"f": what})
    assert chosen(model, x, {"a": "inputs", "*": "channels"}).gates.read_by().keys() == {"a", "f", "g", "head"}


def test_weights_cannot_be_gated_for_each_example() -> None:
    model, x = perceptron(4, 6, 3), torch.zeros(1, 4)
    with pytest.raises(ValueError, match="`per_example` gates what each example gives"):
        choose(model, read(model, x), {"2": "weights"}, HardConcrete, per_example=True)
    assert choose(model, read(model, x), {"2": "inputs"}, HardConcrete, per_example=True).gates.per_example


class Trunk(nn.Module):
    """A trunk that a layer reads and makes, and a flatten of two pixels before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y + self.f(y.relu())
        return self.head(y.transpose(1, 2).flatten(1))  # type: ignore[no-any-return]


ENUMERATED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, GateGranularity]]] = {
    "channels": (lambda: perceptron(3, 4, 5, 2), (1, 3), {"*": "channels"}),
    "inputs": (lambda: perceptron(3, 4, 2), (1, 3), {"*": "inputs"}),
    "weights": (lambda: perceptron(2, 3, 2), (1, 2), {"*": "weights"}),
    "inputs between channels": (
        lambda: perceptron(2, 3, 3, 1),
        (1, 2),
        {"0": "channels", "*": "channels", "[2]": "inputs"},
    ),
    "weights between channels": (lambda: perceptron(2, 2, 2, 1), (1, 2), {"[02]": "channels", "2": "weights"}),
    "inputs and weights": (lambda: perceptron(2, 3, 1), (1, 2), {"2": "inputs", "0": "weights"}),
    "all of one layer": (lambda: perceptron(1, 2, 2, 1), (1, 1), {"[02]": "channels", "[2]": "inputs", "2": "weights"}),
    "a trunk": (Trunk, (1, 2, 2), {"a": "channels", "f": "inputs"}),
    "weights on a trunk": (Trunk, (1, 2, 2), {"a": "channels", "f": "weights"}),
    "inputs behind a flatten": (Trunk, (1, 2, 2), {"a": "channels", "head": "inputs"}),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor, Choice]:
    build, shape, granularity = ENUMERATED[name]
    model, x = build(), torch.zeros(shape)
    return model, x, chosen(model, x, granularity)


def left(model: nn.Module, graph: Graph, gates: Gates, state: Mapping[str, Tensor]) -> int:
    """Count the parameters that some state of the gates leaves: those of channels that are there, and of open gates."""
    there = {name: torch.ones_like(tensor) for name, tensor in model.named_parameters()}
    for group in graph.groups:
        for member in group.members if group.name in state else ():
            tensor = there[member.tensor]
            shape = [-1 if dim == member.dim else 1 for dim in range(tensor.dim())]
            kept = torch.ones(tensor.shape[member.dim])
            kept[member.positions.flatten()] = state[group.name].repeat_interleave(member.positions.shape[1])
            there[member.tensor] = tensor * kept.view(shape)
    for name in gates.read_by():
        for what in ("inputs", "weights"):
            if f"{name}:{what}" in state:
                there[f"{name}.weight"] = there[f"{name}.weight"] * state[f"{name}:{what}"]
    return int(sum(tensor.count_nonzero() for tensor in there.values()))


def states(gates: Mapping[str, Gate]) -> Sequence[dict[str, Tensor]]:
    """List all states of gates."""
    sizes = [gate.log_alpha.numel() for gate in gates.values()]
    found = []
    for bits in product((0.0, 1.0), repeat=sum(sizes)):
        parts = torch.tensor(bits).split(sizes)
        found.append({name: part.view(gates[name].shape) for name, part in zip(gates, parts, strict=True)})
    return found


def chance(state: Mapping[str, Tensor], open_: Mapping[str, Tensor]) -> float:
    each = [torch.where(state[name] > 0, open_[name], 1 - open_[name]).double().prod() for name in state]
    return float(torch.stack(each).prod())


@pytest.mark.parametrize("name", list(ENUMERATED))
def test_the_expected_cost_is_the_mean_over_all_states(name: str) -> None:
    model, x, choice = made(name)
    graph, gates = read(model, x), choice.gates.named()
    cost = ExpectedL0(model, graph, choice.gates, "params")
    open_ = {gate: values.open_probability().detach() for gate, values in gates.items()}
    mean = 0.0
    for at, state in enumerate(states(gates)):
        count = left(model, graph, choice.gates, state)
        mean += chance(state, open_) * count
        if at % 7 == 0:
            assert float(cost.of(state)) == pytest.approx(count, abs=1e-3)
    assert float(cost.expected()) == pytest.approx(mean, rel=1e-5)
    assert cost.present == sum(tensor.numel() for tensor in model.parameters())
    assert float(cost.of({gate: torch.ones_like(values) for gate, values in open_.items()})) == cost.present


@pytest.mark.parametrize("name", list(ENUMERATED))
def test_what_test_gates_leave_is_counted(name: str) -> None:
    model, x, choice = made(name)
    graph, gates = read(model, x), choice.gates.named()
    cost = ExpectedL0(model, graph, choice.gates, "params")
    for seed in range(5):
        set_all(choice.gates, seed)
        state = {gate: values.is_open().float() for gate, values in gates.items()}
        assert float(cost.tested()) == left(model, graph, choice.gates, state)
    with torch.no_grad():
        for gate in gates.values():
            gate.log_alpha.fill_(gate.closes_at + 0.1)
            gate.log_alpha.flatten()[0] = 3.0
    assert float(cost.tested(0.2)) < float(cost.tested(0.05)) == cost.present


@pytest.mark.parametrize("unit", ["macs", "channels"])
def test_masks_save_no_macs_and_no_channels(unit: str) -> None:
    model, x, choice = made("inputs between channels")
    with pytest.raises(ValueError, match=rf"`of`='{unit}' counts what is cut out.*Take of=\"params\""):
        ExpectedL0(model, read(model, x), choice.gates, unit)  # type: ignore[arg-type]
    model, x, choice = made("channels")
    cost = ExpectedL0(model, read(model, x), choice.gates, unit)  # type: ignore[arg-type]
    assert cost.has_channels
    assert cost.present == {"macs": 3 * 4 + 4 * 5 + 5 * 2, "channels": 9}[unit]


def test_channels_without_gates_do_not_count() -> None:
    model, x = perceptron(4, 6, 5, 3), torch.zeros(1, 4)
    choice = chosen(model, x, {"0": "channels"})
    graph, (gate,) = read(model, x), choice.gates.named().values()
    cost = ExpectedL0(model, graph, choice.gates, "channels")
    assert cost.present == gate.log_alpha.numel()
    assert dense_cost(model, graph, choice.gates, "channels") == cost.present  # type: ignore[arg-type]
    assert float(cost.expected()) == pytest.approx(gate.open_probability().sum().item())


def test_macs_are_those_of_an_example() -> None:
    model = nn.Sequential(conv(2, 3), nn.ReLU(), conv(3, CLASSES))
    costs = []
    for batch in (1, 6):
        x = torch.zeros(batch, 2, 4, 4)
        costs.append(ExpectedL0(model, read(model, x), chosen(model, x, CHANNELS).gates, "macs"))
    assert costs[0].present == pytest.approx(costs[1].present) == 16 * 9 * (2 * 3 + 3 * CLASSES)
    assert float(costs[0].expected()) == pytest.approx(float(costs[1].expected()), rel=1e-6)


@pytest.mark.parametrize("kind", [HardConcrete, Bernoulli])
@pytest.mark.parametrize("name", list(ENUMERATED))
def test_gradients_are_those_of_the_expected_cost(name: str, kind: type[Gate]) -> None:
    build, shape, granularity = ENUMERATED[name]
    model, x = build(), torch.zeros(shape)
    choice = chosen(model, x, granularity, kind)
    cost, gates = ExpectedL0(model, read(model, x), choice.gates, "params"), choice.gates.named()
    strengths = {gate: 0.5 + at for at, gate in enumerate(gates)}
    alphas = [gate.log_alpha for gate in gates.values()]
    expected = cost.of({gate: values.open_probability() for gate, values in gates.items()})
    slopes = torch.autograd.grad(expected, alphas)
    first = alphas[0]
    first.grad = torch.ones_like(first)
    assert torch.equal(cost.add_to_gradients(strengths), expected.detach())
    first.grad -= 1
    for gate, alpha, slope in zip(gates, alphas, slopes, strict=True):
        assert alpha.grad is not None
        assert torch.allclose(alpha.grad, strengths[gate] * slope, rtol=1e-4, atol=1e-5)
        assert_steep(cost, alpha, alpha.grad / strengths[gate])
    cost.add_to_gradients(dict.fromkeys(gates, torch.tensor(2.0)))
    for gate, alpha, slope in zip(gates, alphas, slopes, strict=True):
        assert alpha.grad is not None
        assert torch.allclose(alpha.grad, (strengths[gate] + 2) * slope, rtol=1e-4, atol=1e-5)


def assert_steep(cost: ExpectedL0, alpha: Tensor, gradient: Tensor, step: float = 0.02) -> None:
    """The derivative at the first place is the slope of a central difference."""
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            alpha.flatten()[0] += sign * step
        sides.append(float(cost.expected()))
        with torch.no_grad():
            alpha.flatten()[0] -= sign * step
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(float(gradient.flatten()[0]), rel=2e-2, abs=2e-3)


def test_the_cost_of_a_cut_model_leaves_out_what_it_no_longer_knows() -> None:
    _model, x, choice = made("channels")
    other = perceptron(3, 6, 5, 2)
    cost = ExpectedL0(other, read(other, x), choice.gates, "params")  # the first layer has another width
    cost.add_to_gradients(dict.fromkeys(choice.gates.named(), 1.0))
    named = choice.gates.named()
    assert not named["0"].log_alpha.grad.any()
    assert (named["2"].log_alpha.grad > 0).all()


@pytest.mark.parametrize("name", [*ENUMERATED, "convolutions", "tied"])
def test_decay_is_weighted_with_open_gates(name: str) -> None:
    if name in ENUMERATED:
        model, _, choice = made(name)
    else:
        model = (
            tied(8) if name == "tied" else nn.Sequential(conv(2, 4), conv(4, 6, groups=2), nn.ConvTranspose2d(6, 3, 2))
        )
        choice = chosen(model, torch.zeros((1, 3, 5) if name == "tied" else (1, 2, 4, 4)), CHANNELS)
    randomise(model)
    layers, gates, strength = named_modules(model), choice.gates, 0.3
    tensors = [*model.parameters(), *(gate.log_alpha for gate in gates.named().values())]
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)
    decay_gradients(layers, gates, strength)
    terms = {}
    for layer, reading in gates.read_by().items():
        weight = getattr(layers[layer], weight_name(layers[layer]))
        open_ = [gate.open_probability() for gate in reading.channels]
        own = None if reading.inputs is None else reading.inputs.open_probability()
        there = spread(layers[layer], weight, reading.along_input(open_, own))
        there = there if reading.weights is None else there * reading.weights.open_probability()
        assert len(reading.index) % weight.shape[input_dim(layers[layer])] == 0
        terms[weight] = strength / 2 * (there * weight.square()).sum()
    expected = torch.autograd.grad(
        torch.stack(list(terms.values())).sum(), tensors, materialize_grads=True, allow_unused=True
    )
    for tensor, gradient in zip(tensors, expected, strict=True):
        assert tensor.grad is not None
        assert torch.allclose(tensor.grad, gradient, rtol=1e-4, atol=1e-7)


def test_frozen_weights_do_not_decay() -> None:
    model, _, choice = made("channels")
    decay_gradients(named_modules(model), choice.gates, 1.0)
    assert all(parameter.grad is None for parameter in (*model.parameters(), *choice.gates.parameters()))
    model[2].weight.grad = torch.zeros(5, 4)
    decay_gradients(named_modules(model), choice.gates, 1.0)
    there = choice.gates.named()["0"].open_probability()
    assert torch.allclose(model[2].weight.grad, there * model[2].weight)
    assert model[4].weight.grad is None
    assert all(gate.log_alpha.grad is None for gate in choice.gates.named().values())
