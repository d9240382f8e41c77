"""Schedules: pure functions from progress to the share of the pruning ratio that is reached, [0, 1] -> [0, 1].

Progress is 0 at the first prune event and 1 at the last one; all schedules end at 1 and never fall.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import cos, exp, floor, pi
from typing import TypeAlias

Schedule: TypeAlias = Callable[[float], float]


def one_shot(progress: float) -> float:
    """Reach everything at the first event.

    >>> one_shot(0.0)
    1.0
    """
    return 1.0


def linear(progress: float) -> float:
    """Remove equally much at every event.

    >>> linear(0.25)
    0.25
    """
    return progress


def cubic(progress: float) -> float:
    """Remove much at first and little at last: 1 - (1 - t)^3 (Zhu & Gupta 2017, equation 1).

    >>> cubic(0.5)
    0.875
    """
    return 1 - (1 - progress) ** 3


def cosine(progress: float) -> float:
    """Begin and end gently: (1 - cos(pi t)) / 2.

    >>> round(cosine(0.5), 6)
    0.5
    """
    return (1 - cos(pi * progress)) / 2


def exponential(progress: float, rate: float = 3.0) -> float:
    """Approach the end exponentially: (1 - exp(-rate t)) / (1 - exp(-rate)).

    Args:
        progress: In [0, 1].
        rate: How fast, > 0; the larger, the more goes at first.

    >>> round(exponential(0.5), 4)
    0.8176
    """
    return (1 - exp(-rate * progress)) / (1 - exp(-rate))


def one_cycle(progress: float, steepness: float = 14.0, offset: float = 6.0) -> float:
    """Follow a sigmoid: little, then much, then little (Hubens et al. 2021, "One-Cycle Pruning", equation 3).

    Args:
        progress: In [0, 1].
        steepness: The paper's alpha.
        offset: The paper's beta; the middle lies at offset / steepness.

    >>> round(one_cycle(0.5), 4)
    0.7313
    """
    return (1 + exp(-steepness + offset)) / (1 + exp(-steepness * progress + offset))


def staircase(schedule: Schedule, steps: int) -> Schedule:
    """Make a schedule that rises in `steps` equal strides of progress and rests in between.

    >>> staircase(linear, 4)(0.6)
    0.5
    """
    if steps < 1:
        raise ValueError(f"`steps` is the number of stairs, at least 1; got {steps}.")
    return lambda progress: schedule(floor(progress * steps + 1e-9) / steps)


def events(schedule: Schedule, begin: int, end: int, every: int = 1, unit: str = "epoch") -> dict[int, float]:
    """Lay a schedule out over epochs, or over steps.

    Args:
        schedule: The curve.
        begin: First epoch, counted from 0, where progress is 0; if it equals `end`, everything happens there.
        end: Last epoch, where progress is 1.
        every: Epochs between events; the last event is at `end` in any case.
        unit: What is counted, for the messages.

    Returns:
        Epoch -> share of the pruning ratio that is reached from then on; epochs where it does not rise are left out.

    Raises:
        ValueError: `begin` is negative or after `end`, `every` is below 1, or the schedule falls or does not end at 1.

    >>> events(linear, begin=2, end=6, every=2)
    {4: 0.5, 6: 1.0}
    >>> events(one_shot, begin=3, end=9)
    {3: 1.0}
    """
    if not 0 <= begin <= end:
        raise ValueError(f"`begin` and `end` are {unit}s with 0 <= begin <= end; got begin={begin}, end={end}.")
    if every < 1:
        name = "every" if unit == "epoch" else f"every_n_{unit}s"
        raise ValueError(f"`{name}` is the number of {unit}s between prune events, at least 1; got {every}.")
    epochs = sorted({*range(begin, end, every), end})
    shares = [schedule((epoch - begin) / (end - begin) if end > begin else 1.0) for epoch in epochs]
    rising = all(later >= sooner - 1e-9 for sooner, later in pairwise([0.0, *shares]))
    if not (rising and abs(shares[-1] - 1) < 1e-6):
        raise ValueError(f"`schedule` must rise from 0 or more to 1; it gives {[round(share, 4) for share in shares]}.")
    rises = [later > sooner + 1e-9 for sooner, later in pairwise([0.0, *shares])]
    return {epoch: min(share, 1.0) for epoch, share, rise in zip(epochs, shares, rises, strict=True) if rise}
