"""What a mask keeps or prunes as one: single weights, n of every m, or blocks."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Granularity(ABC):
    """What one unit of a mask is.

    All methods take weights as (out, in, *kernel): the weights of transposed convolutions are turned before.

    Attributes:
        size: Weights in a unit.
    """

    size: int = 1

    @abstractmethod
    def check(self, layer: str, shape: Sequence[int]) -> None:
        """See that a layer's weights divide into units.

        Raises:
            ValueError: They do not; layer and shape are named.
        """

    @abstractmethod
    def scores(self, weight: Tensor) -> Tensor:
        """Score the units of a layer, higher = keep."""

    @abstractmethod
    def units(self, mask: Tensor) -> Tensor:
        """Tell of each unit whether a mask over weights keeps any of it."""

    @abstractmethod
    def spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """Turn a mask over units into one over weights."""


class Weights(Granularity):
    """Each weight is a unit; score = |w|."""

    def check(self, layer: str, shape: Sequence[int]) -> None:
        """Accept any shape."""

    def scores(self, weight: Tensor) -> Tensor:
        """Return |w|."""
        return weight.detach().abs()

    def units(self, mask: Tensor) -> Tensor:
        """Return the mask itself."""
        return mask

    def spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the mask itself."""
        return units.view(tuple(shape))

    def __repr__(self) -> str:
        return "Weights()"


class NM(Weights):
    """The n largest of every m consecutive weights along the input dimension stay.

    Linear weights (out, in) and convolution weights (out, in, *kernel) are grouped along `in`; each position of a
    kernel has groups of its own. 2:4 is the pattern of NVIDIA's sparse tensor cores (Mishra et al. 2021, "Accelerating
    Sparse Deep Neural Networks"). The pattern says how many weights go, so no ratio and no allocation apply.

    Args:
        n: Weights that stay in each group, from 1.
        m: Weights in a group, more than n.

    Raises:
        ValueError: Not 1 <= n < m.
    """

    def __init__(self, n: int = 2, m: int = 4) -> None:
        if not (type(n) is int and type(m) is int and 1 <= n < m):
            raise ValueError(f"`n` of every `m` weights stay, whole numbers with 1 <= n < m; got {n}:{m}. Try 2:4.")
        self.n = n
        self.m = m

    def check(self, layer: str, shape: Sequence[int]) -> None:
        """See that m divides the input dimension."""
        if len(shape) < 2 or shape[1] % self.m:
            raise ValueError(
                f"The weight of {layer!r} has {shape[1] if len(shape) > 1 else 'no'} inputs (shape {tuple(shape)}, as "
                f"out, in, *kernel), which {self!r} cannot group by {self.m}. Put the layer in `ignore`, or choose an "
                "m that divides its inputs."
            )

    def keep(self, scores: Tensor) -> Tensor:
        """Mark the n highest scores of every m along dimension 1; of equal ones the first are not among them."""
        grouped = scores.unflatten(1, (-1, self.m))
        members = grouped.unbind(2)
        kept = torch.empty(grouped.shape, dtype=torch.bool, device=scores.device)
        for place, score in enumerate(members):
            rank = torch.zeros(score.shape, dtype=torch.int16, device=scores.device)
            for other, rival in enumerate(members):
                if other != place:
                    rank += (rival <= score) if other < place else (rival < score)
            torch.ge(rank, self.m - self.n, out=kept.select(2, place))
        return kept.flatten(1, 2)

    def __repr__(self) -> str:
        return f"NM({self.n}, {self.m})"


class Blocks(Granularity):
    """Blocks of weights over (out, in) go together; score = mean |w| of a block.

    score_b = 1 / (rows * columns) * sum of |w| over the block, after Narang et al. 2017 ("Block-Sparse Recurrent Neural
    Networks"), who take the maximum; the mean is the l1 norm at this constant size. Convolutions have such blocks at
    each position of their kernel.

    Args:
        rows: Outputs in a block, from 1.
        columns: Inputs in a block, from 1.

    Raises:
        ValueError: A side is below 1.
    """

    def __init__(self, rows: int = 4, columns: int = 4) -> None:
        if not (type(rows) is int and type(columns) is int and min(rows, columns) >= 1):
            raise ValueError(
                f"`rows` and `columns` are the sides of a block, whole numbers from 1; got {rows}x{columns}. Try 4x4."
            )
        self.rows = rows
        self.columns = columns
        self.size = rows * columns

    def check(self, layer: str, shape: Sequence[int]) -> None:
        """See that the sides of a block divide outputs and inputs."""
        if len(shape) < 2 or shape[0] % self.rows or shape[1] % self.columns:
            raise ValueError(
                f"The weight of {layer!r} has the shape {tuple(shape)} (out, in, *kernel), which blocks of {self.rows}x"
                f"{self.columns} do not divide. Put the layer in `ignore`, or choose blocks that divide it."
            )

    def scores(self, weight: Tensor) -> Tensor:
        """Return the mean |w| of each block, of shape (out / rows, in / columns, *kernel)."""
        magnitudes = weight.detach().abs()
        wide = torch.promote_types(magnitudes.dtype, torch.float32)
        means: Tensor = self._blocked(magnitudes).mean((1, 3), dtype=wide)
        return means

    def units(self, mask: Tensor) -> Tensor:
        """Tell of each block whether any of its weights is kept."""
        return self._blocked(mask).any(3).any(1)

    def spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """Repeat each block's value over its weights."""
        outer, inner = shape[0] // self.rows, shape[1] // self.columns
        blocks = units.reshape(outer, 1, inner, 1, *shape[2:])
        spread = blocks.expand(outer, self.rows, inner, self.columns, *shape[2:])
        return spread.reshape(tuple(shape))

    def _blocked(self, weight: Tensor) -> Tensor:
        outer, inner = weight.shape[0] // self.rows, weight.shape[1] // self.columns
        return weight.reshape(outer, self.rows, inner, self.columns, *weight.shape[2:])

    def __repr__(self) -> str:
        return f"Blocks({self.rows}, {self.columns})"


def granularity(kind: str | Granularity) -> Granularity:
    """Read what a unit of a mask is.

    Args:
        kind: "weights"; "n:m" with numbers, such as "2:4"; "blocks" (4x4) or their sides, such as "8x1"; or a
            `Granularity`, which is returned.

    Raises:
        ValueError: It is another string, or one with impossible numbers.
        TypeError: It is neither a string nor a `Granularity`.

    Example:
        >>> granularity("2:4"), granularity("blocks"), granularity("8x1")
        (NM(2, 4), Blocks(4, 4), Blocks(8, 1))
    """
    if isinstance(kind, Granularity):
        return kind
    if not isinstance(kind, str):
        raise TypeError(f"`granularity` is a string such as '2:4', or a Granularity; got {kind!r}.")
    if kind in _NAMED:
        return _NAMED[kind]()
    pair = re.fullmatch(r"(\d{1,9})([:x])(\d{1,9})", kind, re.ASCII)
    if pair is None:
        raise ValueError(
            "`granularity` of masks is 'weights', 'n:m' with numbers such as '2:4', 'blocks', or the sides of blocks "
            f"such as '8x1'; got {kind!r}."
        )
    first, second = int(pair[1]), int(pair[3])
    return NM(first, second) if pair[2] == ":" else Blocks(first, second)


_NAMED: dict[str, type[Granularity]] = {"weights": Weights, "blocks": Blocks}
