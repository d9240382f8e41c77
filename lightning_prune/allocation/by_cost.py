"""The channels go first that lose little for what they cost, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from math import inf, isfinite
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_prune.allocation.base import Allocation, to_go
from lightning_prune.cost import COUNTED, Costs, PlannedCost
from lightning_prune.types import Unit

Scale: TypeAlias = Literal["raw", "median"]
"""What scores are measured in: in what the criterion gives, or in the median of all."""


class ByCost(Allocation):
    """One channel after the other goes, that whose loss is smallest for what it costs.

    Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning" (arXiv 1801.05787), minimise
    loss + beta * cost. So the next channel to go is one of the smallest

        score / scale - beta * saved,    or, without a beta,    score / saved

    where `saved` is what its removal saves at this moment, a fraction of the dense model's cost: all savings are worked
    out anew after every removal. Of equal ones the first goes; a group's last channel saves nothing. It goes with
    every criterion whose scores compare across layers.

    Args:
        beta: What the whole cost of the dense model is worth, in scores (see `scale`), 0 or more. A channel saves
            about 1/n of n channels' cost: with a beta of about n, cost and scores weigh alike. 0 looks at scores alone,
            as `Global` does. None takes the smallest score per saving, for which nothing has to be chosen; the paper
            finds that good for light pruning, and a beta better for heavy.
        of: What the cost counts: "params", "macs", "memory" or "latency".
        scale: "median" divides the scores by the median size of those that are not 0, so that the same beta suits
            criteria of any size; "raw" takes them as they are. Without a beta it makes no difference.
        cap: As for all allocations.
        event_cap: As for all allocations.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import prune
        >>> net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> record = prune(net, torch.zeros(1, 64), pruning_ratio=0.5, of="macs", allocation=ByCost())
        >>> net[0].out_features < net[2].out_features  # the first layer's channels have 64 weights each
        True
    """

    def __init__(
        self,
        beta: float | None = None,
        of: Unit = "macs",
        scale: Scale = "median",
        *,
        cap: float = 1.0,
        event_cap: float = 1.0,
    ) -> None:
        super().__init__(cap, event_cap)
        if beta is not None and not (beta >= 0 and isfinite(beta)):
            raise ValueError(
                f"`beta` is what the dense model's cost is worth, in scores, 0 or more; got {beta}. None needs no "
                "choice."
            )
        if of not in COUNTED:
            raise ValueError(
                f"`of` is what the cost counts, one of {', '.join(map(repr, COUNTED))}; got {of!r}. Where all channels "
                "cost the same, take Global()."
            )
        if scale not in get_args(Scale):
            raise ValueError(f"`scale` is what scores are measured in, 'raw' or 'median'; got {scale!r}.")
        self.beta = beta
        self.of = of
        self.scale = scale
        self._costs: Costs | None = None
        self._orders: dict[Any, list[str]] = {}

    def __repr__(self) -> str:
        caps = super().__repr__().removeprefix("ByCost(")
        return f"ByCost(beta={self.beta}, of={self.of!r}, scale={self.scale!r}{', ' * (caps != ')')}{caps}"

    def knowing(self, costs: Costs) -> ByCost:
        """Return the rule for a model whose costs are known; it remembers in which order channels go."""
        informed = copy(self)
        informed._costs, informed._orders = costs, {}
        return informed

    def widths(
        self, scores: Mapping[str, Tensor], dense: Mapping[str, int], ratio: float, least: Mapping[str, int]
    ) -> dict[str, int]:
        """Follow the order in which channels go, as far as the ratio asks; what may not go is passed over.

        Raises:
            ValueError: It is not known what channels cost (see `knowing`).
        """
        left = {name: len(values) for name, values in scores.items()}
        count = to_go(scores, dense, ratio)
        for name in self._order(scores, dense, least):
            if count <= 0:
                break
            if left[name] > least[name]:
                left[name] -= 1
                count -= 1
        return left

    def _order(self, scores: Mapping[str, Tensor], dense: Mapping[str, int], least: Mapping[str, int]) -> list[str]:
        """Return the groups in the order in which they give channels, worked out once for all ratios.

        A last channel saves nothing, so that it makes no difference to the others whether it goes: one order serves
        those who keep one and those who keep none.
        """
        floor = {name: 0 if count <= 1 else count for name, count in least.items()}
        ranked = {name: tuple(values.tolist()) for name, values in scores.items()}
        key = (tuple(ranked.items()), tuple(dense.items()), tuple(floor.items()))
        if key not in self._orders:
            self._orders[key] = self._removals(ranked, dense, floor)
        return self._orders[key]

    def _removals(
        self, scores: Mapping[str, Iterable[float]], dense: Mapping[str, int], least: Mapping[str, int]
    ) -> list[str]:
        """Remove one channel after the other, until all groups are at their least."""
        cost, whole = self._cost(dense)
        scale = _median(scores.values()) if self.scale == "median" else 1.0
        losses = {name: [score / scale for score in sorted(values, reverse=True)] for name, values in scores.items()}
        losses = {name: values[least[name] :] for name, values in losses.items() if len(values) > least[name]}
        ranks = {name: self._rank(values[-1], cost.saving(name) / whole) for name, values in losses.items()}
        order = []
        while ranks:
            name = min(ranks, key=ranks.__getitem__)
            order.append(name)
            losses[name].pop()
            changed = cost.remove(name) if cost.widths[name] > 1 else [name]
            if not losses[name]:
                del ranks[name]
            for other in changed:
                if other in ranks:
                    ranks[other] = self._rank(losses[other][-1], cost.saving(other) / whole)
        return order

    def _cost(self, dense: Mapping[str, int]) -> tuple[PlannedCost, float]:
        """Return the cost of what there is now, and that of the dense model."""
        if self._costs is None:
            raise ValueError(
                "ByCost does not know what channels cost. Say `allocation.knowing(Costs(model, graph))`, or let "
                "`prune` or a callback do so."
            )
        cost = self._costs.of(self.of)
        return cost, cost.at(dense) or 1.0

    def _rank(self, loss: float, saved: float) -> tuple[float, float]:
        """Return what is smallest for the next channel to go; where that ties, the loss decides."""
        if self.beta is not None:
            return loss - self.beta * saved, loss
        return loss / saved if saved else inf, loss


def _median(scores: Iterable[Iterable[float]]) -> float:
    """Return the median size of the scores that are not 0, or 1 if all are."""
    sizes = torch.tensor([abs(score) for values in scores for score in values if score], dtype=torch.float64)
    return float(sizes.median()) if len(sizes) else 1.0
