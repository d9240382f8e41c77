"""Logs the Fisher-Rao norm of a network before and after each cut."""

from __future__ import annotations

from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_prune.batches import taken_apart
from lightning_prune.callbacks.calibration import training_batches, training_data
from lightning_prune.chance import random_state_kept
from lightning_prune.cut import Cut, Offsets
from lightning_prune.likelihoods import Labels, Loss
from lightning_prune.metrics import FisherRaoNorm
from lightning_prune.surgery import Undo
from lightning_prune.witnesses import leave, watch


class FisherRaoMonitor(pl.Callback):
    """Logs `fisher_rao/before` and `fisher_rao/after` of each cut of channels, whatever callback makes it.

    Both are measured on the same batches of the training data, which are read beside the training; over all ranks.
    Every logger gets them at the step of the cut, and so does `trainer.callback_metrics`. "After" is the network as the
    cut leaves it, before BatchNorm is recalibrated or anything is trained.

    Args:
        batches: So many batches are measured on, 1 or more.
        loss: As in `lightning_prune.metrics.FisherRaoNorm`.
        labels: "data" (the empirical Fisher) or "model" (the Fisher itself).

    Raises:
        ValueError: An argument is out of its range, or does not go with the loss.
    """

    def __init__(self, batches: int = 1, *, loss: Loss | None = None, labels: Labels = "data") -> None:
        if batches < 1:
            raise ValueError(f"`batches` is how many batches are measured on, 1 or more; got {batches}.")
        self.batches = batches
        self.metric = FisherRaoNorm(loss, labels=labels)
        self._trainer: pl.Trainer | None = None
        self._before = 0.0
        self._unlogged: list[tuple[int, dict[str, float]]] = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        training_data(trainer, type(self).__name__, "`lightning_prune.metrics.FisherRaoNorm`")
        self._trainer = trainer
        watch(pl_module, self)

    def before_cut(self, model: nn.Module) -> None:
        """Measure."""
        self._before = self._measured(model)

    def after_cut(self, model: nn.Module, cut: Cut, offsets: Offsets) -> Undo:
        """Measure again, and note both for the loggers."""
        assert self._trainer is not None
        step = self._trainer.fit_loop.epoch_loop._batches_that_stepped
        self._unlogged.append((step, {"fisher_rao/before": self._before, "fisher_rao/after": self._measured(model)}))
        return lambda: self._unlogged.clear()

    def _measured(self, model: nn.Module) -> float:
        assert self._trainer is not None
        metric = self.metric.to(next(model.parameters()).device)
        metric.reset()
        with random_state_kept():
            for batch in islice(training_batches(self._trainer), self.batches):
                parts = taken_apart(model, batch)
                metric.update(model, parts.inputs, parts.targets)
        return float(metric.compute())

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for step, values in self._unlogged:
            rank_zero_info(f"{type(self).__name__}, step {step}: {values}")
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)
        self._unlogged = []

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        leave(pl_module, self)
        self._trainer = None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
