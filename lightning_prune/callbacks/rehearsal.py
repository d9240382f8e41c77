"""The optimizer steps that a fit has before it, with their learning rates, told without touching anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from math import inf
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_prune.callbacks.timing import window_of


class StandIn(Optimizer):
    """An optimizer with the settings of another one, for schedulers to change in its place; it moves nothing."""

    def __init__(self, optimizer: Optimizer) -> None:
        shared = {"params", "param_names"}
        settings = [
            {key: deepcopy(value) for key, value in group.items() if key not in shared}
            for group in optimizer.param_groups
        ]
        super().__init__([{"params": [torch.zeros(1)], **group} for group in settings], dict(optimizer.defaults))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


@dataclass(frozen=True)
class _Understudy:
    """The copy of a scheduler, and when Lightning would step it."""

    scheduler: LRScheduler
    interval: str
    frequency: int


class Rehearsal:
    """The coming optimizer steps of a fit, and the settings of all param groups at each of them.

    Schedulers are copied with a stand-in in their optimizer's place, and stepped as Lightning steps them. Where that
    cannot be done (they wait for a metric, are stepped by hand, or cannot be copied), the settings stay as they are
    now, and `unforeseen` says which.

    Args:
        trainer: In `on_train_start`; its number of training batches is finite.
        pl_module: What it trains.
        optimizers: Those of its torch optimizers that are asked about; the others' schedulers are passed over.
        epochs: Of the whole fit; infinity is allowed.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizers: Sequence[Optimizer], epochs: float
    ) -> None:
        self.trainer = trainer
        self.epochs = epochs
        self.stand_ins = [StandIn(optimizer) for optimizer in optimizers]
        self.unforeseen: list[str] = []
        self._understudies: list[_Understudy] = []
        # a scheduler may hold bound methods: what they are bound to is shared, and not copied with it
        shared: dict[int, Any] = {id(pl_module): pl_module, id(trainer): trainer}
        shared |= {id(real): twin for real, twin in zip(optimizers, self.stand_ins, strict=True)}
        own_way = not pl_module.automatic_optimization or is_overridden("lr_scheduler_step", pl_module)
        for config in trainer.lr_scheduler_configs:
            if id(config.scheduler.optimizer) not in shared:
                continue
            copy = None if own_way or config.reduce_on_plateau else _copied(config.scheduler, shared)
            if copy is None:
                self.unforeseen.append(type(config.scheduler).__name__)
            else:
                self._understudies.append(_Understudy(copy, config.interval, config.frequency))

    def steps(self) -> Iterator[tuple[float, int]]:
        """Go through the coming steps, with `stand_ins` set for each.

        Yields:
            The epoch with the part of it that is done, and the number of optimizer steps done.
        """
        trainer = self.trainer
        batches = int(trainer.num_training_batches)
        at_once = 1 if trainer.lightning_module.automatic_optimization else max(len(trainer.optimizers), 1)
        most = trainer.max_steps if trainer.max_steps >= 0 else inf
        step, first = trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.ready % batches
        for epoch in count(trainer.current_epoch):
            window = window_of(trainer, epoch)
            for batch in range(first, batches if epoch < self.epochs else 0):
                if (batch + 1) % window and batch + 1 < batches:
                    continue
                if step >= most:
                    return
                yield epoch + batch / batches, step
                step += at_once
                self._proceed("step", batch + 1)
            if epoch + 1 >= self.epochs:
                return
            self._proceed("epoch", epoch + 1)
            first = 0

    def _proceed(self, interval: str, moment: int) -> None:
        for understudy in tuple(self._understudies):
            if understudy.interval == interval and moment % understudy.frequency == 0:
                try:
                    understudy.scheduler.step()
                except Exception:  # as OneCycleLR does after its last step: the fit will tell, a forecast must not
                    self._understudies.remove(understudy)
                    self.unforeseen.append(type(understudy.scheduler).__name__)


def _copied(scheduler: Any, shared: dict[int, Any]) -> LRScheduler | None:
    """Copy a scheduler around what it shares with the fit; None where that cannot be done."""
    if not isinstance(scheduler, LRScheduler):
        return None
    try:
        return deepcopy(scheduler, dict(shared))
    except Exception:  # a user's scheduler may hold anything, and nothing but a forecast hangs on it
        return None
