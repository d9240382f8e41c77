"""Terms that are added while training, so that some channels become superfluous."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

Update: TypeAlias = Literal["auto", "subgradient", "proximal"]
"""How an L1 penalty enters: through the gradient, or as a soft-threshold after the step."""

UPDATES: tuple[Update, ...] = ("auto", "subgradient", "proximal")


class L1:
    """The penalty strength * sum |theta| of Liu et al. 2017 ("Network Slimming", equation 1).

    "subgradient" adds strength * sign(theta) to the gradient. "proximal" shrinks the parameters after the step:
    theta <- sign(theta) * max(|theta| - lr * strength, 0), which reaches exactly 0. Optimizers that rescale the
    gradient (Adam and its kin) cancel the strength of a subgradient, so "auto" gives them the proximal step.

    Args:
        strength: lambda, > 0. The parameters travel by at most strength * sum(lr) / (1 - momentum).
        update: One of the two, or "auto".

    Raises:
        ValueError: `strength` is not positive, or `update` is unknown.
    """

    def __init__(self, strength: float, update: Update = "auto") -> None:
        if not 0 < strength < float("inf"):
            raise ValueError(f"`strength` is the lambda of the penalty, above 0; got {strength}. The paper has 1e-4.")
        if update not in UPDATES:
            raise ValueError(f"`update` is one of {', '.join(map(repr, UPDATES))}; got {update!r}.")
        self.strength = strength
        self.update = update

    def update_for(self, optimizer: Optimizer) -> Update:
        """Return how the penalty enters for an optimizer."""
        if self.update != "auto":
            return self.update
        return "subgradient" if isinstance(optimizer, SGD) else "proximal"

    @torch.no_grad()
    def add_to_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add strength * sign(theta) to the gradients of those parameters that have one."""
        pairs = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        if pairs:
            signs = torch._foreach_sign([parameter for parameter, _ in pairs])
            torch._foreach_add_([gradient for _, gradient in pairs], signs, alpha=self.strength)

    @torch.no_grad()
    def shrink(self, parameters: Sequence[Tensor], lr: float) -> None:
        """Take a proximal step: soft-threshold by lr * strength."""
        if parameters:
            size = torch._foreach_abs(list(parameters))
            torch._foreach_sub_(size, lr * self.strength)
            torch._foreach_clamp_min_(size, 0.0)
            torch._foreach_sign_(list(parameters))
            torch._foreach_mul_(list(parameters), size)
