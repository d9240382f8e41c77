"""Dimensions that a view splits or merges: along which of the factors they are cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_prune.labels import LabelArray, LabelSpace
from lightning_prune.types import HEADS, Heads


def check_heads(heads: str) -> None:
    """Refuse what is none of the three.

    Raises:
        ValueError: `heads` is unknown.
    """
    if heads not in HEADS:
        known = ", ".join(map(repr, HEADS))
        raise ValueError(f"`heads` says how attention heads are cut, one of {known}; got {heads!r}.")


@dataclass(frozen=True, eq=False)
class Rectangle:
    """A dimension of channels seen as several factors, which must stay a rectangle when it is cut.

    Attributes:
        box: The labels of the dimension, with one axis for each factor.
        axes: The labels of each factor.
        merged: Whether the factors were there first, and a view has merged them.
        where: The operation.
    """

    box: LabelArray
    axes: tuple[LabelArray, ...]
    merged: bool
    where: str

    def cut_along(self, space: LabelSpace, axis: int, reason: str) -> None:
        """Let one factor be free: all that lies on a channel of it goes with it, and the other factors stay."""
        along = [size if place == axis else 1 for place, size in enumerate(self.box.shape)]
        space.tie(self.box, self.axes[axis].reshape(along))
        for place, labels in enumerate(self.axes):
            if place != axis:
                space.freeze(labels, reason)

    def keep(self, space: LabelSpace, reason: str) -> None:
        """Let nothing go."""
        for labels in (self.box, *self.axes):
            space.freeze(labels, reason)


def settle(
    space: LabelSpace, rectangles: Sequence[Rectangle], attended: Iterable[LabelArray], count: int, heads: Heads
) -> None:
    """Choose the factor along which each rectangle is cut.

    Where the factor is the heads of an attention, `heads` says it. Elsewhere a dimension that was split is cut along
    the innermost factor, and one that was merged along the largest that belongs to tensors of the model.

    Args:
        space: Where the labels are tied and frozen.
        rectangles: What views have split and merged.
        attended: The labels of dimensions that attentions treat one by one.
        count: The labels of the model's tensors are those below it.
        heads: How attention heads are cut.
    """
    undecided = list(rectangles)
    while undecided:
        state = _State(space, rectangles, attended, count)
        urgency = [state.urgency(rectangle) for rectangle in undecided]
        for rectangle, rank in zip(undecided, urgency, strict=True):
            if rank == min(urgency):
                _decide(space, state, rectangle, heads)
        undecided = [rectangle for rectangle, rank in zip(undecided, urgency, strict=True) if rank > min(urgency)]


def _decide(space: LabelSpace, state: _State, rectangle: Rectangle, heads: Heads) -> None:
    of_heads = [state.is_head(labels) for labels in rectangle.axes]
    if heads == "keep" and (any(of_heads) or state.is_head(rectangle.box)):
        rectangle.keep(space, "belongs to attention heads, which are kept")
    elif not any(of_heads):
        axis = state.best(rectangle, range(len(rectangle.axes)))
        relation = "is merged with another" if rectangle.merged else "is split off from another"
        rectangle.cut_along(space, axis, f"{relation} dimension that is cut, in {rectangle.where}")
    elif heads == "whole":
        axis = state.best(rectangle, [place for place, is_head in enumerate(of_heads) if is_head])
        rectangle.cut_along(space, axis, "lies inside attention heads, which are cut whole")
    else:
        axis = state.best(rectangle, [place for place, is_head in enumerate(of_heads) if not is_head] or [0])
        rectangle.cut_along(space, axis, "counts attention heads, which are cut inside")


class _State:
    """What is known of the labels between two decisions.

    Args:
        space: Where they are tied and frozen.
        rectangles: What views have split and merged; the factors of what belongs to the model belong to it too.
        attended: The labels of dimensions that attentions treat one by one.
        count: The labels of the model's tensors are those below it.
    """

    def __init__(
        self, space: LabelSpace, rectangles: Iterable[Rectangle], attended: Iterable[LabelArray], count: int
    ) -> None:
        self._roots = space.roots()
        size = len(self._roots)
        self._frozen = space.reasons()[0] >= 0
        self._real = np.zeros(size, dtype=bool)
        self._real[self._roots[:count]] = True
        for rectangle in rectangles:
            if not rectangle.merged and self._any(self._real, rectangle.box):
                for labels in rectangle.axes:
                    self._real[self._roots[labels]] = True
        self._head = np.zeros(size, dtype=bool)
        for labels in attended:
            self._head[self._roots[labels]] = True

    def is_head(self, labels: LabelArray) -> bool:
        """Tell whether an attention treats these positions one by one."""
        return self._any(self._head, labels)

    def urgency(self, rectangle: Rectangle) -> int:
        """Rank rectangles: what attention decides comes first, and splits before merges."""
        if any(self.is_head(labels) for labels in rectangle.axes):
            return 1 if rectangle.merged else 0
        if rectangle.merged:
            return 1 if self.is_head(rectangle.box) else 3
        return 2

    def best(self, rectangle: Rectangle, axes: Iterable[int]) -> int:
        """Choose among axes: one that may be cut and belongs to the model; then the largest, or the innermost."""

        def rank(axis: int) -> tuple[bool, bool, int]:
            labels = rectangle.axes[axis]
            free = not bool(self._frozen[labels].all())
            return free, self._any(self._real, labels), len(labels) if rectangle.merged else axis

        return max(axes, key=rank)

    def _any(self, marks: NDArray[np.bool_], labels: LabelArray) -> bool:
        return bool(marks[self._roots[labels]].any())
