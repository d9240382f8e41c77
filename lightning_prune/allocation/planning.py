"""Scores and a ratio become a plan: how many channels each group gives, and which ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_prune.allocation.base import Allocation
from lightning_prune.allocation.limits import Limits
from lightning_prune.types import PruningPlan


def allocate(
    scores: Mapping[str, Tensor],
    ratio: float,
    allocation: Allocation,
    limits: Limits | None = None,
    dense: Mapping[str, int] | None = None,
) -> PruningPlan:
    """Choose the channels that go: of each group the lowest scores, by a stable sort and a count.

    Args:
        scores: Group name -> scores of its channels, higher = keep.
        ratio: Fraction of the dense channels to be gone afterwards, in [0, 1).
        allocation: How the ratio is shared out.
        limits: What no plan goes beyond.
        dense: Group name -> channels of the dense model; None says that nothing has gone yet.

    Returns:
        The plan; what gives less than the allocation alone would take stands in its `held_back`.

    Raises:
        ValueError: The ratio would leave no channel in any group.
        TypeError: The allocation is one of weights only.
    """
    if not isinstance(allocation, Allocation):
        raise TypeError(
            f"`allocation` {allocation!r} shares weights out, not channels. Use Uniform() or Global() here, or prune "
            "weights with it."
        )
    if not scores:
        return PruningPlan({})
    limits = limits or Limits()
    dense = dense or {name: len(values) for name, values in scores.items()}
    nothing = dict.fromkeys(scores, 0)
    least = {
        name: min(len(values), max(limits.min_channels, allocation.spared(dense[name], len(values))))
        for name, values in scores.items()
    }
    wanted = allocation.widths(scores, dense, ratio, nothing)
    if ratio < 1 and scores.keys() == dense.keys() and not any(wanted.values()):
        raise ValueError(
            f"`pruning_ratio` {ratio} would leave no channel in any of the {len(scores)} groups (the largest has "
            f"{max(map(len, scores.values()))}); ask for less."
        )
    given = allocation.widths(scores, dense, ratio, least)
    removed, held_back = {}, {}
    for name, values in scores.items():
        width = given[name]
        if width < len(values):
            width = limits.rounded(width, least[name], len(values))
        if width < len(values):
            removed[name] = lowest(values, len(values) - width)
        if width > wanted[name] and dense[name] > 1:
            held_back[name] = _reason(limits, allocation, wanted[name], given[name], width)
    return PruningPlan(removed, held_back)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the lowest scores, ascending; of equal ones the first."""
    return scores.argsort(stable=True)[:count].sort().values


def _reason(limits: Limits, allocation: Allocation, wanted: int, given: int, width: int) -> str:
    causes = []
    if wanted < limits.min_channels:
        causes.append(f"min_channels={limits.min_channels}")
    if given > max(wanted, limits.min_channels):
        causes += [f"{name}={value}" for name in ("cap", "event_cap") if (value := getattr(allocation, name)) < 1]
    if width > given:
        causes.append(f"round_to={limits.round_to}")
    return f"keeps {width} channels in place of {wanted}: {', '.join(causes)}"
