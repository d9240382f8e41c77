"""Runs that differ in nothing but the seed, taken together: their mean and spread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_prune.sweeps.runs import Run


@dataclass(frozen=True)
class Spread:
    """Some values in two numbers.

    Attributes:
        mean: Their mean.
        std: Their sample standard deviation, sqrt(sum (x - mean)^2 / (n - 1)); None of a single one.
        n: How many they are.
    """

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in nothing but the seed.

    Attributes:
        runs: By seed.
        settings: What they have in common, but for the seed: name -> value.
    """

    runs: tuple[Run, ...]
    settings: dict[str, str]

    @property
    def id(self) -> str:
        """Return a name that stays the same when the report is written again."""
        return f"group-{self.runs[0].id}"

    @property
    def seeds(self) -> int:
        """Return how many different seeds they have; the same run may have been done twice."""
        return len({run.seed for run in self.runs})

    def spread(self, figure: Callable[[Run], float | None]) -> Spread | None:
        """Return mean and spread of a figure over the runs that have it; None if none has."""
        return spread([value for run in self.runs if (value := figure(run)) is not None])

    def cost(self, name: str) -> Spread | None:
        """Return mean and spread of a cost of the pruned network."""
        return self.spread(lambda run: run.costs[name].pruned if name in run.costs else None)


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean and sample standard deviation of values; None of no values.

    >>> spread([0.90, 0.94])
    Spread(mean=0.92, std=0.028..., n=2)
    """
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), std, len(values))


def seed_groups(runs: Iterable[Run]) -> tuple[SeedGroup, ...]:
    """Group runs by all settings but the seed, in the order of their first runs."""
    found: dict[tuple[tuple[str, str], ...], list[Run]] = defaultdict(list)
    for run in runs:
        found[tuple(sorted(run.settings.items()))].append(run)
    return tuple(
        SeedGroup(tuple(sorted(alike, key=lambda run: (run.seed is None, run.seed or 0, run.name))), dict(key))
        for key, alike in found.items()
    )


def varying(groups: Sequence[SeedGroup]) -> tuple[str, ...]:
    """Return the settings in which groups differ: data, model and method first, the others by name."""
    names = {name for group in groups for name in group.settings}
    differ = {name for name in names if len({group.settings.get(name) for group in groups}) > 1}
    first = [name for name in ("data", "model", "method") if name in differ]
    return (*first, *sorted(differ.difference(first)))


def common(groups: Sequence[SeedGroup]) -> dict[str, str]:
    """Return the settings that all groups share."""
    differ = varying(groups)
    return {name: value for name, value in (groups[0].settings if groups else {}).items() if name not in differ}
