"""How far a penalty can carry parameters in the steps that a fit has before it: told before they are spent."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_prune.callbacks.passes import Course
from lightning_prune.callbacks.rehearsal import Rehearsal
from lightning_prune.penalties import Update


@dataclass
class Lane:
    """A param group whose scales are penalised, and how its optimizer moves them.

    A gradient g moves SGD's parameters by lr * v with v <- momentum * v + (1 - dampening) * g, in the long run by
    lr * g / (1 - momentum); a proximal step moves by lr * g.

    Attributes:
        settings: The group as the rehearsal has it.
        update: How the penalty enters.
        sizes: The absolute scales of the group, of shape (n,).
    """

    settings: Mapping[str, Any]
    update: Update
    sizes: Tensor
    _velocity: float | None = None

    def moved_by(self, pull: float) -> float:
        """Return how far the next step goes under a pull of so much."""
        lr, momentum = float(self.settings["lr"]), float(self.settings.get("momentum", 0.0))
        if self.update == "proximal" or not momentum:
            return lr * pull
        kept = 1 - float(self.settings.get("dampening", 0.0))
        self._velocity = pull if self._velocity is None else momentum * self._velocity + kept * pull
        return lr * (pull + momentum * self._velocity if self.settings.get("nesterov") else self._velocity)


@dataclass(frozen=True)
class Travel:
    """What a phase of slimming can reach.

    Attributes:
        phase: Which one, counted from 0.
        distances: Of each scale, how far the penalty can carry it, of shape (n,).
        sizes: Of each scale, how far it is from 0 now, of shape (n,).
    """

    phase: int
    distances: Tensor
    sizes: Tensor

    @property
    def shortfall(self) -> float:
        """How many times farther half of the scales would have to go to reach 0; above 1 where they cannot."""
        return float(torch.where(self.sizes > 0, self.sizes / self.distances, 0.0).median())


def travels(rehearsal: Rehearsal, course: Course, strength: float, lanes: Sequence[Lane]) -> list[Travel]:
    """Sum up for each coming phase how far the penalty alone carries the scales until its cut.

    For SGD over a long phase this is strength * sum(lr) / (1 - momentum), and for proximal steps strength * sum(lr).
    Weight decay and the loss come on top. Phases whose cut lies behind the end of the fit are left out. Neither
    schedulers nor optimizers nor random numbers are touched.
    """
    sums: dict[int, list[float]] = {}
    ended = 0
    with _unseen():
        for epoch, step in rehearsal.steps():
            ended = course.ended_by(epoch, step)
            if ended == len(course.phases):
                break
            phase, pull = course.phase_at(epoch, step), strength * course.share_at(epoch, step)
            moved = [lane.moved_by(pull) for lane in lanes]
            if phase is not None:
                before = sums.get(phase, [0.0] * len(lanes))
                sums[phase] = [far + by for far, by in zip(before, moved, strict=True)]
    sizes = torch.cat([lane.sizes for lane in lanes])
    return [Travel(phase, _spread(lanes, far), sizes) for phase, far in sums.items() if phase < ended]


def _spread(lanes: Sequence[Lane], values: Sequence[float]) -> Tensor:
    """Give each scale the value of its group."""
    return torch.cat([torch.full_like(lane.sizes, value) for lane, value in zip(lanes, values, strict=True)])


@contextmanager
def _unseen() -> Iterator[None]:
    """Schedulers may draw random numbers, and complain of optimizers that do not step."""
    with isolate_rng(include_cuda=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tell(who: str, course: Course, strength: float, found: Sequence[Travel], unforeseen: Sequence[str]) -> None:
    """Tell how far the scales can travel, and warn where half of them cannot reach zero in some phase."""
    if not found:
        return
    worst = max(found, key=lambda travel: travel.shortfall)
    far, size = float(worst.distances.median()), float(worst.sizes.median())
    begin, end = course.phases[worst.phase]
    assumed = f", with the learning rate as it is now for {' and '.join(unforeseen)}" if unforeseen else ""
    numbers = (
        f"strength={strength:g} carries a scale by {far:.2g} from {course.unit} {begin:g} to the cut at {end:g} "
        f"(strength * sum(lr) / (1 - momentum){assumed}), and the median |gamma| is {size:.2g}"
    )
    if worst.shortfall <= 1:
        rank_zero_info(f"{who}: {numbers}")
    else:
        rank_zero_warn(
            f"{who}: the scales cannot reach zero before they are pruned: {numbers}. {_way_out(strength, worst)}"
        )


def _way_out(strength: float, worst: Travel) -> str:
    if not isfinite(worst.shortfall):
        return "Their learning rate is 0: raise it."
    return (
        f"Set `strength` to {_rounded_up(strength * worst.shortfall):g} or more, let the cut come later, or begin with "
        "smaller scales (`initial_scale=0.5`)."
    )


def _rounded_up(value: float) -> float:
    """Round up to two digits."""
    unit = 10.0 ** (floor(log10(value)) - 1)
    return ceil(value / unit - 1e-9) * unit
