"""Averaged copies of the network (EMA, SWA) that other callbacks keep: they follow every cut."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averaged_copies(trainer: pl.Trainer) -> Iterator[nn.Module]:
    """Yield the copies of the LightningModule that the Trainer's averaging callbacks hold at the moment."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            copy = getattr(callback, "_average_model", None)
            if copy is not None:
                yield copy.module if isinstance(copy, AveragedModel) else copy
