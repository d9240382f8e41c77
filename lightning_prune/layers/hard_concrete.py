"""A gate between 0 and 1 that is exactly 0, and exactly 1, with a probability above 0."""

from __future__ import annotations

from math import log, pi
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.layers.gate import Gate

NODES = 33
REACH = 2.8
"""Nodes of the quadrature of E[z], and how far they reach; see `HardConcrete.mean`."""


class HardConcrete(Gate):
    """The hard concrete gate of Louizos, Welling and Kingma 2018 ("L0 regularization", arXiv 1712.01312, eq. 10 to 13).

    s = sigmoid((log u - log(1 - u) + log_alpha) / beta), z = clamp(s (zeta - gamma) + gamma, 0, 1), u uniform;
    P(z > t) = sigmoid(log_alpha - beta log((t - gamma) / (zeta - t))) for t in [0, 1), whence P(z != 0) and P(z = 1);
    test gate: clamp(sigmoid(log_alpha) (zeta - gamma) + gamma, 0, 1), which has no beta. With the defaults it is 0 from
    log_alpha = -log 11 down, although P(z != 0) is still 0.31 there, and 1 from log 11 up.

    Samples are differentiable in log_alpha: the gradient is unbiased for these gates, and biased for 0/1 gates.

    Args:
        shape: See `Gate`.
        drop_rate: See `Gate`; P(z != 0) starts from .952, .920 or .832 for .2, .3 or .5.
        guarded: See `Gate`.
        beta: Temperature, above 0; the lower, the closer the gates come to 0 and 1.
        gamma: Where s is stretched to from 0; below 0.
        zeta: Where s is stretched to from 1; above 1.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        *shape: int,
        drop_rate: float = 0.5,
        guarded: bool = True,
        beta: float = 2 / 3,
        gamma: float = -0.1,
        zeta: float = 1.1,
    ) -> None:
        if not 0 < beta < float("inf"):
            raise ValueError(f"`beta` is the temperature of the gates, above 0; got {beta}. The paper has 2/3.")
        if not -float("inf") < gamma < 0:
            raise ValueError(
                f"`gamma` is the lower end of the stretched gates, below 0; got {gamma}. The paper has -0.1."
            )
        if not 1 < zeta < float("inf"):
            raise ValueError(f"`zeta` is the upper end of the stretched gates, above 1; got {zeta}. The paper has 1.1.")
        super().__init__(*shape, drop_rate=drop_rate, guarded=guarded)
        self.beta = beta
        self.gamma = gamma
        self.zeta = zeta

    @property
    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "beta": self.beta, "gamma": self.gamma, "zeta": self.zeta}

    @property
    @override
    def closes_at(self) -> float:
        return log(-self.gamma / self.zeta)

    @override
    def open_probability(self) -> Tensor:
        """Return P(z != 0) = sigmoid(log_alpha - beta log(-gamma / zeta)), of `shape`."""
        return torch.sigmoid(self.log_alpha.float() - self.beta * log(-self.gamma / self.zeta))

    @override
    def full_probability(self) -> Tensor:
        """Return P(z = 1) = sigmoid(log_alpha - beta log((1 - gamma) / (zeta - 1))), of `shape`."""
        return torch.sigmoid(self.log_alpha.float() - self.beta * log((1 - self.gamma) / (self.zeta - 1)))

    @override
    def mean(self) -> Tensor:
        """Return E[z] = integral of P(z > t) for t from 0 to 1, of `shape`, which has no elementary form.

        It is summed over 33 nodes of the tanh-sinh rule (Takahasi and Mori 1974), t = sigmoid(pi sinh k), which crowd
        at both ends, where P(z > t) is steep. Off by less than 1e-6 for beta up to 2; by 1e-3 at beta = 5.
        """
        return super().mean()

    @override
    def _sample(self, log_alpha: Tensor, noise: Tensor) -> Tensor:
        return self._stretched(torch.sigmoid((log_alpha + noise) / self.beta))

    @override
    def _test_values(self, log_alpha: Tensor) -> Tensor:
        return self._stretched(torch.sigmoid(log_alpha))

    @override
    def _mean(self, log_alpha: Tensor) -> Tensor:
        # nodes are made here: a buffer would lose its digits in `.half()`, and its values on the meta device
        k = torch.linspace(-REACH, REACH, NODES, dtype=torch.float32, device=log_alpha.device)
        t, rest = torch.sigmoid(pi * k.sinh()), torch.sigmoid(-pi * k.sinh())
        weights = 2 * REACH / (NODES - 1) * pi * k.cosh() * t * rest
        above = torch.sigmoid(log_alpha.unsqueeze(-1) - self.beta * ((t - self.gamma) / (self.zeta - t)).log())
        return (above * weights).sum(-1)

    def _stretched(self, share: Tensor) -> Tensor:
        return (share * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)
