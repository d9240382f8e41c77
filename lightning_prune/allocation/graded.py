"""Allocations that say how much one group gives beside another, whatever its scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from math import floor, isfinite
from typing import ClassVar

from torch import Tensor

from lightning_prune.allocation.base import Allocation, to_go

_HALVINGS = 60


class Graded(Allocation):
    """Groups keep fractions of their dense channels that a level says, higher for one than for another."""

    asks_scores: ClassVar[bool] = False

    @abstractmethod
    def kept_at(self, level: float, names: list[str]) -> dict[str, float]:
        """Return the fraction of its dense channels that each group keeps.

        Args:
            level: From 0, where nothing is kept, to 1, where all is; no fraction falls as it rises.
            names: The groups in the order in which the model makes them.
        """

    def widths(
        self, scores: Mapping[str, Tensor], dense: Mapping[str, int], ratio: float, least: Mapping[str, int]
    ) -> dict[str, int]:
        """Find the level at which the ratio is reached."""
        wanted = to_go(scores, dense, ratio)

        def at(level: float) -> dict[str, int]:
            kept = self.kept_at(level, list(scores))
            return {
                name: min(max(floor(kept[name] * dense[name] + 0.5), least[name]), len(values))
                for name, values in scores.items()
            }

        def gone(widths: Mapping[str, int]) -> int:
            return sum(len(values) - widths[name] for name, values in scores.items())

        return at(_highest(lambda level: gone(at(level)) >= wanted))


class ShallowToDeep(Graded):
    """Deep groups keep more than shallow ones, whose channels repeat each other more.

    He, Zhang, Sun 2017 ("Channel Pruning", arXiv 1707.06168, section 4.1.2) let the first stages of VGG-16 keep a
    fraction and the fourth 1.5 times that. Here the fraction rises from group to group, by the same factor each time,
    up to 1.

    Args:
        factor: How much more the last group keeps than the first, above 0; 1 is `Uniform()`.
        cap: As for all allocations.
        event_cap: As for all allocations.

    Raises:
        ValueError: `factor` is not above 0.

    >>> import torch
    >>> scores = {name: torch.arange(12.0) for name in "abc"}
    >>> ShallowToDeep(1.5).widths(scores, dict.fromkeys(scores, 12), 0.5, dict.fromkeys(scores, 1))
    {'a': 5, 'b': 6, 'c': 7}
    """

    def __init__(self, factor: float = 1.5, *, cap: float = 1.0, event_cap: float = 1.0) -> None:
        super().__init__(cap, event_cap)
        if not (isfinite(factor) and factor > 0):
            raise ValueError(f"`factor` is how much more the last group keeps than the first, above 0; got {factor}.")
        self.factor = factor

    def __repr__(self) -> str:
        return f"ShallowToDeep({self.factor}{_caps(super().__repr__())})"

    def kept_at(self, level: float, names: list[str]) -> dict[str, float]:
        """Let the fraction rise with the depth."""
        last = max(len(names) - 1, 1)
        rises = [self.factor ** (place / last) for place in range(len(names))]
        return {name: min(level * rise / min(rises), 1.0) for name, rise in zip(names, rises, strict=True)}


class InProportion(Graded):
    """Groups give in proportion to what each can bear, as a scan of their sensitivity has found.

    Args:
        bearable: Pattern of group names (`fnmatch` style) -> the fraction that such a group can bear to lose alone, in
            [0, 1], as `Sensitivity.thresholds` of a scan of channels gives it. A group that no pattern matches gives
            nothing; of several the first counts.
        cap: As for all allocations.
        event_cap: As for all allocations.

    Raises:
        ValueError: There is no fraction above 0, or one outside [0, 1].

    >>> import torch
    >>> scores = {name: torch.arange(10.0) for name in ("conv1", "conv2")}
    >>> InProportion({"conv1": 0.2, "*": 0.6}).widths(scores, dict.fromkeys(scores, 10), 0.4, dict.fromkeys(scores, 1))
    {'conv1': 8, 'conv2': 4}
    """

    def __init__(self, bearable: Mapping[str, float], *, cap: float = 1.0, event_cap: float = 1.0) -> None:
        super().__init__(cap, event_cap)
        wrong = {pattern: share for pattern, share in bearable.items() if not 0 <= share <= 1}
        if wrong or not any(bearable.values()):
            raise ValueError(
                f"`bearable` maps patterns of group names to fractions in [0, 1], one of them above 0; got {bearable}."
            )
        self.bearable = dict(bearable)

    def __repr__(self) -> str:
        return f"InProportion({self.bearable}{_caps(super().__repr__())})"

    def kept_at(self, level: float, names: list[str]) -> dict[str, float]:
        """Take of each group a multiple of what it can bear; at level 0 all of those that can bear anything."""
        shares = {name: self._share(name) for name in names}
        smallest = min((share for share in shares.values() if share), default=1.0)
        return {name: max(1 - (1 - level) * share / smallest, 0.0) for name, share in shares.items()}

    def _share(self, name: str) -> float:
        return next((share for pattern, share in self.bearable.items() if fnmatchcase(name, pattern)), 0.0)


def _caps(told: str) -> str:
    """Return the caps in what `Allocation` says of itself, behind a comma."""
    caps = told.partition("(")[2].removesuffix(")")
    return f", {caps}" if caps else ""


def _highest(is_enough: Callable[[float], bool]) -> float:
    """Return the highest level at which enough goes; 0 where even that is not enough."""
    low, high = 0.0, 1.0
    if is_enough(high):
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_enough(middle) else (low, middle)
    return low
