"""The LASSO on moments: which channels, weighted, give the target when few may speak.

Throughout, `gram` is G = Z'Z / n and `target` is t = Z'y / n, for rows Z (n, c) and y (n,), and b minimises

    1/2 b'Gb - t'b + alpha |b|_1,

which is the objective of scikit-learn's `Lasso(fit_intercept=False)` less the constant |y|^2 / 2n. Sums instead of
means scale alpha by n and change nothing else. With r = t - Gb, b is optimal where r_j = alpha sign(b_j) for the active
channels and |r_j| <= alpha for the others. He, Zhang, Sun 2017 ("Channel Pruning", arXiv 1707.06168, eq. 1) choose the
channels of a layer so. Results are float64, on the CPU.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
import torch
from torch import Tensor

from lightning_prune.errors import PruningError
from lightning_prune.homotopy import DEPENDENT, Floats, largest_alpha, stretches

_SILENT = 1e-14  # the share of the largest energy below which a channel has none
_SWEEPS = 10  # over the channels that move, between two looks at all


def lasso(
    gram: Tensor,
    target: Tensor,
    alpha: float,
    *,
    start: Tensor | None = None,
    tolerance: float = 1e-10,
    most: int = 10_000,
) -> Tensor:
    """Solve for one alpha by coordinate descent.

    Friedman, Hastie, Tibshirani 2010 (covariance updates, active sets).

    Args:
        gram: G, (c, c), symmetric and positive semidefinite.
        target: t, (c,).
        alpha: The weight of |b|_1, at least 0, in units of the target: from max |t| on, all coefficients are 0.
        start: Coefficients (c,) to set out from; None starts from 0.
        tolerance: By how much r may miss the conditions above, as a share of max |t|.
        most: Sweeps over the channels after which to give up.

    Returns:
        The coefficients, (c,).

    Raises:
        ValueError: Shapes or values that are none of these.
        PruningError: `most` sweeps were not enough.

    >>> lasso(torch.eye(3), torch.tensor([3.0, -2.0, 0.5]), alpha=1.0)
    tensor([ 2., -1.,  0.], dtype=torch.float64)
    """
    gram, target = _checked(gram, target)
    if not 0 <= alpha < inf:
        raise ValueError(f"`alpha` weighs the sum of the coefficients, at least 0; got {alpha}. 0 is least squares.")
    coefficients = np.zeros(len(target))
    if start is not None:
        coefficients[:] = _vector(start, "start", len(target)).numpy()
    rows, aims = gram.numpy(), target.numpy()
    allowed = tolerance * np.abs(aims).max()
    for done in itertools.count(0, _SWEEPS):
        rest = aims - rows @ coefficients
        missed = np.where(
            coefficients != 0, np.abs(rest - alpha * np.sign(coefficients)), np.maximum(np.abs(rest) - alpha, 0)
        )
        if missed.max() <= allowed:
            return torch.from_numpy(coefficients)
        if done >= most:
            break
        moving = np.flatnonzero((coefficients != 0) | (missed > 0)).tolist()
        for _ in range(_SWEEPS):
            _sweep(rows, rest, coefficients, alpha, moving)
    raise PruningError(
        f"`lasso` misses its optimum by {missed.max():.1e} after {done} sweeps, more than the {allowed:.1e} allowed. "
        "Raise `most` or `tolerance`, or take `lasso_path`, which needs no sweeps."
    )


def _sweep(gram: Floats, rest: Floats, coefficients: Floats, alpha: float, moving: list[int]) -> None:
    """Minimise over one coefficient after the other, keeping `rest` = t - Gb."""
    for j in moving:
        before, energy = coefficients[j], gram[j, j]
        pull = rest[j] + energy * before
        coefficients[j] = np.sign(pull) * (abs(pull) - alpha) / energy if abs(pull) > alpha else 0.0
        if coefficients[j] != before:
            rest -= (coefficients[j] - before) * gram[j]


@dataclass(frozen=True)
class LassoPath:
    """All solutions at once: they move linearly in alpha from one knot to the next.

    Attributes:
        alphas: Of the knots, (k,), falling from max |t|.
        coefficients: At the knots, (k, c).
        entered: Channels in the order in which they first became active.
    """

    alphas: Tensor
    coefficients: Tensor
    entered: tuple[int, ...]

    def at(self, alpha: float) -> Tensor:
        """Return the coefficients (c,) at an alpha.

        Raises:
            ValueError: The path was not followed that far.
        """
        last = float(self.alphas[-1])
        if not last <= alpha:
            raise ValueError(f"`alpha` is at least {last:.6g}, where this path ends; got {alpha}. Follow it further.")
        after = int((self.alphas > alpha).sum())
        if after == 0:
            return self.coefficients[0].clone()
        high, low = self.alphas[after - 1], self.alphas[after]
        return torch.lerp(self.coefficients[after], self.coefficients[after - 1], (alpha - low) / (high - low))


def lasso_path(gram: Tensor, target: Tensor, most: int | None = None) -> LassoPath:
    """Follow the solutions from the alpha at which the first channel becomes active down to 0.

    Osborne, Presnell, Turlach 2000; Efron et al. 2004 ("LARS", section 3.1). At each knot one channel becomes active or
    falls silent. A channel that the active ones explain (see `DEPENDENT`) does not enter; of equal ones, only one does.
    Where channels explain each other so nearly that float64 cannot tell signs, or after 20 knots a channel, the path
    ends above 0.

    Args:
        gram: G, (c, c), symmetric and positive semidefinite.
        target: t, (c,).
        most: End with the first stretch on which so many channels are active, 1..c; None goes down to alpha = 0.

    Raises:
        ValueError: Shapes or values that are none of these.

    >>> path = lasso_path(torch.eye(3), torch.tensor([3.0, -2.0, 0.5]))
    >>> path.alphas.tolist(), path.entered
    ([3.0, 2.0, 0.5, 0.0], (0, 1, 2))
    >>> path.at(1.0)
    tensor([ 2., -1.,  0.], dtype=torch.float64)
    """
    gram, target = _checked(gram, target)
    if most is not None:
        _check_count(most, len(target), "most")
    alphas, knots, entered = [largest_alpha(target)], [np.zeros(len(target))], dict[int, None]()
    for stretch in stretches(gram, target):
        if stretch.end == alphas[-1]:
            continue
        alphas.append(stretch.end)
        knots.append(np.zeros(len(target)))
        knots[-1][stretch.active] = stretch.coefficients
        entered.update(dict.fromkeys(stretch.active.tolist()))
        if len(stretch.active) == most:
            break
    return LassoPath(torch.tensor(alphas, dtype=torch.float64), torch.from_numpy(np.stack(knots)), tuple(entered))


def choose(gram: Tensor, target: Tensor, count: int) -> Tensor:
    """Choose exactly `count` channels: those active at the largest alpha at which so many are.

    Channels become active and fall silent one at a time, so that the path meets every count up to its longest. Beyond
    it, where the remaining channels are silent or explained by others, those follow that lower the squared error most.

    Args:
        gram: G, (c, c), symmetric and positive semidefinite.
        target: t, (c,).
        count: How many, 1..c.

    Returns:
        Their indices, ascending.

    Raises:
        ValueError: Shapes or values that are none of these.
    """
    gram, target = _checked(gram, target)
    _check_count(count, len(target), "count")
    active: list[int] = []
    for stretch in stretches(gram, target):
        active = sorted(stretch.active.tolist())
        if len(active) == count:
            return torch.tensor(active)
    explained = _Explained(gram, target)
    for channel in active:
        explained.take(channel)
    while len(explained.order) < count:
        explained.take(int(explained.gains().argmax()))
    return torch.tensor(explained.order).sort().values


def nested_errors(gram: Tensor, target: Tensor, energy: float, order: Tensor) -> Tensor:
    """Return the least squares error e - t_S' G_SS^-1 t_S with the first 0, 1, ..., c channels of an order as S.

    One Cholesky decomposition in that order gives all of them; channels that earlier ones explain lower nothing.

    Args:
        gram: G, (c, c), symmetric and positive semidefinite.
        target: t, (c,).
        energy: e = y'y / n, what is missed without any channel.
        order: Of the channels, a permutation of 0..c-1.

    Returns:
        In units of `energy`, (c + 1,); never negative, never rising.

    Raises:
        ValueError: Shapes or values that are none of these.

    >>> nested_errors(torch.eye(3), torch.tensor([3.0, -2.0, 0.5]), 14.0, torch.tensor([1, 0, 2]))
    tensor([14.0000, 10.0000,  1.0000,  0.7500], dtype=torch.float64)
    """
    gram, target = _checked(gram, target)
    if not 0 <= energy < inf:
        raise ValueError(f"`energy` is the mean square of the target, at least 0; got {energy}.")
    if not torch.equal(order.sort().values.cpu(), torch.arange(len(target))):
        raise ValueError(f"`order` names each of the {len(target)} channels once; got {order.tolist()}.")
    explained = _Explained(gram, target)
    lowered = torch.tensor([0.0] + [explained.take(channel) for channel in order.tolist()], dtype=torch.float64)
    return (energy - lowered.cumsum(0)).clamp(min=0)


class _Explained:
    """What the channels taken so far explain, of the others and of the target: rows of a Cholesky decomposition."""

    def __init__(self, gram: Tensor, target: Tensor) -> None:
        self.gram = gram
        self.order: list[int] = []
        self._rows = torch.empty_like(gram)
        self._rank = 0
        self._energy = gram.diagonal().clone()
        self._target = target.clone()

    def gains(self) -> Tensor:
        """Return by how much each channel would lower the squared error, (c,); -1 for those taken."""
        free = self._energy > DEPENDENT * self.gram.diagonal()
        gains = torch.where(free, self._target.square() / self._energy, 0.0)
        gains[self.order] = -1.0
        return gains

    def take(self, channel: int) -> float:
        """Take a channel, and return by how much it lowers the squared error."""
        self.order.append(channel)
        energy = float(self._energy[channel])
        if energy <= DEPENDENT * float(self.gram[channel, channel]):
            return 0.0
        rows = self._rows[: self._rank]
        row = torch.addmv(self.gram[channel], rows.T, rows[:, channel], alpha=-1).div_(sqrt(energy))
        gain = float(self._target[channel]) / sqrt(energy)
        self._energy.addcmul_(row, row, value=-1)
        self._target.add_(row, alpha=-gain)
        self._rows[self._rank] = row
        self._rank += 1
        return gain * gain


def _checked(gram: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as float64 on the CPU, with zeros for channels that are silent but for rounding."""
    if gram.ndim != 2 or len(gram) != gram.shape[1] or not len(gram):
        raise ValueError(f"`gram` holds the products of channels with channels, (c, c); got shape {tuple(gram.shape)}.")
    target = _vector(target, "target", len(gram))
    gram = gram.detach().to("cpu", torch.float64).contiguous()
    if not gram.isfinite().all():
        raise ValueError("`gram` holds values that are not finite; look for them among the rows it was summed over.")
    energies = gram.diagonal()
    if not torch.allclose(gram, gram.T, rtol=0, atol=1e-6 * float(energies.abs().max())):
        raise ValueError("`gram` is symmetric, Z'Z / n; got a matrix that is not.")
    loud = energies > _SILENT * energies.max()
    if loud.all():
        return gram, target
    return gram * loud * loud.unsqueeze(1), target * loud


def _vector(values: Tensor, name: str, length: int) -> Tensor:
    if values.shape != (length,):
        raise ValueError(f"`{name}` has one entry for each of the {length} channels; got shape {tuple(values.shape)}.")
    values = values.detach().to("cpu", torch.float64)
    if not values.isfinite().all():
        raise ValueError(f"`{name}` holds values that are not finite; look for them among the rows it was summed over.")
    return values


def _check_count(count: int, channels: int, name: str) -> None:
    if not 1 <= count <= channels:
        raise ValueError(f"`{name}` is a number of channels, 1..{channels}; got {count}.")
