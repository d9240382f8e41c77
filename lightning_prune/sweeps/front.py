"""The Pareto front: the networks that none of the others beats in both accuracy and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(costs: Sequence[float], accuracies: Sequence[float]) -> tuple[int, ...]:
    """Find what is worth looking at: all that is not dominated.

    j dominates i if cost_j <= cost_i and accuracy_j >= accuracy_i, and one of the two is strict. Equals do not dominate
    each other: all of them are on the front, or none.

    Args:
        costs: The less the better.
        accuracies: One for each cost, the more the better.

    Returns:
        Indices by rising cost; among equals in their order.

    Raises:
        ValueError: The two are not equally long, or a value is NaN.

    >>> pareto_front([1.0, 2.0, 3.0, 3.0], [0.90, 0.80, 0.95, 0.93])
    (0, 2)
    """
    if len(costs) != len(accuracies):
        raise ValueError(f"`costs` and `accuracies` come in pairs; got {len(costs)} and {len(accuracies)}.")
    if any(map(math.isnan, (*costs, *accuracies))):
        raise ValueError("`costs` and `accuracies` are numbers; got NaN, which nothing dominates. Leave it out.")
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -accuracies[i])):
        best = front[-1] if front else index
        equal = costs[index] == costs[best] and accuracies[index] == accuracies[best]
        if equal or accuracies[index] > accuracies[best]:
            front.append(index)
    return tuple(front)
