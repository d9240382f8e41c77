"""Second moments of what a layer reads and is to return: all that least squares and the LASSO need of the data.

Sums run over rows (see `sampling`), in float64; the rows are not kept. Under several processes the sums are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

_LEAST_PIVOT = 1e-10
"""Below this share of a column's energy, what a column has of its own counts as none."""


@dataclass(frozen=True)
class Fit:
    """What a least squares refit gives.

    Attributes:
        matrix: The new weights, (g, o, p).
        intercept: The new bias, (g, o); None where none was asked for.
        error: ||Y - X W' - b||_F / ||Y||_F over the rows, at least 0.
        ridge: What was added to the diagonal of the Gram matrix of columns of unit energy so that it has a factor.
    """

    matrix: Tensor
    intercept: Tensor | None
    error: float
    ridge: float


@dataclass(frozen=True)
class Responses:
    """What the channels of a layer's input have contributed to its output, as moments.

    With z_i the contribution of channel i to all outputs, less its mean: gram_ij = sum z_i' z_j, target_i = sum z_i' y.

    Attributes:
        gram: (channels, channels), positive semidefinite.
        target: (channels,).
        energy: sum y'y, above 0 unless the layer's output is constant.
    """

    gram: Tensor
    target: Tensor
    energy: float

    def of(self, members: Tensor) -> Responses:
        """Return those of channels that lie at several positions each; what no member holds counts as given.

        Args:
            members: Integer tensor (size, k): the positions of each channel along the layer's input.
        """
        members = members.to(self.gram.device)
        belongs = self.gram.new_zeros(len(self.gram), len(members))
        belongs[members.flatten(), torch.arange(len(members)).repeat_interleave(members.shape[1])] = 1
        rest = 1 - belongs.sum(1)
        left = self.target - self.gram @ rest
        energy = self.energy - float(rest @ (self.target + left))
        return Responses(belongs.T @ self.gram @ belongs, belongs.T @ left, max(energy, 0.0))


def joined(parts: Iterable[tuple[Responses, float]]) -> Responses:
    """Return what channels contribute to several layers together, each counted in shares of its output's energy.

    Args:
        parts: What they contribute to each layer, and the energy of all of its output.
    """
    shares = [(part, 1 / energy if energy else 0.0) for part, energy in parts]
    return Responses(
        torch.stack([part.gram * share for part, share in shares]).sum(0),
        torch.stack([part.target * share for part, share in shares]).sum(0),
        sum(part.energy * share for part, share in shares),
    )


class Moments:
    """The sums of products of all that a layer reads, X, and of that with what it is to return, Y.

    Args:
        groups: Convolution groups, g.
        inputs: Columns of X in each, p.
        outputs: Columns of Y in each, o.
        device: Where they are kept.

    Attributes:
        rows: How many rows were taken in.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device | None = None) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.rows = 0
        self._xx, self._xy, self._yy = zeros(inputs, inputs), zeros(inputs, outputs), zeros(outputs)
        self._x, self._y = zeros(inputs), zeros(outputs)

    @property
    def nbytes(self) -> int:
        """The memory that they take."""
        return sum(part.nbytes for part in self._parts)

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self._xx, self._xy, self._yy, self._x, self._y

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take rows in.

        Args:
            x: Of shape (rows, g, p).
            y: Of shape (rows, g, o).
        """
        x, y = (rows.transpose(0, 1).to(self._xx) for rows in (x, y))
        self.rows += x.shape[1]
        self._xx.baddbmm_(x.mT, x)
        self._xy.baddbmm_(x.mT, y)
        self._yy += y.square().sum(1)
        self._x += x.sum(1)
        self._y += y.sum(1)

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Add up those of all processes.

        Args:
            all_reduce: Sums a tensor over all processes.
        """
        for part in self._parts:
            part.copy_(all_reduce(part))
        self.rows = int(all_reduce(torch.tensor(float(self.rows), dtype=torch.float64, device=self._xx.device)))

    def without(self, gone: Tensor) -> Moments:
        """Return those of fewer columns of X.

        Args:
            gone: Of shape (g, p), true where a column goes; of each group as many.
        """
        stay = [torch.nonzero(~part).flatten().to(self._xx.device) for part in gone]
        fewer = object.__new__(Moments)
        fewer.rows, fewer._yy, fewer._y = self.rows, self._yy, self._y
        fewer._xx = torch.stack([part[left][:, left] for part, left in zip(self._xx, stay, strict=True)])
        fewer._xy = torch.stack([part[left] for part, left in zip(self._xy, stay, strict=True)])
        fewer._x = torch.stack([part[left] for part, left in zip(self._x, stay, strict=True)])
        return fewer

    def responses(self, matrix: Tensor, taps: int, scale: Tensor | None = None) -> Responses:
        """Return what each channel of the input contributes through the layer's weights.

        Args:
            matrix: The weights, (g, o, p).
            taps: Columns that each channel has.
            scale: What each output counts, (g, o); 1 if None.
        """
        weight = matrix.to(self._xx) if scale is None else matrix.to(self._xx) * scale.to(self._xx).unsqueeze(-1)
        gram, cross, energy = self._centred(with_mean=False)
        if scale is not None:
            cross, energy = cross * scale.to(cross).unsqueeze(1), energy * scale.to(energy).square()
        along = by_channel((cross * weight.mT).sum(2), taps, 1)
        return Responses(among_channels(gram, weight, taps), along.flatten(), float(energy.sum()))

    def refit(self, matrix: Tensor, *, intercept: bool = True, ridge: float = 0.0) -> Fit:
        """Return the weights, near the given ones where the rows leave a choice, that reproduce Y best.

        Solved is min_D ||Y - X (W + D)' - b||^2 + ridge * e ||D||^2 for the change D, where e is the mean energy of
        the columns: what is seldom or faintly seen changes little. Beside it, where columns depend on each other, a
        ridge over columns of unit energy grows from 0 until the Gram matrix can be factorised in float64.

        Args:
            matrix: The weights to start from, W of shape (g, o, p).
            intercept: Whether there is a bias b to be fitted.
            ridge: Of the changes, in parts of the mean energy, 0 or more.
        """
        weight = matrix.to(self._xx)
        gram, cross, energy = self._centred(with_mean=not intercept)
        change, used = _solve(gram, cross - gram @ weight.mT, self._xx.diagonal(dim1=1, dim2=2), ridge)
        fitted = weight + change.mT
        offset = (self._y - (fitted @ self._x.unsqueeze(-1)).squeeze(-1)) / max(self.rows, 1) if intercept else None
        return Fit(fitted, offset, self._error(fitted, gram, cross, energy), used)

    def error(self, matrix: Tensor, bias: Tensor | None = None) -> float:
        """Return ||Y - X W' - b||_F / ||Y||_F of given weights.

        Args:
            matrix: The weights, (g, o, p).
            bias: (g, o); 0 if None.
        """
        weight = matrix.to(self._xx)
        gram, cross, energy = self._centred(with_mean=False)
        offset = torch.zeros_like(self._y) if bias is None else bias.to(self._y)
        shift = self._y / max(self.rows, 1) - (weight @ self._x.unsqueeze(-1)).squeeze(-1) / max(self.rows, 1) - offset
        return self._error(weight, gram, cross, energy, self.rows * float(shift.square().sum()))

    def _centred(self, *, with_mean: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return X'X, X'Y and the diagonal of Y'Y, of rows less their mean unless that stays."""
        if with_mean or not self.rows:
            return self._xx, self._xy, self._yy
        x, y = self._x / sqrt(self.rows), self._y / sqrt(self.rows)
        gram = torch.baddbmm(self._xx, x.unsqueeze(2), x.unsqueeze(1), alpha=-1)
        cross = torch.baddbmm(self._xy, x.unsqueeze(2), y.unsqueeze(1), alpha=-1)
        return gram, cross, (self._yy - y.square()).clamp(min=0)

    def _error(self, weight: Tensor, gram: Tensor, cross: Tensor, energy: Tensor, more: float = 0.0) -> float:
        left = energy.sum() - 2 * (weight.mT * cross).sum() + ((weight @ gram) * weight).sum()
        whole = float(self._yy.sum())
        return sqrt(max(float(left) + more, 0.0) / whole) if whole else 0.0


def among_channels(gram: Tensor, weight: Tensor, taps: int) -> Tensor:
    """Return the products of what the channels contribute through weights, from those of the columns.

    Args:
        gram: X'X, (g, p, p).
        weight: (g, o, p).
        taps: Columns that each channel has.

    Returns:
        Of shape (channels, channels): the outputs of different convolution groups have nothing to do with each other.
    """
    among = by_channel(by_channel(gram * (weight.mT @ weight), taps, 2), taps, 1)
    blocks: Tensor = torch.block_diag(*among)
    return blocks


def by_channel(values: Tensor, taps: int, dim: int) -> Tensor:
    """Sum columns along a dimension over the taps of each channel."""
    parts: Tensor = values.unflatten(dim, (-1, taps))
    return parts.sum(dim + 1)


def _solve(gram: Tensor, right: Tensor, whole: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Solve for each group; columns that are 0 throughout, or next to nothing of their whole energy, give 0.

    Returns:
        The solution, and how much more than the ridge it took.
    """
    energy = gram.diagonal(dim1=1, dim2=2)
    silent = energy <= torch.maximum(_LEAST_PIVOT**2 * energy.amax(1, keepdim=True), _LEAST_PIVOT * whole)
    scale = torch.where(silent, 0.0, energy.clamp(min=torch.finfo(energy.dtype).tiny).rsqrt())
    unit = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
    unit.diagonal(dim1=1, dim2=2)[silent] = 1
    if ridge:
        unit += torch.diag_embed(ridge * energy.mean(1, keepdim=True) * scale.square())
    more = 0.0
    while True:
        ridged = unit if not more else unit + more * torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
        factor, info = torch.linalg.cholesky_ex(ridged)
        pivots = factor.diagonal(dim1=1, dim2=2)
        if not info.any() and bool((pivots.square() >= _LEAST_PIVOT / 2).all()):
            break
        more = max(10 * more, _LEAST_PIVOT)
    return torch.cholesky_solve(right * scale.unsqueeze(2), factor) * scale.unsqueeze(2), more
