"""The rhythm of slimming: when the penalty is on, when channels go, and when the network is fine-tuned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, floor, inf, isfinite, nextafter
from typing import TypeAlias

from typing_extensions import override

from lightning_prune.callbacks.timing import Timing

Phase: TypeAlias = tuple[float, float]
"""First epoch or step of a stretch with the penalty on, and the one of the cut that ends it; fractions are allowed."""


@dataclass(frozen=True)
class Passes:
    """The schedule of several passes, each with its own ratio: a staircase through ratios[k] / ratios[-1].

    Attributes:
        ratios: Fraction to be gone after each pass, counted against the dense model; rising, in (0, 1).

    Raises:
        ValueError: There is none, or they do not rise.

    >>> [Passes((0.25, 0.5))(progress) for progress in (0.0, 0.5, 1.0)]
    [0.5, 0.5, 1.0]
    """

    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(sooner < later for sooner, later in pairwise((0.0, *self.ratios)))
        if not self.ratios or not rising or self.ratios[-1] >= 1:
            raise ValueError(
                "`pruning_ratio` of several passes is what is gone after each of them, counted against the dense "
                f"model: rising, above 0 and below 1; got {list(self.ratios)}. For half of what is left each time "
                "pass [0.5, 0.75, 0.875]."
            )

    def __call__(self, progress: float) -> float:
        """Return the share of the last ratio that is reached."""
        ratio = self.ratios[floor(progress * (len(self.ratios) - 1) + 1e-9)]
        share = ratio / self.ratios[-1]
        # times the last ratio it must not fall below this one: half a channel is rounded up
        return share if share * self.ratios[-1] >= ratio else nextafter(share, inf)


@dataclass(frozen=True)
class PassTiming(Timing):
    """Passes of equal length, the cut of each followed by fine-tuning: slim, cut, fine-tune, again.

    Attributes:
        begin: Epoch or step of the first cut; that of a first pass of length / passes if None.
        end: Epoch or step of the last cut; that of a last pass of length / passes if None.
        fine_tuning: Fraction of a pass that follows its cut, in [0, 1).

    Raises:
        ValueError: `fine_tuning` is out of its range.
    """

    fine_tuning: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.fine_tuning < 1:
            raise ValueError(
                "`fine_tuning` is the fraction of each pass that follows its cut, without penalty, in [0, 1); got "
                f"{self.fine_tuning}. The paper's is 0.5."
            )

    @override
    def lay_out(self, length: float, who: str) -> dict[int, float]:
        if not isfinite(length) or not isinstance(self.schedule, Passes):
            return super().lay_out(length, who)
        each, last = length / len(self.schedule.ratios), max(int(length) - 1, 0)
        first = min(max(floor((1 - self.fine_tuning) * each + 0.5), 1), last)
        begin = first if self.begin is None else self.begin
        end = max(begin, min(ceil(length - self.fine_tuning * each - 0.5), last)) if self.end is None else self.end
        return Timing.lay_out(replace(self, begin=begin, end=end), length, who)


def phases_of(timing: Timing, cuts: Iterable[int]) -> tuple[Phase, ...]:
    """Return the stretches in which the penalty is on.

    Args:
        timing: Of the cuts. Several passes have a phase each; else there is one, up to the last cut.
        cuts: Epochs or steps of all cuts, rising.
    """
    moments = list(cuts)
    if not isinstance(timing, PassTiming):
        return ((0.0, float(moments[-1])),) if moments else ()
    begins = (cut + timing.fine_tuning * (following - cut) for cut, following in pairwise(moments))
    return tuple(zip((0.0, *begins), map(float, moments), strict=False))


@dataclass(frozen=True)
class Course:
    """How much of the penalty is on at each step of a fit: min((position - begin) / warmup, 1) in a phase, else 0.

    Attributes:
        phases: When the penalty is on.
        warmup: Epochs or steps over which it rises in each phase, >= 0.
        unit: What all of them count, "epoch" or "step".
    """

    phases: tuple[Phase, ...] = ()
    warmup: float = 0.0
    unit: str = "epoch"

    def phase_at(self, epoch: float, step: int) -> int | None:
        """Return which phase a step belongs to.

        Args:
            epoch: Epochs done, with the part of this one that is done.
            step: Optimizer steps done.
        """
        position = self._position(epoch, step)
        return next((at for at, (begin, end) in enumerate(self.phases) if begin <= position < end), None)

    def share_at(self, epoch: float, step: int) -> float:
        """Return the share of the penalty's strength, in [0, 1].

        >>> [Course(((0.0, 4.0),), warmup=2.0).share_at(epoch, 0) for epoch in (0, 0.5, 3, 4)]
        [0.0, 0.25, 1.0, 0.0]
        """
        phase = self.phase_at(epoch, step)
        if phase is None:
            return 0.0
        done = self._position(epoch, step) - self.phases[phase][0]
        return min(done / self.warmup, 1.0) if self.warmup else 1.0

    def ended_by(self, epoch: float, step: int) -> int:
        """Return how many phases have ended before a step."""
        position = self._position(epoch, step)
        return sum(end <= position for _, end in self.phases)

    def _position(self, epoch: float, step: int) -> float:
        return epoch if self.unit == "epoch" else step
