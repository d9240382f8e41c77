"""Channels with small weights go, a few at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_prune.allocation import Allocation
from lightning_prune.callbacks.base import PruneCallback
from lightning_prune.criteria import Magnitude
from lightning_prune.schedules import Schedule, cubic
from lightning_prune.types import Heads, Unit


class MagnitudePruneCallback(PruneCallback):
    """Prunes channels by the norm of their weights (Li et al. 2017; schedule: Zhu & Gupta 2017).

    Args:
        pruning_ratio: Fraction to be gone in the end, in [0, 1).
        p: Order of the norm, 1 or 2.
        allocation: `Uniform()` if None; norms of different layers compare only roughly.

    The other arguments are those of `PruneCallback`.

    Example:
        >>> callback = MagnitudePruneCallback(0.5, begin=2, end=8)
    """

    def __init__(
        self,
        pruning_ratio: float = 0.5,
        *,
        p: Literal[1, 2] = 2,
        of: Unit = "channels",
        allocation: Allocation | None = None,
        schedule: Schedule = cubic,
        begin: int | None = None,
        end: int | None = None,
        every: int = 1,
        every_n_steps: int | None = None,
        ignore: Sequence[str] = (),
        heads: Heads = "whole",
        min_channels: int = 1,
        round_to: int | None = None,
    ) -> None:
        super().__init__(
            pruning_ratio,
            of=of,
            criterion=Magnitude(p),
            allocation=allocation,
            schedule=schedule,
            begin=begin,
            end=end,
            every=every,
            every_n_steps=every_n_steps,
            ignore=ignore,
            heads=heads,
            min_channels=min_channels,
            round_to=round_to,
        )
