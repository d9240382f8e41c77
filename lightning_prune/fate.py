"""Who goes and who stays, told by label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph import Graph
from lightning_prune.labels import LabelArray, Labels
from lightning_prune.steps import Step
from lightning_prune.types import ChannelGroup, PruningPlan

_VIEWS = {"aten._unsafe_view.default", "aten._reshape_alias.default", "aten.reshape.default", "aten.view.default"}


def _one_name(name: str) -> str:
    """Call all views the same."""
    return "aten.view.default" if name in _VIEWS else name


def channel_roots(graph: Graph, group: ChannelGroup) -> LabelArray:
    """Return for each channel of a group the label that all of its positions are tied to."""
    first = group.members[0]
    place = graph.labels[first.tensor][first.dim]
    assert place is not None
    roots: LabelArray = graph.roots[place[first.positions[:, 0].numpy()]]
    return roots


class Fate:
    """Who goes and who stays, told by label.

    Args:
        graph: A reading of the model.
        plan: What goes.
    """

    def __init__(self, graph: Graph, plan: PruningPlan) -> None:
        self.count = len(graph.roots)
        free = (group.name for group in graph.groups if not group.frozen)
        self._names = list(dict.fromkeys((*plan.removed, *free)))
        self._planned = len(plan.removed)
        self._owner = np.full(self.count, -1)
        goes = np.zeros(self.count, dtype=bool)
        groups = {group.name: group for group in graph.groups}
        for number, name in enumerate(self._names):
            roots = channel_roots(graph, groups[name])
            goes[roots[plan.removed[name].numpy() if name in plan.removed else []]] = True
            self._owner[roots] = number
        self._owner = self._owner[graph.roots]
        self._stays = ~goes[graph.roots]

    def shape_left(self, shape: Sequence[int], labels: Labels) -> tuple[int, ...]:
        """Return what is left of a shape."""
        return tuple(
            size if part is None or part.size != size else len(self.left(part))
            for size, part in zip(shape, labels, strict=True)
        )

    def left(self, labels: LabelArray) -> LabelArray:
        """Leave out the labels that go."""
        return labels[self._stays[labels]]

    def goes(self, labels: LabelArray) -> NDArray[np.bool_]:
        """Tell of each label whether it goes."""
        goes: NDArray[np.bool_] = ~self._stays[labels]
        return goes

    def agrees(self, old: Step, new: Step) -> bool:
        """Tell whether a step after the cut is the old one with the removed positions left out."""
        return (
            _one_name(old.name) == _one_name(new.name)
            and len(old.outputs) == len(new.outputs)
            and all(
                len(shape) == len(shape_now) and all(map(self._same, shape, labels, shape_now, labels_now))
                for (shape, labels), (shape_now, labels_now) in zip(old.outputs, new.outputs, strict=True)
            )
        )

    def _same(self, size: int, labels: LabelArray | None, size_now: int, labels_now: LabelArray | None) -> bool:
        """Compare one dimension, position by position."""
        if labels is None:
            return size == size_now
        expected = self.left(labels)
        if labels_now is None or len(expected) != size_now:
            return len(expected) == size_now == 1
        return bool((expected == labels_now).all())

    def sizes(self, step: Step) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Yield the sizes in a step that change: before and after, of one dimension in all outputs, or of a factor."""
        for dim in range(max((len(labels) for _, labels in step.outputs), default=0)):
            parts = [labels[dim] for _, labels in step.outputs if dim < len(labels)]
            if all(part is not None for part in parts):
                old = tuple(len(part) for part in parts if part is not None)
                new = tuple(len(self.left(part)) for part in parts if part is not None)
                if old != new:
                    yield old, new
        for start, count in step.fresh:
            left = len(self.left(np.arange(start, start + count)))
            if left != count:
                yield (count,), (left,)

    def refuse(self, involved: Iterable[LabelArray | None], reason: str) -> dict[str, str]:
        """Return the planned groups that labels belong to, or all of the plan where those tell nothing."""
        planned = self._names[: self._planned]
        return dict.fromkeys([name for name in self.owners(involved) if name in planned] or planned, reason)

    def owners(self, dimensions: Iterable[LabelArray | None]) -> list[str]:
        """Return the groups that labels belong to, in order, planned or not; frozen ones belong to nobody."""
        names: dict[str, None] = {}
        for labels in dimensions:
            if labels is not None:
                owners = np.unique(self._owner[labels[labels < self.count]]).tolist()
                names.update(dict.fromkeys(self._names[owner] for owner in owners if owner >= 0))
        return list(names)
