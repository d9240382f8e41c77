"""Batches of the training data, read beside the training itself, and recalibration with them inside a fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from lightning_prune.calibration import recalibrate, tracking_norms
from lightning_prune.callbacks.ranks import average_over_ranks


def training_data(
    trainer: pl.Trainer, who: str = "`recalibrate`", instead: str = "`lightning_prune.calibration.recalibrate`"
) -> DataLoader[Any]:
    """Return the loader whose data set can be read a second time, beside the training.

    Args:
        trainer: Whose data they are.
        who: Wants to read them.
        instead: What is to be called where that cannot be.

    Raises:
        MisconfigurationException: There are several loaders, or one that cannot be read so.
    """
    loader = trainer.train_dataloader
    if isinstance(loader, DataLoader) and loader.batch_size and not isinstance(loader.dataset, IterableDataset):
        return loader
    raise MisconfigurationException(
        f"{who} reads the training data a second time, which takes one DataLoader with a batch size over a "
        f"map-style dataset; got {type(loader).__name__}. Call {instead} yourself."
    )


def recalibrate_in_fit(trainer: pl.Trainer, networks: list[nn.Module], batches: int) -> None:
    """Recalibrate networks on some batches of the training data; the training's own loader and draws go on as before.

    Which examples are read depends on the step and the rank alone. Under DDP the ranks' statistics are averaged.
    """
    for network in networks:
        with isolate_rng(), trainer.precision_plugin.forward_context():
            recalibrate(network, training_batches(trainer), batches)
        norms = tracking_norms(network)
        buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
        average_over_ranks(trainer, buffers)


def training_batches(trainer: pl.Trainer) -> Iterator[Any]:
    """Yield batches of the training data in an order that the step and the rank say; random numbers are set anew."""
    loader = training_data(trainer)
    seed = trainer.global_step * trainer.world_size + trainer.global_rank
    torch.manual_seed(seed)
    twin: DataLoader[Any] = DataLoader(
        loader.dataset,
        loader.batch_size,
        sampler=RandomSampler(loader.dataset, generator=torch.Generator().manual_seed(seed)),  # type: ignore[arg-type]
        collate_fn=loader.collate_fn,
        drop_last=len(loader.dataset) > (loader.batch_size or 1),  # type: ignore[arg-type]
    )
    for batch in twin:
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
