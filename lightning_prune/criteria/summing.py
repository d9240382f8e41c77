"""Channels that are summed up without a weight, where no layer could be told to leave one out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch._ops import OpOverload

from lightning_prune.fate import channel_roots
from lightning_prune.graph import Graph
from lightning_prune.handlers import handler_for
from lightning_prune.handlers.pointwise import pointwise
from lightning_prune.handlers.registry import packets
from lightning_prune.labels import LabelArray, Labels
from lightning_prune.steps import Origin, Run, Step, seen_in


def summed_up(graph: Graph) -> set[str]:
    """Name the channel groups that an operation sums up which reads nothing but activations.

    A mean over channels, and a product of two activations along them, hear every channel, and go through no layer.
    """
    owners = _Owners(graph)
    return {name for run in graph.runs.values() for name in _summed_in(run, owners)}


def keeps_places(op: OpOverload) -> bool:
    """Tell whether an operation sums up over no channels."""
    return handler_for(op) is pointwise or op.overloadpacket in _HAND_ON


_HAND_ON = frozenset(
    packets("cat stack expand where embedding copy_ index_put slice_scatter select_scatter index_add native_layer_norm")
)

_SUMS = frozenset(packets("mm bmm addmm baddbmm mv dot sum mean var var_mean std prod amax amin linalg_vector_norm"))
"""Operations after which a dimension can be gone because it was summed up, not because it was left out."""


class _Owners:
    """Tells which groups labels belong to."""

    def __init__(self, graph: Graph) -> None:
        self._names = [group.name for group in graph.groups]
        owner = np.full(len(graph.roots), -1)
        for number, group in enumerate(graph.groups):
            owner[channel_roots(graph, group)] = number
        self._owner: LabelArray = owner[graph.roots]

    def of(self, labels: Labels) -> set[str]:
        """Return the groups whose channels lie along some dimension."""
        found: set[str] = set()
        for part in labels:
            if part is not None:
                numbers = np.unique(self._owner[part[part < len(self._owner)]])
                found.update(self._names[number] for number in numbers if number >= 0)
        return found


def _summed_in(run: Run, owners: _Owners) -> set[str]:
    groups: dict[Origin, set[str]] = {}
    weights: dict[Origin, bool] = {}
    found: set[str] = set()
    for step in run.steps:
        origins = [seen.origin for seen in seen_in((*step.args, *step.kwargs.values()))]
        if step.op.overloadpacket in _SUMS and not any(_is_weight(origin, weights) for origin in origins):
            found |= set[str]().union(*(groups.get(origin, set()) for origin in origins)) - _made(step, owners)
        made = bool(origins) and all(_is_weight(origin, weights) for origin in origins)
        for number, (_, labels) in zip(step.results, step.outputs, strict=True):
            weights[number] = made
            groups[number] = set() if made else owners.of(labels)
    return found


def _made(step: Step, owners: _Owners) -> set[str]:
    return set[str]().union(*(owners.of(labels) for _, labels in step.outputs))


def _is_weight(origin: Origin, weights: Mapping[Origin, bool]) -> bool:
    """Tell whether a tensor is the model's, or made of such tensors alone."""
    return isinstance(origin, str) or weights.get(origin, False)
