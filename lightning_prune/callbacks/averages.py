"""Averaged copies of the network (EMA, SWA) that other callbacks keep: they follow every cut."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averaged_copies(trainer: pl.Trainer) -> Iterator[nn.Module]:
    """Yield the copies of the LightningModule that the Trainer's averaging callbacks hold at the moment.

    They are known by the attribute that all of them use: WeightAveraging is younger than the oldest Lightning here.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        copy = getattr(callback, "_average_model", None)
        if isinstance(copy, nn.Module):
            yield copy.module if isinstance(copy, AveragedModel) else copy
