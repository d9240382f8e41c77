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
        self.allocations: list[tuple[int, int]] = []
        self.decisions: list[tuple[int, ...]] = []

    def fresh(self, count: int) -> LabelArray:
        """Make `count` labels that nothing else carries yet."""
        self.allocations.append((self._size, count))
        self._size += count
        return np.arange(self._size - count, self._size)

    def decide(self, compute: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """Make a decision that depends on what is tied so far, and remember it."""
        self.decisions.append(compute())
        return self.decisions[-1]

    def tie(self, left: LabelArray, right: LabelArray) -> None:
        """Say that the labels live or die together, element by element (arrays broadcast)."""
        if left is not right:
            self._ties.append((left, right))

    def freeze(self, labels: LabelArray, reason: str) -> None:
        """Say that the labels must live; the first reason given is the one that is kept."""
        self._frozen.append((labels, reason))

    def roots(self) -> LabelArray:
        """Return for every label the smallest label that it is tied to."""
        if len(self._parent) < self._size:
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), self._size)])
        if self._ties:
            pairs = [np.broadcast_arrays(left, right) for left, right in self._ties]
            self._ties.clear()
            left = np.concatenate([pair[0].ravel() for pair in pairs])
            right = np.concatenate([pair[1].ravel() for pair in pairs])
            self._resolve(left, right)
        return self._parent

    def _resolve(self, left: LabelArray, right: LabelArray) -> None:
        """Hook larger roots to smaller ones and halve the paths, until no tie has two roots."""
        parent = self._parent
        while len(left):
            left, right = parent[left], parent[right]
            apart = left != right
            left, right = left[apart], right[apart]
            np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
            shorter = parent[parent]
            while not np.array_equal(shorter, parent):
                parent = shorter
                shorter = parent[parent]
        self._parent = parent

    def reasons(self) -> tuple[LabelArray, list[str]]:
        """Return for every label an index into a list of reasons, or -1 where the label is free."""
        roots = self.roots()
        texts = list(dict.fromkeys(reason for _, reason in self._frozen))
        rank = {reason: index for index, reason in enumerate(texts)}
        first = np.full(len(roots), len(texts))
        for labels, reason in self._frozen:
            np.minimum.at(first, roots[labels], rank[reason])
        first[first == len(texts)] = -1
        return first[roots], texts
