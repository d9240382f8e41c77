"""Labels for positions, and the union-find that says which of them share a fate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

LabelArray: TypeAlias = NDArray[np.int64]
Labels: TypeAlias = tuple[LabelArray | None, ...]
"""Per dimension of a tensor its labels, or None where the dimension holds no channels."""


class LabelSpace:
    """A union-find over labels, vectorised: ties are collected and resolved together when somebody asks.

    Args:
        size: How many labels there are from the start.

    Attributes:
        allocations: The first label and the number of those made since, for each time that some were.
        decisions: What was decided about factors, in order.
    """

    def __init__(self, size: int = 0) -> None:
        self._parent: LabelArray = np.arange(size)
        self._size = size
        self._ties: list[tuple[LabelArray, LabelArray]] = []
        self._frozen: list[tuple[LabelArray, str]] = []
        self._flat: LabelArray | None = None  # the roots, until something is made or tied
        self.allocations: list[tuple[int, int]] = []
        self.decisions: list[tuple[int, ...]] = []

    def fresh(self, count: int) -> LabelArray:
        """Make `count` labels that nothing else carries yet."""
        self.allocations.append((self._size, count))
        self._size += count
        self._flat = None
        return np.arange(self._size - count, self._size)

    def decide(self, compute: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """Make a decision that depends on what is tied so far, and remember it."""
        self.decisions.append(compute())
        return self.decisions[-1]

    def tie(self, left: LabelArray, right: LabelArray) -> None:
        """Say that the labels live or die together, element by element (arrays broadcast)."""
        if left is not right:
            self._ties.append((left, right))
            self._flat = None

    def freeze(self, labels: LabelArray, reason: str) -> None:
        """Say that the labels must live; the first reason given is the one that is kept."""
        self._frozen.append((labels, reason))

    def roots(self) -> LabelArray:
        """Return for every label the smallest label that it is tied to; it cannot be written to."""
        if self._flat is None:
            self._resolve()
            self._flat = _shortened(self._parent[: self._size])
            self._flat.flags.writeable = False
            self._parent[: self._size] = self._flat
        return self._flat

    def roots_of(self, labels: LabelArray) -> LabelArray:
        """Return for some labels the smallest label that each is tied to; what else there is costs nothing."""
        self._resolve()
        return self._up(labels)

    def _resolve(self) -> None:
        """Hook larger roots to smaller ones, until no tie has two roots."""
        if len(self._parent) < self._size:
            room = np.arange(len(self._parent), self._size + self._size // 2)  # so that few growths copy it all
            self._parent = np.concatenate([self._parent, room])
        if not self._ties:
            return
        pairs = [np.broadcast_arrays(left, right) for left, right in self._ties]
        self._ties.clear()
        left, right = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
        many = len(left) > self._size // 2
        while len(left):
            if many:
                self._parent = _shortened(self._parent)
                left, right = self._parent[left], self._parent[right]
            else:
                left, right = np.split(self._up(np.concatenate([left, right])), 2)
            apart = left != right
            left, right = left[apart], right[apart]
            np.minimum.at(self._parent, np.maximum(left, right), np.minimum(left, right))

    def _up(self, labels: LabelArray) -> LabelArray:
        """Climb to the roots, and halve the paths there."""
        above = self._parent[labels]
        while not np.array_equal(higher := self._parent[above], above):
            self._parent[labels] = above = higher
        return above

    def reasons(self) -> tuple[LabelArray, list[str]]:
        """Return for every label an index into a list of reasons, or -1 where the label is free."""
        roots = self.roots()
        texts = list(dict.fromkeys(reason for _, reason in self._frozen))
        rank = {reason: index for index, reason in enumerate(texts)}
        first = np.full(len(roots), -1)
        for labels, reason in sorted(self._frozen, key=lambda item: -rank[item[1]]):  # what is set last stays
            first[roots[labels]] = rank[reason]
        return first[roots], texts


def _shortened(parent: LabelArray) -> LabelArray:
    """Return an array of its own in which all labels point to their roots."""
    while not np.array_equal(shorter := parent[parent], parent):
        parent = shorter
    return shorter
