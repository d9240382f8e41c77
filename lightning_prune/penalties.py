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

    With `delta` it is the smooth-L1 that the paper names as an alternative (section 3), strength * sum h(theta):
    h(theta) = theta^2 / (2 delta) where |theta| < delta, and |theta| - delta / 2 elsewhere. The gradient is strength *
    clamp(theta / delta, -1, 1); the proximal step, with t = lr * strength, is
    theta <- sign(theta) * max(|theta| - t, |theta| * delta / (delta + t)).

    Args:
        strength: lambda, > 0. The parameters travel by at most strength * sum(lr) / (1 - momentum).
        update: One of the two, or "auto".
        delta: Half-width of the rounded corner at 0, >= 0; 0 leaves it sharp. Inside of it a parameter decays
            exponentially and rests, where a subgradient keeps jumping over 0; no parameter gets to exactly 0. Choose
            it between lr * strength, below which a gradient overshoots, and what counts as zero, such as 1e-3.

    Raises:
        ValueError: `strength` is not positive, `update` is unknown, or `delta` is negative.
    """

    def __init__(self, strength: float, update: Update = "auto", delta: float = 0.0) -> None:
        if not 0 < strength < float("inf"):
            raise ValueError(f"`strength` is the lambda of the penalty, above 0; got {strength}. The paper has 1e-4.")
        if update not in UPDATES:
            raise ValueError(f"`update` is one of {', '.join(map(repr, UPDATES))}; got {update!r}.")
        if not 0 <= delta < float("inf"):
            raise ValueError(
                f"`delta` is the half-width of smooth-L1's rounded corner, 0 or more; got {delta}. 0 is plain L1."
            )
        self.strength = strength
        self.update = update
        self.delta = delta

    def update_for(self, optimizer: Optimizer) -> Update:
        """Return how the penalty enters for an optimizer."""
        if self.update != "auto":
            return self.update
        return "subgradient" if isinstance(optimizer, SGD) else "proximal"

    @torch.no_grad()
    def add_to_gradients(self, parameters: Sequence[Tensor], share: float = 1.0) -> None:
        """Add the penalty's gradient to those of the parameters that have one.

        Args:
            parameters: What is penalised.
            share: Fraction of the strength; negative for an optimizer that maximizes.
        """
        pairs = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        if pairs and share:
            slopes = self._slopes([parameter for parameter, _ in pairs])
            torch._foreach_add_([gradient for _, gradient in pairs], slopes, alpha=self.strength * share)

    def _slopes(self, parameters: list[Tensor]) -> tuple[Tensor, ...]:
        if not self.delta:
            return torch._foreach_sign(parameters)
        slopes = torch._foreach_div(parameters, self.delta)
        torch._foreach_clamp_min_(slopes, -1.0)
        torch._foreach_clamp_max_(slopes, 1.0)
        return slopes

    @torch.no_grad()
    def shrink(self, parameters: Sequence[Tensor], lr: float | Tensor, share: float = 1.0) -> None:
        """Take a proximal step of length lr * strength.

        Args:
            parameters: What is penalised.
            lr: Of their param group; a tensor is not read, so that nothing waits for the device.
            share: Fraction of the strength.
        """
        if parameters and share:
            stride = lr * (self.strength * share)
            size = torch._foreach_abs(list(parameters))
            rounded = torch._foreach_mul(size, self.delta / (self.delta + stride)) if self.delta else None
            torch._foreach_add_(size, -stride)
            if rounded is None:
                torch._foreach_clamp_min_(size, 0.0)
            else:
                torch._foreach_maximum_(size, rounded)
            torch._foreach_sign_(list(parameters))
            torch._foreach_mul_(list(parameters), size)
