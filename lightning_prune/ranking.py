"""The lowest of many numbers, found by counting digits: exact under ties, and without sorting anything.

A float's bits, read as an integer, are ordered as the floats are. So the n-th lowest of any number of tensors is found
digit by digit, 16 bits at a time: a histogram of the first digit says which bin it lies in, one of the second digit
within that bin says where there. Each pass reads the tensors piece by piece; nothing as large as they are is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

_DIGIT = 16
_PIECE = 2**20
"""So many elements are read at a time: 4 MiB of float32."""


def lowest(values: Tensor, count: int) -> Tensor:
    """Mark the lowest values; of equal ones the first.

    Args:
        values: Real numbers without NaN, of any shape.
        count: How many are marked; 0 where it is negative, all where it is larger than there are.

    Returns:
        A bool tensor of the same shape.

    Example:
        >>> lowest(torch.tensor([2.0, 1.0, 2.0, 3.0]), 2)
        tensor([ True,  True, False, False])
    """
    if count <= 0 or count >= values.numel():
        return torch.full(values.shape, count > 0, dtype=torch.bool, device=values.device)
    kind = _ranked_as([values])
    bound, left, ties = _nth_lowest([values], count, kind)
    marked = torch.empty(values.numel(), dtype=torch.bool, device=values.device)
    place = 0
    for keys in _keys(values, kind):
        here = marked[place : place + len(keys)]
        torch.le(keys, bound, out=here)
        if left < ties:
            equal = (keys == bound).nonzero().squeeze(1)
            here[equal[left:]] = False
            left, ties = max(left - len(equal), 0), ties - len(equal)
        place += len(keys)
    return marked.view(values.shape)


def shares_of_lowest(tensors: Sequence[Tensor], count: int, most: Sequence[int]) -> list[int]:
    """Count how many of the lowest values of all tensors together each of them holds.

    Args:
        tensors: Real numbers without NaN; equal ones count in the order of the tensors.
        count: How many values are meant.
        most: At most so many of each tensor; what one may not give the others do, as far as they can.

    Example:
        >>> shares_of_lowest([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0, 4.0])], 3, most=[2, 1])
        [2, 1]
    """
    shares: dict[int, int] = {}
    while True:
        rest = [place for place in range(len(tensors)) if place not in shares]
        found = dict(zip(rest, _shares([tensors[place] for place in rest], count - sum(shares.values())), strict=True))
        full = {place: most[place] for place, share in found.items() if share > most[place]}
        if not full:
            return [{**found, **shares}[place] for place in range(len(tensors))]
        shares |= full


def _shares(tensors: Sequence[Tensor], count: int) -> list[int]:
    sizes = [tensor.numel() for tensor in tensors]
    if count <= 0 or count >= sum(sizes):
        return sizes if count > 0 else [0] * len(sizes)
    kind = _ranked_as(tensors)
    bound, left, _ = _nth_lowest(tensors, count, kind)
    shares = [sum(int((keys < bound).count_nonzero()) for keys in _keys(tensor, kind)) for tensor in tensors]
    for place, tensor in enumerate(tensors):
        if left:
            equal = min(left, sum(int((keys == bound).count_nonzero()) for keys in _keys(tensor, kind)))
            shares[place] += equal
            left -= equal
    return shares


def _ranked_as(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the type in which all of them can be compared without rounding."""
    return torch.float64 if any(tensor.dtype is torch.float64 for tensor in tensors) else torch.float32


def _keys(values: Tensor, kind: torch.dtype) -> Iterator[Tensor]:
    """Yield the values piece by piece as integers in the same order: negative floats count downwards, so flip them."""
    integer = torch.int64 if kind is torch.float64 else torch.int32
    low_bits = torch.iinfo(integer).max
    for piece in values.detach().reshape(-1).split(_PIECE):
        bits = piece.to(kind).view(integer)
        yield bits ^ ((bits >> (8 * integer.itemsize - 1)) & low_bits)


def _nth_lowest(tensors: Sequence[Tensor], count: int, kind: torch.dtype) -> tuple[int, int, int]:
    """Return the key of the n-th lowest value, how many of its equals are among the n, and how many there are."""
    shifts = range(8 * kind.itemsize - _DIGIT, -1, -_DIGIT)
    found, equal, left = 0, 0, count
    for shift in shifts:
        first = (found << _DIGIT) if shift != shifts[0] else -(1 << (_DIGIT - 1))
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for keys in chain.from_iterable(_keys(tensor, kind) for tensor in tensors):
            digits = (keys >> shift).sub_(first)
            if shift != shifts[0]:
                digits = digits[(digits >= 0) & (digits < 1 << _DIGIT)]
            histogram += digits.bincount(minlength=1 << _DIGIT).cpu()
        upto = histogram.cumsum(0)
        digit = int(torch.searchsorted(upto, left))
        equal = int(histogram[digit])
        left -= int(upto[digit]) - equal
        found = first + digit
    return found, left, equal
