"""The walk down the path of the LASSO: from one change of the active channels to the next.

The problem and its letters are those of `lasso`. On a stretch of the path the same channels are active, and their
coefficients move linearly with alpha; where it ends, one becomes active or falls silent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.int64]

DEPENDENT = 1e-8
"""A channel of whose energy others explain all but this share counts as explained.

Leaving it out misses the conditions of the optimum by about the root of that, 1e-4 of max |t|, at the worst.
"""

_TURNS = 20  # for each channel; a path may have 3^c knots (Mairal and Yu 2012), but those are made, not found
_END = 1e-11  # the share of the largest alpha from which on float64 sees no more knots
_TIED = 1e-12  # events closer than this share of alpha happen at once
_JUMP = 1e-4  # the share of it by which a solution may jump where a channel enters late
_LOST = 1e-6  # the share of it by which a coefficient is against its sign for more reasons than rounding
_LEVEL = 1e-10  # slopes below it are the rounding of 0
_REFINEMENTS = 3  # of a solution, until it misses by no more than the share `_EXACT`
_EXACT = 1e-12
_STALE = 1e-8  # an inverse that misses by more after a refinement is computed anew


class Stretch(NamedTuple):
    """A part of the path on which the same channels are active; it may have no length."""

    end: float  # its smallest alpha
    active: Indices  # in no order
    coefficients: Floats  # of these, at `end`


def stretches(gram: Tensor, target: Tensor) -> Iterator[Stretch]:
    """Walk down the path.

    Of events that happen at once, the channel of least index turns, then again the least of those that still must: so
    no set of active channels comes back (Murty 1974, for linear complementarity problems), and the walk goes on.
    """
    alpha = largest = largest_alpha(target)
    active = _Active(gram.numpy(), target.numpy())
    for _ in range(_TURNS * len(target)):
        line = active.line()
        events = active.events(line)
        alpha = min(float(events.max()), alpha)
        if alpha <= _END * largest:
            alpha = 0.0
        channel = int((events >= alpha * (1 - _TIED)).argmax()) if alpha else None
        reached = line.constant - alpha * line.slope
        coefficients = np.where((reached * line.signs > 0) & (line.active != channel), reached, 0.0)
        if (active.energies[line.active] * np.abs(reached - coefficients)).max(initial=0.0) > _LOST * largest:
            return
        yield Stretch(alpha, line.active, coefficients)
        if channel is None:
            return
        rest = float(line.rest[channel] + alpha * line.pull[channel])
        active.turn(channel, positive=rest > 0, beyond=(abs(rest) - alpha) / largest)


class _Line(NamedTuple):
    """The solutions of a stretch: b = constant - alpha slope for the active channels, r = rest + alpha pull for all."""

    active: Indices  # (k,)
    signs: Floats  # of their coefficients (k,)
    constant: Floats  # (k,)
    slope: Floats  # (k,)
    rest: Floats  # (c,)
    pull: Floats  # (c,); of the active channels their signs, but for rounding
    rounding: float  # of `pull`


class _Active:
    """The active channels, with their signs, their rows of the Gram matrix and the inverse of what these share."""

    def __init__(self, gram: Floats, target: Floats) -> None:
        self._gram, self._target, self.energies = gram, target, gram.diagonal()
        self._channels: list[int] = []
        self._signs: list[float] = []
        self._rows, self._inverse = np.empty_like(gram), np.empty_like(gram)
        self._explained = np.zeros(len(target), dtype=bool)

    def line(self) -> _Line:
        """Solve G_AA constant = t_A and G_AA slope = signs; what rounding leaves of these is solved for in turn."""
        size = len(self._channels)
        rows, inverse = self._rows[:size], self._inverse[:size, :size]
        active, signs = np.array(self._channels, dtype=np.int64), np.array(self._signs)
        left = wanted = np.stack([self._target[active], signs])
        allowed = _EXACT * np.linalg.norm(wanted, axis=1)
        solved = np.zeros_like(wanted)
        for again in range(_REFINEMENTS):
            solved = solved + left @ inverse
            given = solved @ rows
            left = wanted - given[:, active]
            missed = np.linalg.norm(left, axis=1)
            if (missed <= allowed).all():
                break
            if again and missed[1] > _STALE:
                inverse[:] = np.linalg.inv(rows[:, active])
        return _Line(active, signs, solved[0], solved[1], self._target - given[0], given[1], float(missed[1]))

    def events(self, line: _Line) -> Floats:
        """Return the alpha at which each channel is to turn, (c,): at which |r| reaches alpha, or b reaches 0."""
        level = _LEVEL + 10 * line.rounding
        events = np.full(len(self._target), -1.0)
        for way in (1.0, -1.0):
            slope = 1 - way * line.pull
            np.maximum(events, way * line.rest / np.where(slope > level, slope, np.inf), out=events)
        events[self._explained] = -1.0
        falls = line.signs * line.slope < -level * self._inverse.diagonal()[: len(line.active)]
        events[line.active] = np.where(falls, line.constant / np.where(falls, line.slope, 1.0), -1.0)
        return events

    def turn(self, channel: int, *, positive: bool, beyond: float) -> None:
        """Let a channel fall silent, or become active unless the active ones explain it.

        What they explained all but quite may have r beyond alpha when it may enter at last, by that share of the
        largest: then the solution would jump by as much over what is its own, which is to be little, too.
        """
        if channel in self._channels:
            self._drop(self._channels.index(channel))
            self._explained[:] = False
        else:
            self._enter(channel, 1.0 if positive else -1.0, least=max(DEPENDENT, beyond / _JUMP))

    def _enter(self, channel: int, sign: float, least: float) -> None:
        size = len(self._channels)
        shared, inverse = self._rows[:size, channel], self._inverse[:size, :size]
        weights = inverse @ shared
        own = self.energies[channel] - shared @ weights
        if own <= least * self.energies[channel] or self._explains(weights, own):
            self._explained[channel] = True
            return
        _add_square(inverse, weights, 1 / own)
        self._inverse[:size, size] = self._inverse[size, :size] = -weights / own
        self._inverse[size, size] = 1 / own
        self._rows[size] = self._gram[channel]
        self._channels.append(channel)
        self._signs.append(sign)

    def _explains(self, weights: Floats, own: float) -> bool:
        """Tell whether a channel would leave an active one with next to nothing of its own."""
        inverses = self._inverse.diagonal()[: len(weights)] + weights**2 / own
        return bool((DEPENDENT * inverses * self.energies[self._channels] >= 1).any())

    def _drop(self, place: int) -> None:
        """Take a channel out; the last one takes its place."""
        last = len(self._channels) - 1
        inverse = self._inverse[: last + 1, : last + 1]
        column = inverse[place].copy()
        _add_square(inverse, column, -1 / column[place])
        inverse[place] = inverse[last]
        inverse[:, place] = inverse[:, last]
        self._rows[place] = self._rows[last]
        self._channels[place], self._signs[place] = self._channels[-1], self._signs[-1]
        self._channels.pop()
        self._signs.pop()


def _add_square(matrix: Floats, column: Floats, scale: float) -> None:
    """Add scale vv' in place, which numpy does not without a copy."""
    vector = torch.from_numpy(column)
    torch.from_numpy(matrix).addr_(vector, vector, alpha=float(scale))


def largest_alpha(target: Tensor) -> float:
    """Return the alpha from which on all coefficients are 0."""
    return float(target.abs().max())
