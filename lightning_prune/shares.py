"""Groups that must give the same fraction of their channels, and how many that is of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import floor, gcd


def equal_shares(
    sizes: Mapping[str, int],
    gone: Mapping[str, int],
    allowed: Callable[[str, int], bool] = lambda name, left: True,
    least: int = 0,
) -> dict[str, int]:
    """Return how many channels each group gives if all give the same fraction.

    The fraction is the one nearest to what the widest group was to give, of those that are whole numbers of channels
    for all, or the next smaller one that is allowed.

    Args:
        sizes: Group name -> its channels.
        gone: Group name -> how many of them were to go.
        allowed: Tells of a group whether so many channels may be left of it.
        least: The least multiple of the common part to give, where that is asked for.

    Example:
        >>> equal_shares({"width": 48, "heads": 3}, {"width": 24, "heads": 1})
        {'width': 32, 'heads': 2}
    """
    parts = gcd(*sizes.values())
    widest = max(sizes, key=sizes.__getitem__)
    wanted = max(floor(gone[widest] * parts / sizes[widest] + 0.5), least)
    for share in range(min(wanted, parts - 1), 0, -1):
        given = {name: size * share // parts for name, size in sizes.items()}
        if all(allowed(name, sizes[name] - count) for name, count in given.items()):
            return given
    return dict.fromkeys(sizes, 0)
