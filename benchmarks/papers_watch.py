"""What is noted during a fit that slims: how the scales part in two, and what each cut and each fine-tuning does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from papers_rows import Setting
from torch import nn

from lightning_prune.history import history_of


class Scales(pl.Callback):
    """Counts the batch norms' scales by size at the end of each epoch, until something is cut.

    Attributes:
        counts: See `scale_counts`.
    """

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count anew."""
        if not history_of(pl_module):
            self.counts = scale_counts(pl_module)


class Milestones(pl.Callback):
    """Measures the error at the end of each LR cycle and right after each cut, and what is gone by then.

    Stands behind the pruning callback.

    Args:
        setting: How the net is trained: two cycles make a pass.
        measure: The error of the net as it is now, in percent.

    Attributes:
        figures: What was measured, under names that say when.
    """

    def __init__(self, setting: Setting, measure: Callable[[], float]) -> None:
        self.setting = setting
        self.measure = measure
        self.figures: dict[str, float] = {}
        self._cuts = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure if there was a cut since the last batch."""
        cuts = len(history_of(pl_module))
        if cuts > self._cuts:
            self._note(pl_module, f"error right after cut {cuts}")
            last = history_of(pl_module)[-1]
            self.figures[f"% fewer parameters after cut {cuts}"] = 100 * last.params.removed
            self.figures[f"% fewer MACs after cut {cuts}"] = 100 * last.macs.removed
        self._cuts = cuts

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure at the end of a cycle."""
        cycle, rest = divmod((trainer.current_epoch + 1) * self.setting.cycles, self.setting.epochs)
        if rest == 0:
            half = "fine-tuned" if cycle % 2 == 0 else "slimmed"
            self._note(pl_module, f"error of pass {(cycle + 1) // 2}, {half}")

    def _note(self, module: nn.Module, name: str) -> None:
        self.figures[name] = self.measure()
        module.train()


def scale_counts(net: nn.Module) -> list[int]:
    """How many |scale| lie in each twentieth of [0, 1), and last how many beyond."""
    scales = torch.cat([norm.weight.detach().abs() for norm in batch_norms(net)])
    return [int(count) for count in (scales * 20).long().clamp(max=20).bincount(minlength=21)]


def batch_norms(net: nn.Module) -> list[nn.Module]:
    """The norms that slimming reads."""
    return [module for module in net.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
