"""What a model costs in each unit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from math import prod

from torch import nn

from lightning_prune.cost.latency import LatencyPrice
from lightning_prune.cost.planned import PlannedCost, Share
from lightning_prune.cost.preferred import preferred_multiple
from lightning_prune.cost.price import Price, ShapeOf, macs, memory
from lightning_prune.graph import Graph
from lightning_prune.labels import Labels
from lightning_prune.tensors import named_parameters
from lightning_prune.types import Unit

COUNTED: tuple[Unit, ...] = ("params", "macs", "memory", "latency")
"""The units of what channels cost."""


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
        if unit == "params":
            return PlannedCost(self.graph, self._tensors())
        if unit not in COUNTED:
            raise ValueError(
                f"`unit` is what is counted, one of {', '.join(map(repr, COUNTED))}; got {unit!r}. Take the sum of the "
                "widths for channels."
            )
        price: Price = self._latency if unit == "latency" else {"macs": macs, "memory": memory}[unit]
        steps = next(iter(self.graph.runs.values())).steps
        return PlannedCost(self.graph, (partial(price, step) for step in steps))

    def liked_multiple(self) -> int:
        """Return the multiple that widths are worth being rounded to on this machine (see `preferred_multiple`)."""
        return preferred_multiple(self._latency)

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
