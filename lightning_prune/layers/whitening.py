"""Whitening: the covariance of channels in groups, over all ranks, and Newton's iteration to its inverse root."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_reduce


@dataclass(frozen=True)
class Moments:
    """What is known of d channels in each of g groups, on n examples, less a shift that keeps the digits.

    Attributes:
        shift: About the mean; the covariance is the same with any: (g, d).
        mean: Of each example: (n, g, d).
        second: Of each example, the mean product of two channels of a group: (n, g, d, d).
    """

    shift: Tensor
    mean: Tensor
    second: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Look at channels at s positions, (n, g, d, s)."""
        shift = x[0].detach().mean(-1)
        mean, second = _Means.apply(x - shift.unsqueeze(-1))
        return cls(shift, mean, second)

    def variance(self) -> Tensor:
        """Return the variance of each example's channels over its positions, >= 0: (n, g, d)."""
        return (self.second.diagonal(dim1=-2, dim2=-1) - self.mean.square()).clamp_min(0.0)

    def covariance(self, *, over_ranks: bool) -> Tensor:
        """Return the covariance of channels over all examples and positions, of all ranks: (g, d, d)."""
        mean, second = self.mean.mean(0), self.second.mean(0)
        covariance = second - _square(mean)
        if not (over_ranks and _has_ranks()):
            return covariance
        examples = len(self.mean)
        away = mean + self.shift
        away = away - mean_of_ranks(away, examples)
        return mean_of_ranks(covariance + _square(away), examples)


def mean_of_ranks(values: Tensor, examples: int) -> Tensor:
    """Return the mean over all ranks' examples of what each rank has as the mean over its own; gradients flow."""
    if not _has_ranks():
        return values
    total: Tensor = all_reduce(torch.cat([values.flatten() * examples, values.new_full((1,), examples)]))
    return (total[:-1] / total[-1]).view_as(values)


def inverse_root(covariance: Tensor, *, iterations: int, eps: float) -> Tensor:
    """Approach the inverse root of covariances that are normalised by their trace.

        N = (Sigma + eps I) / tr(Sigma + eps I),  P_0 = I,  P_k = (3 P_{k-1} - P_{k-1}^3 N) / 2  ->  N^(-1/2)

    in the coupled form Y_k = Y_{k-1} S, P_k = S P_{k-1} with S = (3 I - P_{k-1} Y_{k-1}) / 2 and Y_0 = N. Both are
    the same in exact arithmetic; beyond about 15 iterations the one above lets rounding grow without bound, and this
    one does not (Higham 2008, "Functions of Matrices", section 6.3).

    Args:
        covariance: Symmetric, positive semidefinite: (..., d, d).
        iterations: T, >= 0. Three, as the paper has it, raise an eigenvalue of 1/4, 1/16, 1/64 of the trace by 1.95,
            2.87, 3.23, where its inverse root is 2, 4, 8.
        eps: Added to the diagonal, >= 0.

    Returns:
        P_T, (..., d, d).
    """
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    raised = covariance + eps * identity
    trace = raised.diagonal(dim1=-2, dim2=-1).sum(-1)
    root, inverse = raised / trace[..., None, None], identity.expand_as(raised)
    for _ in range(iterations):
        step = 1.5 * identity - 0.5 * inverse @ root
        root, inverse = root @ step, step @ inverse
    return inverse


class _Means(torch.autograd.Function):
    """Means of x and of x x^T over positions, (..., d, s) -> (..., d), (..., d, d), with one product backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(-1), x @ x.mT / x.shape[-1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, mean: Tensor, second: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        factor, rest = (second + second.mT) / x.shape[-1], mean.unsqueeze(-1) / x.shape[-1]
        batch = x.shape[:-2]
        flat = torch.baddbmm(*(each.reshape(-1, *each.shape[-2:]) for each in (rest, factor, x)))
        return flat.view(*batch, *flat.shape[-2:])


def _has_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _square(mean: Tensor) -> Tensor:
    return mean.unsqueeze(-1) * mean.unsqueeze(-2)
