"""What a gated network costs on average, and what open gates cost in the loss: the expected L0 norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.cost import Costs, per_example
from lightning_prune.gates.choosing import writings
from lightning_prune.graph import Graph
from lightning_prune.layers.gate import Gate
from lightning_prune.layers.gated import Reading, spread, weight_name
from lightning_prune.layers.gates import Gates
from lightning_prune.tensors import named_modules

GateUnit: TypeAlias = Literal["channels", "params", "macs"]
"""What open gates cost."""


class ExpectedL0:
    """The cost of a gated network, in expectation and with its test gates, and its gradient.

    A weight of channels o and i is there if both gates are open, so that E[L0] = sum over weights of P(z_o > 0)
    P(z_i > 0), and where it has one gate, |g| P(z_g > 0) for all |g| weights of a gate: Louizos, Welling, Kingma 2018
    (arXiv 1712.01312), eq. 4 and 12. MACs are counted in the same way, for one example; of channels those with gates.

    Args:
        model: The network, without its gates.
        graph: A reading of it.
        gates: Its gates.
        unit: "params", "macs" or "channels".

    Raises:
        ValueError: "macs" or "channels", and a gate is not one of channels: such gates become masks, which save none.
    """

    def __init__(self, model: nn.Module, graph: Graph, gates: Gates, unit: GateUnit) -> None:
        self.named = gates.named()
        own = [name for name, reading in gates.read_by().items() if reading.inputs or reading.weights]
        if own and unit != "params":
            raise ValueError(
                f"`of`={unit!r} counts what is cut out, and gates on the inputs or weights of {own[0]} become masks, "
                'which save none. Take of="params", or granularity="channels".'
            )
        shapes = {group.name: (group.size,) for group in graph.groups if not group.frozen}
        self._grouped = [name for name, gate in self.named.items() if gate.shape == shapes.get(name)]
        costs = Costs(model, graph)
        self._cost = costs.expected(unit, self._grouped) if self._grouped else None
        self._dense = costs.of("params").total if self._cost is None else self._cost.dense
        self._ungated = self._dense - sum(shapes[name][0] for name in self._grouped) if unit == "channels" else 0.0
        self._share = per_example(10**12, graph.inputs) / 10**12 if unit == "macs" else 1.0
        layers, made = named_modules(model), writings(model, graph, gates)
        self._own = [_Own(layers[name], gates.read_by()[name], made[name], self.named) for name in own]

    @property
    def has_channels(self) -> bool:
        """Whether there are gates on channels, which can be cut."""
        return bool(self._grouped)

    @property
    def present(self) -> float:
        """What the network costs with all gates open."""
        return (self._dense - self._ungated) * self._share

    def of(self, open_: Mapping[str, Tensor]) -> Tensor:
        """Return the expected cost, a scalar.

        Args:
            open_: Name of each gate -> the probabilities that it is open, of its shape; 0 and 1 give an exact count.
        """
        corrections = [own.correction(open_) for own in self._own]
        if self._cost is None:
            return self._dense + torch.stack(corrections).sum()
        cost = self._cost([open_[name] for name in self._grouped]) * self._share - self._ungated
        return cost + torch.stack(corrections).sum() if corrections else cost

    def expected(self) -> Tensor:
        """Return the expected cost at present, without a gradient."""
        with torch.no_grad():
            return self.of({name: gate.open_probability() for name, gate in self.named.items()})

    def tested(self, margin: float = 0.0) -> Tensor:
        """Return the cost of the network that the test gates leave.

        Args:
            margin: Gates whose log alpha is so near to where they close count as closed too, but for the best of each.
        """
        with torch.no_grad():
            return self.of({name: _is_open(gate, margin).float() for name, gate in self.named.items()})

    def add_to_gradients(self, strengths: Mapping[str, float | Tensor]) -> Tensor:
        """Add the gradient of the penalty to that of each gate's log alpha.

        Args:
            strengths: Name of a gate -> what a unit of cost, saved by it, is worth in units of the loss.

        Returns:
            The expected cost.
        """
        probabilities = {name: gate.open_probability() for name, gate in self.named.items()}
        leaves = {name: values.detach().requires_grad_() for name, values in probabilities.items()}
        cost = self.of(leaves)
        slopes = torch.autograd.grad(cost, list(leaves.values()), allow_unused=True, materialize_grads=True)
        pulls = [slope * strengths[name] for name, slope in zip(leaves, slopes, strict=True)]
        alphas = [gate.log_alpha for gate in self.named.values()]
        for alpha, gradient in zip(
            alphas, torch.autograd.grad(list(probabilities.values()), alphas, pulls), strict=True
        ):
            alpha.grad = gradient if alpha.grad is None else alpha.grad.add_(gradient.to(alpha.grad.dtype))
        return cost.detach()


def _is_open(gate: Gate, margin: float) -> Tensor:
    alpha = gate.log_alpha.detach()
    return gate.is_open() if not margin else (alpha > gate.closes_at + margin) | (alpha == alpha.max())


class _Own:
    """What the gates on a layer's inputs and weights take from the count of its weights.

    A gate that stands on both sides of a weight, as in a layer that reads and makes the same trunk, counts once.

    Args:
        layer: The layer.
        reading: Its gates, and those of the channels that it reads.
        writing: The gates of the channels that it makes.
        named: All gates by name.
    """

    def __init__(self, layer: nn.Module, reading: Reading, writing: Reading, named: Mapping[str, Gate]) -> None:
        self._layer, self._weight = layer, getattr(layer, weight_name(layer))
        self._reading, self._writing = reading, writing
        self._names = {gate: name for name, gate in named.items()}
        made, read = _numbers(writing, self._names), _numbers(reading, self._names)
        same = (made.unsqueeze(1) == read) & (read > 0)
        self._same = same if same.any() else None

    def correction(self, open_: Mapping[str, Tensor]) -> Tensor:
        """Return the expected weights less those that there would be with gates on channels alone."""
        out = self._values(self._writing.channels, open_, self._writing)
        channels = self._values(self._reading.channels, open_, self._reading)
        inputs, weights = self._reading.inputs, self._reading.weights
        if self._same is not None:
            joint = torch.where(self._same, out.unsqueeze(1), out.unsqueeze(1) * channels)
            there = joint if inputs is None else joint * open_[self._names[inputs]]
            return (there if weights is None else there * open_[self._names[weights]]).sum() - joint.sum()
        along = channels if inputs is None else channels * open_[self._names[inputs]]
        without = out.sum() * channels.sum()
        if weights is None:
            return out.sum() * along.sum() - without
        return out @ (open_[self._names[weights]] @ along) - without

    def _values(self, gates: Sequence[Gate], open_: Mapping[str, Tensor], reading: Reading) -> Tensor:
        return reading.along_input([open_[self._names[gate]] for gate in gates])


def _numbers(reading: Reading, names: Mapping[Gate, str]) -> Tensor:
    """Number the gates along a reading such that two that are the same have the same number; 0 is none."""
    starts, start = {}, 1
    for gate in names:
        starts[gate] = start
        start += gate.log_alpha.numel()
    places = [torch.arange(gate.log_alpha.numel()) + starts[gate] for gate in reading.channels]
    return torch.cat([torch.zeros(1, dtype=torch.int64), *places]).to(reading.index.device)[reading.index]


def decay_gradients(layers: Mapping[str, nn.Module], gates: Gates, strength: float) -> None:
    """Add the gradient of strength / 2 * sum P(z > 0) theta^2 to that of weights and gates: the paper's L2 term.

    Weights that are frozen, or have no gradient, are left out; one that several layers share counts once.

    Args:
        layers: The network's layers by name.
        gates: Its gates.
        strength: The weight decay; the mean over gates of what decays is 0 where they are closed.
    """
    parts: list[Tensor] = []
    weights: list[Tensor] = []
    for name, reading in gates.read_by().items():
        weight = getattr(layers[name], weight_name(layers[name]))
        if weight.grad is not None and all(weight is not other for other in weights):
            channels = [gate.open_probability() for gate in reading.channels]
            own = None if reading.inputs is None else reading.inputs.open_probability()
            there = spread(layers[name], weight, reading.along_input(channels, own))
            there = there if reading.weights is None else there * reading.weights.open_probability()
            parts.append(0.5 * strength * (there * weight.square()).sum())
            weights.append(weight)
    if not parts:
        return
    moved = [*weights, *(gate.log_alpha for gate in gates.named().values() if gate.log_alpha.grad is not None)]
    found = torch.autograd.grad(torch.stack(parts).sum(), moved, allow_unused=True)
    for tensor, gradient in zip(moved, found, strict=True):
        if gradient is not None:
            assert tensor.grad is not None
            tensor.grad.add_(gradient.to(tensor.grad.dtype))
