"""What a model costs in each unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from math import prod

from torch import nn

from lightning_prune.cost.expected import ExpectedCost
from lightning_prune.cost.latency import LatencyPrice
from lightning_prune.cost.planned import PlannedCost, Share
from lightning_prune.cost.preferred import preferred_multiple
from lightning_prune.cost.price import Price, ShapeOf, macs, memory
from lightning_prune.fate import channel_roots
from lightning_prune.graph import Graph
from lightning_prune.labels import Labels
from lightning_prune.tensors import named_parameters
from lightning_prune.types import Unit

COUNTED: tuple[Unit, ...] = ("params", "macs", "memory", "latency")
"""The units of what channels cost."""

EXPECTED: tuple[Unit, ...] = ("channels", "params", "macs", "memory")
"""The units that have an expected cost."""


class Costs:
    """What a model costs in each unit, by one reading of it.

    Attributes:
        model: The model.
        graph: A reading of it.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.model = model
        self.graph = graph

    def of(self, unit: Unit) -> PlannedCost:
        """Return the cost at the widths of the reading: each time a new one, from which channels can be removed.

        Args:
            unit: "params" of the model; "macs", "memory" (elements that a forward pass makes, none of them freed) or
                "latency" (predicted, in ms) of a forward pass in eval mode, for the batch that was read.

        Raises:
            ValueError: The unit is another one.
        """
        if unit not in COUNTED:
            raise ValueError(
                f"`unit` is what is counted, one of {', '.join(map(repr, COUNTED))}; got {unit!r}. Take the sum of the "
                "widths for channels."
            )
        return PlannedCost(self.graph, self._shares(unit))

    def expected(self, unit: Unit, groups: Sequence[str]) -> ExpectedCost:
        """Return what the model costs on average when each channel of some groups is there by chance.

        Args:
            unit: "channels" of all groups that are not frozen, or "params", "macs" or "memory" as in `of`.
            groups: Names of the groups whose channels can be missing; others keep the width that they have.

        Raises:
            ValueError: The unit is another one, or a name is no group's whose channels can go.
        """
        if unit not in EXPECTED:
            raise ValueError(
                f"`unit` is what is counted on average, one of {', '.join(map(repr, EXPECTED))}; got {unit!r}. Latency "
                'is no polynomial in the widths: take "macs" or "memory" for it.'
            )
        return ExpectedCost(self.graph, self._shares(unit), groups)

    def liked_multiple(self) -> int:
        """Return the multiple that widths are worth being rounded to on this machine (see `preferred_multiple`)."""
        return preferred_multiple(self._latency)

    def _shares(self, unit: Unit) -> Iterable[Share]:
        """Return what says the cost of each part of the model."""
        if unit == "params":
            return self._tensors()
        if unit == "channels":
            return self._widths()
        price: Price = self._latency if unit == "latency" else {"macs": macs, "memory": memory}[unit]
        return (partial(price, step) for step in next(iter(self.graph.runs.values())).steps)

    def _widths(self) -> Iterator[Share]:
        """Yield what says the width of each group that is not frozen."""
        for group in self.graph.groups:
            if not group.frozen:
                yield partial(_elements, (group.size,), (channel_roots(self.graph, group),))

    def _tensors(self) -> Iterator[Share]:
        """Yield what says the size of each parameter."""
        for name, parameter in named_parameters(self.model).items():
            shape = tuple(parameter.shape)
            yield partial(_elements, shape, self.graph.labels.get(name, (None,) * len(shape)))

    @cached_property
    def _latency(self) -> LatencyPrice:
        return LatencyPrice(self.graph, self.model)


def _elements(shape: tuple[int, ...], labels: Labels, shape_of: ShapeOf) -> float:
    """Return the elements of a tensor."""
    return float(prod(shape_of(shape, labels)))
