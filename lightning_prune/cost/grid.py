"""The widths at which operations are timed, and what lies between them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterator, Mapping
from functools import cache
from itertools import product
from typing import NamedTuple, TypeVar

Name = TypeVar("Name", bound=Hashable)

BLOCK = 8
"""The smallest number of channels that processors compute together."""

_PER_OCTAVE = 4
_MOST = 3


class Between(NamedTuple):
    """A width between two grid points.

    Attributes:
        low: The one below, or the width itself.
        high: The one above, or the width itself.
        share: How far it has gone from the one below to the one above, in [0, 1).
    """

    low: int
    high: int
    share: float

    @property
    def nearest(self) -> int:
        """The closer grid point."""
        return self.low if self.share < 0.5 else self.high


@cache
def grid(dense: int) -> tuple[int, ...]:
    """Return the widths at which an operation is timed, ascending.

    They are 1, the dense width and four multiples of 8 an octave, each with its successor: kernels compute blocks of
    channels, so that the time jumps after a multiple and is nearly flat up to the next one.

    Args:
        dense: The dense width.

    Example:
        >>> grid(40)
        (1, 8, 9, 16, 17, 24, 25, 32, 33, 40)
    """
    points, width = {1, dense}, BLOCK
    while width < dense:
        points |= {width, width + 1}
        width += max(BLOCK, 2 ** (width.bit_length() - 1) // _PER_OCTAVE)
    return tuple(sorted(points))


@cache
def between(width: int, dense: int) -> Between:
    """Return the grid points around a width.

    Example:
        >>> between(20, 40)
        Between(low=17, high=24, share=0.42...)
    """
    points = grid(dense)
    place = bisect_left(points, width)
    if place == len(points) or points[place] == width or place == 0:
        return Between(width, width, 0.0)
    low, high = points[place - 1], points[place]
    return Between(low, high, (width - low) / (high - low))


def corners(sizes: Mapping[Name, tuple[int, int]]) -> Iterator[tuple[float, dict[Name, int]]]:
    """Yield the corners of the grid cell that some widths lie in, with their shares in a multilinear interpolation.

    Of more than three widths, the three in the widest gaps are interpolated and the others go to the nearest point, so
    that there are never more than eight corners.

    Args:
        sizes: Name of a width -> its dense size and its size now.
    """
    places = {name: between(now, dense) for name, (dense, now) in sizes.items()}
    wide = sorted(
        (name for name, place in places.items() if place.share), key=lambda name: places[name].low - places[name].high
    )
    nearest = {name: place.nearest for name, place in places.items()}
    chosen = wide[:_MOST]
    for ends in product((False, True), repeat=len(chosen)):
        share, corner = 1.0, dict(nearest)
        for name, upper in zip(chosen, ends, strict=True):
            low, high, far = places[name]
            share *= far if upper else 1 - far
            corner[name] = high if upper else low
        yield share, corner
