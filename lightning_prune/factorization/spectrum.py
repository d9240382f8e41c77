"""The best approximations of a convolution by two thinner ones, of all ranks at once."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from lightning_prune.factorization.outputs import Outputs
from lightning_prune.factorization.record import Kind


@dataclass(frozen=True)
class Spectrum:
    """The factors of full rank R, the most important channels between them first; all in float64 on the CPU.

    The first r channels are the best factors of rank r.

    Attributes:
        energies: What each channel holds, (R,), descending, 0 or more: squared singular values, or eigenvalues.
        first: The weight of the first factor, (R, c, kh, 1) or (R, c, kh, kw).
        second: The weight of the second factor, (n, R, 1, kw) or (n, R, 1, 1).
        mean: What the layer returns on average without its bias, (n,); None where no outputs were looked at.
    """

    energies: Tensor
    first: Tensor
    second: Tensor
    mean: Tensor | None = None

    @property
    def retained(self) -> Tensor:
        """The share of the energy that ranks 1, 2, ... R hold, (R,), in (0, 1]; 1 where there is no energy."""
        total = self.energies.sum()
        return (self.energies.cumsum(0) / total).clamp(max=1) if total else torch.ones_like(self.energies)

    def error(self, rank: int) -> float:
        """Return ||Y - Y_r|| / ||Y|| of what was approximated, in [0, 1]."""
        total = float(self.energies.sum())
        return sqrt(float(self.energies[rank:].sum()) / total) if total else 0.0

    def bias(self, rank: int, bias: Tensor | None) -> Tensor | None:
        """Return the bias of the second factor: b + m - U U' m, m the mean, so that it is met exactly."""
        if self.mean is None:
            return bias
        basis = self.second[:, :rank, 0, 0]
        offset = self.mean - basis @ (basis.T @ self.mean)
        return offset if bias is None else bias.to(offset) + offset


def spectrum_of(conv: nn.Conv2d, kind: Kind, outputs: Outputs | None = None) -> Spectrum:
    """Decompose a convolution.

    Args:
        conv: The layer, its weight finite.
        kind: How it is split.
        outputs: What it returns; with it, the best approximations of that in place of those of the weight.
    """
    weight = conv.weight.detach().to("cpu", torch.float64)
    if kind == "spatial":
        return _spatial(weight)
    if outputs is None:
        basis, values, _ = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        return _projected(weight, basis, values.square())
    energies, basis = torch.linalg.eigh(outputs.covariance)
    best = slice(min(weight.shape[0], weight[0].numel()))
    bias = 0 if conv.bias is None else conv.bias.detach().to(outputs.mean)
    return _projected(weight, basis.flip(1)[:, best], energies.flip(0).clamp(min=0)[best], outputs.mean - bias)


def _spatial(weight: Tensor) -> Spectrum:
    """W[n, c, y, x] = sum_r V[r, c, y] H[n, r, x], by the SVD of W arranged as (c kh, n kw)."""
    n, c, height, width = weight.shape
    left, values, right = torch.linalg.svd(weight.permute(1, 2, 0, 3).reshape(c * height, n * width), False)
    root = values.sqrt()
    first = (left * root).T.reshape(-1, c, height, 1)
    second = (root[:, None] * right).reshape(-1, n, width).transpose(0, 1).unsqueeze(2)
    return Spectrum(values.square(), first, second)


def _projected(weight: Tensor, basis: Tensor, energies: Tensor, mean: Tensor | None = None) -> Spectrum:
    """W -> U U' W, with U of shape (n, R) orthonormal."""
    first = (basis.T @ weight.flatten(1)).unflatten(1, weight.shape[1:])
    return Spectrum(energies, first, basis[:, :, None, None], mean)
