"""The dense model that pruning ratios are counted against, and how far from it a plan goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from lightning_prune import history
from lightning_prune.cost import Costs, PlannedCost, count_params, per_example, planned_macs
from lightning_prune.cut import cut_shapes, prepare
from lightning_prune.graph import Graph
from lightning_prune.tensors import named_tensors
from lightning_prune.types import PruningPlan, Unit

RECORDED: tuple[Unit, ...] = ("channels", "params", "macs")
"""The units of which every record holds the count."""


@dataclass(frozen=True)
class Baseline:
    """The dense model that ratios are counted against, and what is left of it now.

    Attributes:
        channels: Group name -> dense channels, of the groups that count.
        widths: Group name -> dense channels, of all groups.
        params: Dense parameters.
        macs: Dense multiply-accumulates.
        macs_now: Multiply-accumulates now.
    """

    channels: Mapping[str, int]
    widths: Mapping[str, int]
    params: int
    macs: int
    macs_now: int

    @classmethod
    def of(cls, model: nn.Module, graph: Graph, scores: Mapping[str, Tensor]) -> Baseline:
        """Take it from the model's history, or from the model itself while nothing has been cut."""
        past = history.history_of(model)
        macs_now = per_example(graph.macs, graph.inputs)
        known = past[0].channels if past else {}
        channels = {name: known[name].dense if name in known else len(values) for name, values in scores.items()}
        widths = {group.name: known[group.name].dense if group.name in known else group.size for group in graph.groups}
        if not past:
            return cls(channels, widths, count_params(model), macs_now, macs_now)
        return cls(channels, widths, past[0].params.dense, past[0].macs.dense, macs_now)


class Reach:
    """How far plans go, in the unit that a ratio is asked in.

    Args:
        model: The model.
        graph: A reading of it.
        baseline: What ratios are counted against.
        unit: Any but "channels".
        costs: What the model costs, by this reading.
    """

    def __init__(self, model: nn.Module, graph: Graph, baseline: Baseline, unit: Unit, costs: Costs) -> None:
        self._model = model
        self._graph = graph
        self._baseline = baseline
        self._unit = unit
        self._costs = costs

    def __call__(self, plan: PruningPlan) -> float:
        """Return the fraction of the dense model that is gone after a plan."""
        if self._unit == "params":
            cut = prepare(self._model, self._graph, plan)
            left = count_params(self._model, cut_shapes(named_tensors(self._model), cut.kept))
            return 1 - left / self._baseline.params
        if self._unit == "macs":
            return 1 - planned_macs(self._graph, plan) / max(self._baseline.macs, 1)
        widths = {name: self._cost.widths[name] - len(indices) for name, indices in plan.removed.items()}
        return 1 - self._cost.at(widths) / self._dense if self._dense else 0.0

    @property
    def left(self) -> float:
        """What is left of the dense model before any plan, in memory or latency: a fraction, in (0, 1]."""
        return min(self._cost.total / self._dense, 1.0) if self._dense else 1.0

    @cached_property
    def _cost(self) -> PlannedCost:
        return self._costs.of(self._unit)

    @cached_property
    def _dense(self) -> float:
        """What the dense model costs, priced at its widths: no record holds what it costs here and now."""
        return self._cost.at(self._baseline.widths)
