"""What gates are counted against: the dense network, and the examples of the training data."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.baseline import Baseline
from lightning_prune.gates import GateUnit
from lightning_prune.graph import Graph
from lightning_prune.layers.gates import Gates


def dense_cost(pl_module: pl.LightningModule, graph: Graph, gates: Gates, unit: GateUnit) -> float:
    """Return what the network costs, or did before its first cut; of channels those that have gates count."""
    named = gates.named()
    alphas = {group.name: named[group.name].log_alpha for group in graph.groups if group.name in named}
    baseline = Baseline.of(pl_module, graph, alphas)
    dense = {"params": baseline.params, "macs": baseline.macs, "channels": sum(baseline.channels.values())}
    return float(dense[unit])


def examples_of(trainer: pl.Trainer) -> int:
    """Return how many examples the training data have.

    Raises:
        MisconfigurationException: Nobody knows.
    """
    loader = trainer.train_dataloader
    if isinstance(loader, DataLoader) and loader.batch_size and not isinstance(loader.dataset, IterableDataset):
        seen = int(trainer.num_training_batches) * loader.batch_size * trainer.world_size
        return max(1, min(len(loader.dataset), seen))  # type: ignore[arg-type]
    raise MisconfigurationException(
        "`strength` is divided by the examples in the training data, and only one DataLoader with a batch size over a "
        f"map-style dataset tells how many these are; got {type(loader).__name__}. Ask for a `pruning_ratio` instead."
    )
