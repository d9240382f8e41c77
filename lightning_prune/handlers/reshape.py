"""A reshape merges and splits dimensions: how their labels merge and split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from torch import Tensor

from lightning_prune.flow import Flow
from lightning_prune.labels import LabelArray
from lightning_prune.rectangles import Rectangle


@dataclass
class _Factor:
    """A factor that the sizes of an old and a new dimension have in common."""

    size: int
    old_dim: int
    new_dim: int


def reshape(flow: Flow, source: Tensor, out: Tensor, where: str) -> list[LabelArray | None]:
    """Carry labels from one shape to the other, factor by factor.

    Both shapes are refined to common factors: (2, 12) seen as (6, 4) is (2, 3, 4), where 12 splits into 3 and 4, and
    2 and 3 merge. Where there are no common factors, as between (4, 6) and (6, 4), the labels freeze.
    """
    labels = flow.of(source)
    result: list[LabelArray | None] = [None] * out.dim()
    old, new = flow.dense_shape(source), flow.dense_shape(out)
    if (pairs := _pairs(old, new, source.shape, out.shape)) is not None:
        for old_dim, new_dim in pairs:
            result[new_dim] = labels[old_dim]
        return result
    for old_dims, new_dims in _blocks(old, new):
        if all(labels[dim] is None for dim in old_dims):
            continue
        factors = _factors(old, new, old_dims, new_dims)
        if not factors or not _sized(factors, source.shape, out.shape):
            for dim in old_dims:
                flow.freeze(labels[dim], f"is reshaped to sizes without common factors in {where}")
            continue
        parts = [part for dim in old_dims for part in _split(flow, labels[dim], _of(factors, old_dim=dim), where)]
        of_factor = dict(zip(map(id, factors), parts, strict=True))
        for dim in new_dims:
            members = _of(factors, new_dim=dim)
            merged = [of_factor[id(factor)] for factor in members]
            result[dim] = _merge(flow, merged, [factor.size for factor in members], where)
    return result


def _pairs(
    old: Sequence[int], new: Sequence[int], old_now: Sequence[int], new_now: Sequence[int]
) -> list[tuple[int, int]] | None:
    """Return the old and the new dimensions in pairs, where sizes of 1 come and go and nothing else changes."""
    lefts, rights = _long(old), _long(new)
    if [(old[dim], old_now[dim]) for dim in lefts] != [(new[dim], new_now[dim]) for dim in rights] or 0 in old:
        return None
    return list(zip(lefts, rights, strict=True))


def _long(shape: Sequence[int]) -> list[int]:
    """List the dimensions of several positions."""
    return [dim for dim, size in enumerate(shape) if size > 1]


def _of(factors: Sequence[_Factor], *, old_dim: int | None = None, new_dim: int | None = None) -> list[_Factor]:
    return [factor for factor in factors if old_dim in (None, factor.old_dim) and new_dim in (None, factor.new_dim)]


def _blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the shortest runs of dimensions that hold the same elements; sizes of 1 belong to none."""
    if 0 in old:
        return
    lefts, rights = _long(old), _long(new)
    while lefts:
        block, image = [lefts.pop(0)], [rights.pop(0)]
        while (have := prod(old[dim] for dim in block)) != (want := prod(new[dim] for dim in image)):
            if have < want:
                block.append(lefts.pop(0))
            else:
                image.append(rights.pop(0))
        yield block, image


def _factors(old: Sequence[int], new: Sequence[int], old_dims: Sequence[int], new_dims: Sequence[int]) -> list[_Factor]:
    """Refine a block to common factors; none if there are no such."""
    factors: list[_Factor] = []
    lefts, rights = list(old_dims), list(new_dims)
    left, right = old[lefts[0]], new[rights[0]]
    while True:
        size = min(left, right)
        if left % size or right % size:
            return []
        factors.append(_Factor(size, lefts[0], rights[0]))
        left, right = left // size, right // size
        if left == 1:
            lefts.pop(0)
            left = old[lefts[0]] if lefts else 1
        if right == 1:
            rights.pop(0)
            right = new[rights[0]] if rights else 1
        if not lefts or not rights:
            return factors


def _sized(factors: Sequence[_Factor], old: Sequence[int], new: Sequence[int]) -> bool:
    """Give the factors of a dense model's shapes the sizes that they have in a cut model; tell whether that works.

    A factor that is a whole dimension has its size; one that is the last unknown of a dimension has what is left.
    """
    runs = [(old[dim], _of(factors, old_dim=dim)) for dim in {factor.old_dim: None for factor in factors}]
    runs += [(new[dim], _of(factors, new_dim=dim)) for dim in {factor.new_dim: None for factor in factors}]
    dense = {id(factor): factor.size for factor in factors}
    if all(size == prod(dense[id(factor)] for factor in run) for size, run in runs):
        return True
    known: dict[int, int] = {}
    for _ in factors:
        for size, run in runs:
            unknown = [factor for factor in run if id(factor) not in known]
            rest = prod(known[id(factor)] for factor in run if id(factor) in known)
            if len(unknown) == 1 and rest and size % rest == 0:
                known[id(unknown[0])] = unknown[0].size = size // rest
    return len(known) == len(factors) and all(size == prod(factor.size for factor in run) for size, run in runs)


def _merge(flow: Flow, labels: Sequence[LabelArray | None], sizes: Sequence[int], where: str) -> LabelArray | None:
    """Repeat the labels along what holds no channels; several factors with labels are a rectangle."""
    if len(sizes) == 1:
        return labels[0]
    axes = [part for part in labels if part is not None]
    if not axes:
        return None
    box = axes[0] if len(axes) == 1 else _box(flow, axes, where)
    along = [1 if part is None else size for part, size in zip(labels, sizes, strict=True)]
    return np.broadcast_to(box.reshape(along), tuple(sizes)).reshape(-1)


def _box(flow: Flow, axes: Sequence[LabelArray], where: str) -> LabelArray:
    """Return the labels that these very factors have been split from, or new ones."""
    for rectangle in reversed(flow.rectangles):
        same_count = not rectangle.merged and len(rectangle.axes) == len(axes)
        if same_count and all(map(np.array_equal, rectangle.axes, axes)):
            return rectangle.box
    shape = tuple(len(part) for part in axes)
    box = flow.space.fresh(prod(shape)).reshape(shape)
    flow.rectangles.append(Rectangle(box, tuple(axes), merged=True, where=where))
    return box


def _split(flow: Flow, labels: LabelArray | None, factors: Sequence[_Factor], where: str) -> list[LabelArray | None]:
    """Split labels over several factors; where several of them vary, which one is cut is settled at the end."""
    if labels is None or len(factors) == 1:
        return [labels] * len(factors)
    box = labels.reshape(tuple(factor.size for factor in factors))
    varying = flow.space.decide(lambda: _varying(flow, box))
    corner = tuple(slice(None) if axis in varying else 0 for axis in range(box.ndim))
    flow.space.tie(box, box[tuple(slice(None) if axis in varying else slice(1) for axis in range(box.ndim))])
    result: list[LabelArray | None] = [None] * box.ndim
    if len(varying) < 2:
        result[varying[0] if varying else -1] = box[corner] if varying else box[(0,) * (box.ndim - 1)]
        return result
    rectangle = box[corner]
    axes = tuple(flow.space.fresh(size) for size in rectangle.shape)
    flow.rectangles.append(Rectangle(rectangle, axes, merged=False, where=where))
    for axis, part in zip(varying, axes, strict=True):
        result[axis] = part
    return result


def _varying(flow: Flow, box: LabelArray) -> tuple[int, ...]:
    """List the axes along which the labels differ, also in the light of what has been tied so far."""
    varying = _differing(box)
    return _differing(flow.space.roots_of(box)) if len(varying) > 1 else varying


def _differing(box: LabelArray) -> tuple[int, ...]:
    return tuple(axis for axis in range(box.ndim) if (box != box.take([0], axis)).any())
