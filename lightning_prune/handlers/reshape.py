"""A reshape merges and splits dimensions: how their labels merge and split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from lightning_prune.labels import Flow, LabelArray


def reshape(
    flow: Flow, labels: Sequence[LabelArray | None], old: Sequence[int], new: Sequence[int], where: str
) -> list[LabelArray | None]:
    """Carry labels from shape `old` to shape `new`, block by block of dimensions with equal products."""
    result: list[LabelArray | None] = [None] * len(new)
    for old_dims, new_dims in _blocks(old, new):
        merged = _merge(flow, [labels[dim] for dim in old_dims], [old[dim] for dim in old_dims], where)
        if merged is not None:
            for dim, part in zip(new_dims, _split(flow, merged, [new[dim] for dim in new_dims]), strict=True):
                result[dim] = part
    return result


def _blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the shortest runs of dimensions that hold the same elements; sizes of 1 belong to none."""
    if 0 in old:
        return
    lefts = [dim for dim, size in enumerate(old) if size > 1]
    rights = [dim for dim, size in enumerate(new) if size > 1]
    while lefts:
        block, image = [lefts.pop(0)], [rights.pop(0)]
        while (have := prod(old[dim] for dim in block)) != (want := prod(new[dim] for dim in image)):
            if have < want:
                block.append(lefts.pop(0))
            else:
                image.append(rights.pop(0))
        yield block, image


def _merge(flow: Flow, labels: Sequence[LabelArray | None], sizes: Sequence[int], where: str) -> LabelArray | None:
    """Repeat the labels of the one labelled dimension; of several the largest goes on and the others freeze."""
    labelled = [dim for dim, part in enumerate(labels) if part is not None]
    if not labelled:
        return None
    keep = max(labelled, key=lambda dim: sizes[dim])
    for dim in labelled:
        if dim != keep:
            flow.freeze(labels[dim], f"is merged with a larger dimension of channels in {where}")
    kept = labels[keep]
    assert kept is not None
    along = [size if dim == keep else 1 for dim, size in enumerate(sizes)]
    return np.broadcast_to(kept.reshape(along), tuple(sizes)).reshape(-1)


def _split(flow: Flow, labels: LabelArray, sizes: Sequence[int]) -> list[LabelArray | None]:
    """Split labels over several dimensions; where several would vary, the innermost stays free and ties the rest."""
    if len(sizes) == 1:
        return [labels]
    box = labels.reshape(tuple(sizes))
    varying = _varying(box)
    if len(varying) > 1:
        varying = _varying(flow.space.roots()[box])
    result: list[LabelArray | None] = [None] * len(sizes)
    if varying:
        free = varying[-1]
        corner = tuple(slice(None) if axis == free else 0 for axis in range(len(sizes)))
        result[free] = box[corner]
        if len(varying) > 1 or len(_varying(box)) > 1:
            along = [size if axis == free else 1 for axis, size in enumerate(sizes)]
            flow.space.tie(box, box[corner].reshape(along))
    else:
        result[-1] = box[(0,) * (len(sizes) - 1)]
    return result


def _varying(box: LabelArray) -> list[int]:
    """List the axes along which the labels differ."""
    return [axis for axis in range(box.ndim) if (box != box.take([0], axis)).any()]
