"""How gates are made and trained, as a user asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from math import inf, isfinite, log
from typing import Any, Literal, TypeAlias, get_args

from lightning_prune.chance import random_state_kept
from lightning_prune.gates.choosing import GRANULARITIES, GateGranularity, GateMaker
from lightning_prune.gates.expected_l0 import GateUnit
from lightning_prune.layers import Bernoulli, Gate, HardConcrete

Estimator: TypeAlias = Literal["hard_concrete", "bernoulli"]
"""Which gates there are: relaxed ones that gradients go through, or true 0/1 gates with the RELAX estimator."""

_WAYS, _SLOWEST, _USUAL, _FASTEST = 4, 1e-3, 1e-2, 1e-1
"""In the steps that there are a gate can go four times from where it starts to where it closes, within bounds."""


@dataclass(frozen=True)
class GateSettings:
    """How gates are made and trained.

    Attributes:
        pruning_ratio: Fraction to be gone in the end, in (0, 1); None where strengths say what open gates cost.
        strength: Pattern -> lambda, above 0; None where a ratio is asked.
        of: What is counted.
        granularity: Pattern -> what has a gate.
        gate_lr: Learning rate, above 0; None: by the steps that there are.
        drop_rate: Of fresh gates, in (0, 1).
        weight_decay: Behind gates, 0 or more.
        estimator: Which gates there are.
        per_example: Whether each example has a sample of its own.
        seed: Of samples.
        start: Epoch or step from which there are gates.

    Raises:
        ValueError: Something is out of its range, or does not go with something else.
    """

    pruning_ratio: float | None
    strength: Mapping[str, float] | None
    of: GateUnit
    granularity: Mapping[str, GateGranularity]
    gate_lr: float | None
    drop_rate: float
    weight_decay: float
    estimator: Estimator
    per_example: bool
    seed: int
    start: int

    def __post_init__(self) -> None:
        self._check_goal()
        for pattern, what in self.granularity.items():
            if what not in GRANULARITIES:
                known = ", ".join(map(repr, GRANULARITIES))
                raise ValueError(f"`granularity` is what has a gate, one of {known}; got {what!r} for {pattern!r}.")
        if self.of not in get_args(GateUnit):
            raise ValueError(f"`of` is what gates cost, 'params', 'macs' or 'channels'; got {self.of!r}.")
        if self.gate_lr is not None and not 0 < self.gate_lr < inf:
            raise ValueError(
                f"`gate_lr` is about how far a log alpha goes in a step, above 0; got {self.gate_lr}. None finds one."
            )
        if not 0 <= self.weight_decay < inf:
            raise ValueError(f"`weight_decay` is 0 or more; got {self.weight_decay}. The paper has 5e-4 for WRN.")
        if self.estimator not in get_args(Estimator):
            raise ValueError(f"`estimator` is 'hard_concrete' or 'bernoulli'; got {self.estimator!r}.")
        if self.estimator == "bernoulli" and self.per_example:
            raise ValueError("`per_example` goes with hard concrete gates; a loss of the batch says nothing of each.")
        if self.start < 0:
            raise ValueError(f"`start` is the epoch or step from which there are gates, 0 or more; got {self.start}.")
        self._gate()  # looks at `drop_rate`

    def _check_goal(self) -> None:
        ratio = self.pruning_ratio
        if (ratio is None) == (self.strength is None):
            raise ValueError(
                f"Either `pruning_ratio` or `strength` says how many gates close; got {ratio} and {self.strength}. A "
                "ratio is reached whatever it costs in loss; a strength, such as 0.1, weighs the two."
            )
        if ratio is not None and not 0 < ratio < 1:
            raise ValueError(f"`pruning_ratio` is the fraction to be gone in the end, in (0, 1); got {ratio}.")
        for pattern, strength in (self.strength or {}).items():
            if not 0 < strength < inf:
                raise ValueError(
                    f"`strength` is the lambda of the penalty, above 0; got {strength} for {pattern!r}. The paper has "
                    "0.1; leave the callback out for a dense network."
                )

    @property
    def maker(self) -> GateMaker:
        """What makes a gate of a shape."""
        kind: type[Gate] = HardConcrete if self.estimator == "hard_concrete" else Bernoulli
        return partial(kind, drop_rate=self.drop_rate)

    @property
    def way(self) -> float:
        """How far a fresh log alpha has to go until its gate closes; less than 0 where it starts closed."""
        return log((1 - self.drop_rate) / self.drop_rate) - self._gate().closes_at

    def _gate(self) -> Gate:
        """Make one, for what all have in common; nobody else's random numbers change."""
        with random_state_kept():
            return self.maker(1)

    def learning_rate(self, steps: float) -> float:
        """Return the learning rate of the gates.

        Args:
            steps: From their first one to the last event; 0 or infinity where nobody knows.
        """
        if self.gate_lr is not None:
            return self.gate_lr
        if not steps or not isfinite(steps):
            return _USUAL
        return min(max(_WAYS * self.way / steps, _SLOWEST), _FASTEST)

    def strengths_of(self, names: Iterable[str]) -> dict[str, float]:
        """Return the lambda of each gate; of the patterns the first that matches counts. Nothing with a ratio.

        Raises:
            ValueError: None matches.
        """
        given = self.strength or {}
        found: dict[str, float] = {}
        for name in names if given else ():
            both = name, name.partition(":")[0]
            own = [value for pattern, value in given.items() if any(fnmatchcase(one, pattern) for one in both)]
            if not own:
                raise ValueError(
                    f'`strength` has no pattern for the gates of {name!r}, only {list(given)}. Add "*" as the last.'
                )
            found[name] = own[0]
        return found


def by_pattern(name: str, value: Any) -> dict[str, Any]:
    """Return pattern -> value; one value is everyone's.

    Raises:
        ValueError: There is no pattern.
    """
    if not isinstance(value, Mapping):
        return {"*": value}
    if not value:
        raise ValueError(f"`{name}` is one value, or pattern -> value; got no pattern. Leave it out.")
    return dict(value)
