"""What stands behind norms: the Channel Equilibrium block or one of its branches, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

from lightning_prune.layers import BatchDecorrelation, ChannelEquilibrium, InstanceReweighting
from lightning_prune.layers.norms import channel_dim, num_channels

Branches: TypeAlias = Literal["both", "decorrelation", "reweighting"]
"""Channel Equilibrium, or its first branch alone, which becomes linear once trained, or its second."""


@dataclass(frozen=True)
class Equilibrium:
    """How blocks are made; see `ChannelEquilibrium`.

    Attributes:
        branches: "both", "decorrelation" or "reweighting".
        group_size: Channels that are decorrelated together, >= 1.
        iterations: Of Newton's method, >= 1.
        reduction: Channels / reduction is the width of the gate's hidden layer, >= 1.
        momentum: Weight of a new batch in the running statistics, in [0, 1].
        eps: Added to the variances, > 0.
        over_ranks: Whether the covariance is that of all ranks, in distributed training.

    Raises:
        ValueError: One of them is out of its range.
    """

    branches: Branches = "both"
    group_size: int = 16
    iterations: int = 3
    reduction: int = 4
    momentum: float = 0.1
    eps: float = 1e-5
    over_ranks: bool = True

    def __post_init__(self) -> None:
        if self.branches not in ("both", "decorrelation", "reweighting"):
            raise ValueError(f"`branches` is 'both', 'decorrelation' or 'reweighting'; got {self.branches!r}.")
        self._made("both", 1, 1)  # refuses what is out of its range

    def block(self, norm: nn.Module) -> ChannelEquilibrium | BatchDecorrelation | InstanceReweighting:
        """Make the block that goes behind a norm, on its device and in its dtype."""
        made = self._made(self.branches, num_channels(norm), channel_dim(norm))
        like = next(norm.parameters(), next(norm.buffers(), None))
        return made if like is None else made.to(like.device, like.dtype)

    def _made(
        self, branches: Branches, channels: int, dim: int
    ) -> ChannelEquilibrium | BatchDecorrelation | InstanceReweighting:
        shared: dict[str, Any] = {"momentum": self.momentum, "eps": self.eps, "over_ranks": self.over_ranks}
        shared["channel_dim"] = dim
        if branches == "reweighting":
            return InstanceReweighting(channels, reduction=self.reduction, **shared)
        shared |= {"group_size": self.group_size, "iterations": self.iterations}
        if branches == "decorrelation":
            return BatchDecorrelation(channels, **shared)
        return ChannelEquilibrium(channels, reduction=self.reduction, **shared)
