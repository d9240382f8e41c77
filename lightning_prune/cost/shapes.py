"""The shapes of a run's tensors under other widths of the channel groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lightning_prune.cost.price import ShapeOf
from lightning_prune.fate import channel_roots
from lightning_prune.graph import Graph
from lightning_prune.labels import LabelArray, Labels


@dataclass(slots=True)
class Dimension:
    """Dimensions whose size depends on the widths in the same way.

    Attributes:
        size: Their size now.
        positions: Group -> the positions that each of its channels has there.
    """

    size: int
    positions: Mapping[str, int]


class Shapes:
    """How many channels each group has, and so how large every labelled dimension is.

    The channels of a group live in the same places, so sizes are linear in widths: size = fixed + sum over the groups
    of width * positions of a channel. Which groups those are is looked up once for each dimension.

    Args:
        graph: A reading of a model; the widths begin as they are there.

    Attributes:
        widths: Group name -> the channels that it has now; frozen groups stand here too.
    """

    def __init__(self, graph: Graph) -> None:
        self.widths = {group.name: group.size for group in graph.groups}
        self._groups = list(graph.groups)
        owner = np.full(len(graph.roots), -1)
        for number, group in enumerate(graph.groups):
            owner[channel_roots(graph, group)] = number
        self._owner = owner[graph.roots]
        self._known: dict[int, Dimension] = {}
        self._alike: dict[tuple[int, tuple[tuple[str, int], ...]], Dimension] = {}
        self._holding: dict[str, list[Dimension]] = {name: [] for name in self.widths}
        self._seen: list[LabelArray] = []  # keeps them, so that no other array can get the id of one

    def shape_of(self, shape: tuple[int, ...], labels: Labels) -> tuple[int, ...]:
        """Return the shape that a tensor has now.

        Args:
            shape: Its shape in the reading.
            labels: Its labels there.
        """
        known = self._known
        return tuple(
            [
                size if part is None or part.size != size else (known.get(id(part)) or self.dimension(part)).size
                for size, part in zip(shape, labels, strict=True)
            ]
        )

    def noting(self, groups: set[str]) -> ShapeOf:
        """Return `shape_of`, which also notes the groups that shapes depend on."""

        def shape_of(shape: tuple[int, ...], labels: Labels) -> tuple[int, ...]:
            for size, part in zip(shape, labels, strict=True):
                if part is not None and part.size == size:
                    groups.update(self.dimension(part).positions)
            return self.shape_of(shape, labels)

        return shape_of

    def change(self, group: str, by: int) -> None:
        """Make a group wider, or narrower."""
        self.widths[group] += by
        for dimension in self._holding[group]:
            dimension.size += by * dimension.positions[group]

    def dimension(self, part: LabelArray) -> Dimension:
        """Return how the size of a dimension depends on the widths."""
        if id(part) in self._known:
            return self._known[id(part)]
        numbers, counts = np.unique(self._owner[part], return_counts=True)
        owned = [(self._groups[at], int(count)) for at, count in zip(numbers, counts, strict=True) if at >= 0]
        positions = {group.name: count // group.size for group, count in owned}
        fixed = part.size - sum(positions[group.name] * group.size for group, _ in owned)
        self._known[id(part)] = self._dimension(fixed, positions)
        self._seen.append(part)
        return self._known[id(part)]

    def _dimension(self, fixed: int, positions: Mapping[str, int]) -> Dimension:
        """Return the one dimension of this kind."""
        form = (fixed, tuple(positions.items()))
        if form not in self._alike:
            size = fixed + sum(count * self.widths[name] for name, count in positions.items())
            self._alike[form] = Dimension(size, positions)
            for name in positions:
                self._holding[name].append(self._alike[form])
        return self._alike[form]
