"""Labels for the positions of tensors, and the union-find that says which of them share a fate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

LabelArray: TypeAlias = NDArray[np.int64]
Labels: TypeAlias = tuple[LabelArray | None, ...]
"""Per dimension of a tensor its labels, or None where the dimension holds no channels."""

_LABELS = "_lightning_prune_labels"
_ALL_LABELS = "_lightning_prune_all_labels"
_TAINT = "_lightning_prune_taint"


class LabelSpace:
    """A union-find over labels, vectorised: ties are collected and resolved together when somebody asks.

    Args:
        size: How many labels there are from the start.
    """

    def __init__(self, size: int = 0) -> None:
        self._parent: LabelArray = np.arange(size)
        self._size = size
        self._ties: list[tuple[LabelArray, LabelArray]] = []
        self._frozen: list[tuple[LabelArray, str]] = []

    def fresh(self, count: int) -> LabelArray:
        """Make `count` labels that nothing else carries yet."""
        self._size += count
        return np.arange(self._size - count, self._size)

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


class Flow:
    """What handlers work with: the labels that tensors carry while the model runs.

    Args:
        space: Where labels come from and are tied.

    Attributes:
        made: The labels that operations with weights made, in order.
        unknown: The operations without a handler that labels went into.
        current: The operation that runs, and its arguments: after a failure, the one that failed.
    """

    def __init__(self, space: LabelSpace) -> None:
        self.space = space
        self.made: list[LabelArray] = []
        self.unknown: set[str] = set()
        self.current: tuple[str, object] = ("", ())

    @staticmethod
    def of(tensor: Tensor) -> Labels:
        """Read the labels of a tensor."""
        labels: Labels | None = getattr(tensor, _LABELS, None)
        return (None,) * tensor.dim() if labels is None else labels

    @staticmethod
    def put(tensor: Tensor, labels: Sequence[LabelArray | None]) -> None:
        """Give a tensor its labels. A dimension of size 1 never carries any: it broadcasts."""
        kept = tuple(
            None if label is None or size == 1 else label for label, size in zip(labels, tensor.shape, strict=True)
        )
        setattr(tensor, _LABELS, kept)
        setattr(tensor, _ALL_LABELS, tuple(labels))

    @staticmethod
    def everything(tensor: Tensor) -> Labels:
        """Read the labels that a tensor was given, those of dimensions of size 1 too."""
        labels: Labels | None = getattr(tensor, _ALL_LABELS, None)
        return (None,) * tensor.dim() if labels is None else labels

    @staticmethod
    def is_labelled(tensor: Tensor) -> bool:
        """Tell whether any dimension carries labels."""
        return any(label is not None for label in getattr(tensor, _LABELS, ()))

    def tie(self, left: LabelArray | None, right: LabelArray | None, where: str) -> None:
        """Tie two dimensions; one that meets a dimension without channels is frozen."""
        if left is not None and right is not None:
            self.space.tie(left, right)
        else:
            self.freeze(left if right is None else right, f"meets a dimension that holds no channels in {where}")

    def freeze(self, labels: LabelArray | None, reason: str) -> None:
        """Freeze the labels of a dimension, if it has any."""
        if labels is not None:
            self.space.freeze(labels, reason)

    def freeze_tensor(self, tensor: Tensor, reason: str) -> None:
        """Freeze all dimensions of a tensor."""
        for labels in self.of(tensor):
            self.freeze(labels, reason)

    def fixed(self, count: int, reason: str) -> LabelArray:
        """Make labels that are frozen from the start, for positions that belong to no channel."""
        labels = self.space.fresh(count)
        self.space.freeze(labels, reason)
        return labels

    def make(self, labels: LabelArray | None) -> None:
        """Note that an operation makes these channels: its weights give a group its name."""
        if labels is not None:
            self.made.append(labels)

    @staticmethod
    def taint(tensor: Tensor, labels: LabelArray | None, reason: str) -> None:
        """Mark a tensor that holds channel numbers: the channels freeze as soon as anybody reads it."""
        if labels is not None:
            setattr(tensor, _TAINT, (labels, reason))

    def read_taint(self, tensor: Tensor) -> None:
        """Freeze what a tainted tensor is about, since it is being used."""
        taint: tuple[LabelArray, str] | None = getattr(tensor, _TAINT, None)
        if taint is not None:
            self.space.freeze(*taint)
