"""What is small goes, a little at a time: channels, weights, or weights in a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_prune.allocation import Allocation, RoundTo, WeightAllocation
from lightning_prune.callbacks.masking import MaskPruneCallback, what_goes
from lightning_prune.callbacks.retraining import Retraining
from lightning_prune.criteria import Magnitude
from lightning_prune.masks.granularity import Granularity
from lightning_prune.reconstruction import Reconstruction
from lightning_prune.schedules import Schedule, cubic
from lightning_prune.types import Constants, Heads, Trunks, Unit


class MagnitudePruneCallback(MaskPruneCallback):
    """Prunes by magnitude (schedule: Zhu & Gupta 2017).

    With `granularity="channels"` channels with small norms are cut out (Li et al. 2017). All others mask single weights
    (Han et al. 2015, "Learning both Weights and Connections"), which are exactly 0 from then on, in the network and in
    every file, and cut out the channels that have no weights left.

    Args:
        pruning_ratio: Fraction to be gone in the end, in [0, 1); of channels (see `of`), or of weights.
        granularity: "channels", "weights", "2:4" or another n:m (n stay of every m consecutive inputs), "blocks" (of
            4 x 4 weights), sides such as "8x1", or a `Granularity`. A pattern n:m says itself how many weights go.
        p: Order of the norm of channels, 1 or 2.
        allocation: How the ratio is shared out: `Uniform()` if None, or `Global()`; for weights also `LAMP()`, `ERK()`,
            `StdThreshold(q)` (the paper's) and `PerLayer({...})`. Norms of different layers compare only roughly.
        retraining: How weights are retrained: learning rates, dropout, dead channels, rewinding, parts in turn;
            `Retraining()` if None. Not for channels.
        of: What the ratio of channels counts: "channels", "params", "macs", "memory" or "latency".

    The other arguments are those of `PruneCallback`; `heads`, `min_channels`, `round_to`, `constants` and `trunks` are
    about channels only.

    Raises:
        ValueError: An argument is out of its range, or does not go with the granularity.

    Example:
        >>> callback = MagnitudePruneCallback(0.5, begin=2, end=8)
        >>> callback = MagnitudePruneCallback(0.92, granularity="weights", retraining=Retraining(lr_factor=0.1))
    """

    def __init__(
        self,
        pruning_ratio: float = 0.5,
        *,
        granularity: str | Granularity = "channels",
        p: Literal[1, 2] = 2,
        of: Unit = "channels",
        allocation: Allocation | WeightAllocation | None = None,
        retraining: Retraining | None = None,
        schedule: Schedule = cubic,
        begin: int | None = None,
        end: int | None = None,
        every: int = 1,
        every_n_steps: int | None = None,
        ignore: Sequence[str] = (),
        heads: Heads = "whole",
        min_channels: int = 1,
        round_to: RoundTo = None,
        constants: Constants = "absorb",
        trunks: Trunks = "whole",
        recalibrate: int = 0,
        reconstruction: Reconstruction | None = None,
    ) -> None:
        unit, of_channels, of_weights = what_goes(granularity, allocation, of, retraining)
        super().__init__(
            pruning_ratio,
            granularity=unit,
            weight_allocation=of_weights,
            retraining=retraining,
            of=of,
            criterion=Magnitude(p),
            allocation=of_channels,
            schedule=schedule,
            begin=begin,
            end=end,
            every=every,
            every_n_steps=every_n_steps,
            ignore=ignore,
            heads=heads,
            min_channels=min_channels,
            round_to=round_to,
            constants=constants,
            trunks=trunks,
            recalibrate=recalibrate,
            reconstruction=reconstruction,
        )
