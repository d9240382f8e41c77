"""When prune events happen: laid out over the epochs of a fit, or over its optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, isfinite

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_prune.schedules import Schedule, events


def epochs_of(trainer: pl.Trainer) -> float:
    """Return how many epochs a Trainer runs; infinity without a limit."""
    return inf if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs


def window_of(trainer: pl.Trainer, epoch: int) -> int:
    """Return over how many batches an epoch's steps accumulate their gradients."""
    if not trainer.lightning_module.automatic_optimization:
        return 1
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def _steps_of(trainer: pl.Trainer, epoch: int) -> int:
    """Return how many optimizer steps an epoch has, as `trainer.global_step` counts them."""
    at_once = 1 if trainer.lightning_module.automatic_optimization else max(len(trainer.optimizers), 1)
    return at_once * ceil(max(int(trainer.num_training_batches), 1) / window_of(trainer, epoch))


def _epochs_of(trainer: pl.Trainer, steps: float) -> float:
    """Return in how many epochs so many optimizer steps lie, the last of them begun."""
    if not isfinite(trainer.num_training_batches):
        return inf
    epoch = 0
    while steps > 0:
        steps -= _steps_of(trainer, epoch)
        epoch += 1
    return epoch


@dataclass(frozen=True)
class Timing:
    """When prune events happen.

    Attributes:
        schedule: Pure function from progress to the share of the ratio, see `lightning_prune.schedules`.
        begin: Epoch or step of progress 0, counted from 0; a third of the fit if None.
        end: Epoch or step of progress 1; two thirds of the fit if None.
        every: Epochs between prune events.
        every_n_steps: Optimizer steps between prune events; `begin` and `end` then count steps too.

    Raises:
        ValueError: A number is out of its range, `begin` lies after `end`, or both intervals are given.
    """

    schedule: Schedule
    begin: int | None = None
    end: int | None = None
    every: int = 1
    every_n_steps: int | None = None

    def __post_init__(self) -> None:
        if self.every_n_steps is not None and self.every != 1:
            raise ValueError(
                f"`every` counts epochs and `every_n_steps` optimizer steps; got {self.every} and "
                f"{self.every_n_steps}. Leave one of them out."
            )
        begin = self.begin or 0
        self._events(begin, max(begin, 0) if self.end is None else self.end)

    @property
    def unit(self) -> str:
        """What events are counted in: "epoch" or "step"."""
        return "epoch" if self.every_n_steps is None else "step"

    def _events(self, begin: int, end: int) -> dict[int, float]:
        interval = self.every if self.every_n_steps is None else self.every_n_steps
        return events(self.schedule, begin, end, interval, self.unit)

    def now(self, trainer: pl.Trainer) -> int:
        """Return the epoch or the step that begins."""
        return trainer.current_epoch if self.every_n_steps is None else trainer.global_step

    def steps_before(self, moment: int, trainer: pl.Trainer, batch_idx: int) -> int:
        """Return the optimizer steps from the batch that begins to a later epoch or step; 0 where nobody knows.

        Args:
            moment: The epoch or step.
            trainer: The Trainer.
            batch_idx: The number of the batch in its epoch.
        """
        if self.unit == "step":
            return moment - trainer.global_step
        if not isfinite(trainer.num_training_batches):
            return 0
        epochs = range(trainer.current_epoch, moment)
        return sum(_steps_of(trainer, epoch) for epoch in epochs) - batch_idx // window_of(trainer, epochs.start)

    def length(self, trainer: pl.Trainer, epochs: float) -> float:
        """Return how many epochs or steps a fit of so many epochs has; infinity where nobody knows.

        For steps, the training batches must be known already. `trainer.estimated_stepping_batches` is not asked: it
        knows neither a GradientAccumulationScheduler nor several optimizers.
        """
        most = trainer.max_steps if trainer.max_steps >= 0 else inf
        if self.every_n_steps is None:
            return min(epochs, _epochs_of(trainer, most)) if isfinite(most) else epochs
        if not (isfinite(epochs) and isfinite(trainer.num_training_batches)):
            return most
        return min(most, sum(_steps_of(trainer, epoch) for epoch in range(int(epochs))))

    def lay_out(self, length: float, who: str) -> dict[int, float]:
        """Return the epochs or steps of all events -> the share of the ratio that is reached from then on.

        Args:
            length: Of the fit.
            who: The callback's name, for the message.

        Raises:
            MisconfigurationException: The length is not known, and needed.
        """
        if not isfinite(length) and (self.begin is None or self.end is None):
            limit = "max_epochs" if self.unit == "epoch" else "max_steps"
            raise MisconfigurationException(
                f"{who} lays its schedule out over the {self.unit}s of the fit, and nobody knows how many there will "
                f"be. Set Trainer({limit}=...), or both `begin` and `end`."
            )
        begin = int(length) // 3 if self.begin is None else self.begin
        end = max(begin, 2 * int(length) // 3) if self.end is None else self.end
        return self._events(begin, end)
