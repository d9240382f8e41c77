"""Values at the nodes of a quadrature over a normal z: what a tensor holds on average, and how it varies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_Z = torch.linspace(-6, 6, 65, dtype=torch.float64)
_WEIGHTS = torch.softmax(-_Z.square() / 2, 0)


@dataclass(frozen=True)
class Emission:
    """What a tensor of a run holds as far as it does not depend on the input.

    Attributes:
        values: Of shape (nodes, *shape), float64; one node where nothing varies, NaN where it is not known. Dimensions
            along which all is the same have stride 0.
        sources: The steps whose outputs it varies with.
    """

    values: Tensor
    sources: frozenset[int] = frozenset()

    @cached_property
    def mean(self) -> Tensor:
        """The average over the nodes, of the tensor's shape; dimensions without variation are of size 1."""
        return _average(compact(self.values))

    @cached_property
    def variance(self) -> Tensor:
        """The variance over the nodes, as `mean`."""
        return _average((compact(self.values) - self.mean).square_())

    def along(self, dim: int) -> Tensor:
        """Return the mean along a dimension, of its size; NaN if other dimensions vary."""
        return self._along(self.mean, dim)

    def spread_along(self, dim: int) -> Tensor:
        """Return the variance along a dimension, as `along`."""
        return self._along(self.variance, dim)

    def _along(self, compact: Tensor, dim: int) -> Tensor:
        size = self.values.shape[dim + 1]
        if compact.numel() != compact.shape[dim]:
            return torch.full((size,), torch.nan, dtype=torch.float64)
        return compact.flatten().expand(size)

    def expanded(self, shape: Sequence[int]) -> Emission:
        """Return it with its dimensions of size 1 expanded."""
        return Emission(self.values.expand(-1, *shape), self.sources)


def compact(values: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """Narrow the dimensions along which all is the same to size 1, but for the nodes."""
    for dim in range(1, values.dim()) if dims is None else dims:
        if values.shape[dim] > 1 and values.stride(dim) == 0:
            values = values.narrow(dim, 0, 1)
    return values


def _average(values: Tensor) -> Tensor:
    """Return the average over the nodes."""
    if len(values) == 1:
        return values[0]
    return (_WEIGHTS @ values.reshape(len(values), -1)).view(values.shape[1:])


def normal(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return the values of mean + deviation z at the nodes."""
    if not deviation.any():
        return mean.unsqueeze(0)
    return mean + deviation * _Z.view(-1, *[1] * mean.dim())


def is_even(values: Tensor, *dims: int) -> bool:
    """Tell whether all is the same along dimensions of the tensor, the nodes not counted."""
    return all(values.shape[dim + 1] == 1 or values.stride(dim + 1) == 0 for dim in dims)
