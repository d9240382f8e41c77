"""A prune callback beside other callbacks, and what a fit did to the parameters."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
)
from torch import Tensor, nn

from lightning_prune.callbacks import PruneCallback

CUT = 2

either_side = pytest.mark.parametrize("side", [1, -1], ids=["cut first", "cut last"])


def cut(epoch: int = CUT) -> PruneCallback:
    return PruneCallback(0.5, begin=epoch, end=epoch, constants="drop")


def beside(prune: PruneCallback, *others: Callback, side: int = 1) -> list[Callback]:
    return [prune, *others][::side]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


class Moves(Callback):
    """Notes for each batch which parameters its step left as they were."""

    def __init__(self) -> None:
        self.still: list[list[str]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.was = weights(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.still.append([name for name, new in weights(pl_module).items() if torch.equal(new, self.was[name])])
