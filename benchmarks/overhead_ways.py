"""The fits of the overhead benchmark: our callbacks one by one, Lightning's ModelPruning, Torch-Pruning's penalties."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.optim import SGD, AdamW

from lightning_prune.callbacks import (
    BNSlimmingCallback,
    ChannelEquilibriumCallback,
    ChannelHealthMonitor,
    DistillationCallback,
    EWCCallback,
    FisherPruneCallback,
    FisherRaoMonitor,
    L0PruneCallback,
    MagnitudePruneCallback,
    PruneCallback,
    Retraining,
    RigLCallback,
    SparsityMonitor,
)
from lightning_prune.criteria import Taylor

STEPS = 8
"""Batches in an epoch; events come after it."""
MASKED = 0.9
"""So many of the weights are masked."""

MOMENTUM = partial(SGD, lr=1e-3, momentum=0.9)

Callbacks = Callable[[pl.LightningModule], Sequence[pl.Callback]]


@dataclass(frozen=True)
class Way:
    """A fit to measure.

    Attributes:
        callbacks: Builds its callbacks; those that only accompany the one that is measured stand first.
        event: Lightning's hook in which its event comes; None: it has none.
        aim: A step of it in steps of the bare fit, at most; None: nothing is aimed at.
        optimizer: Of the fit, and of the bare one beside it.
        peer: The package that it is of; None: ours, or Lightning.
    """

    callbacks: Callbacks
    event: str | None = None
    aim: float | None = None
    optimizer: Callable[..., Any] = MOMENTUM
    peer: str | None = None


ONCE: dict[str, Any] = {"begin": 1, "end": 1}
CUT = "on_train_epoch_start"
PENALTY, LOOKING = 1.01, 1.05


def _one(build: Callable[..., pl.Callback], *given: Any, **named: Any) -> Callbacks:
    return lambda module: [build(*given, **named)]


def _consolidated(module: pl.LightningModule) -> Sequence[pl.Callback]:
    callback = EWCCallback(100.0, labels="data", loss=partial(F.cross_entropy, reduction="none"))
    callback.consolidate(module, list(module.val_dataloader()))
    return [callback]


def _masks(module: pl.LightningModule) -> Sequence[pl.Callback]:
    """Mask before the first step, and leave dead channels in: a cut would make all that follows cheaper."""
    keep = Retraining(dead="keep", dropout="keep")
    return [MagnitudePruneCallback(MASKED, granularity="weights", begin=0, end=0, retraining=keep)]


class _ModelPruning(ModelPruning):
    """Prunes before the first step, and no more."""

    def on_train_start(self, *_: Any) -> None:
        """Do what it does at the end of an epoch."""
        self.apply_pruning(MASKED)


def _model_pruning(module: pl.LightningModule) -> Sequence[pl.Callback]:
    weights = [(each, "weight") for each in module.modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
    return [
        _ModelPruning(
            "l1_unstructured",
            parameters_to_prune=weights,
            amount=MASKED,
            apply_pruning=False,
            make_pruning_permanent=False,
            use_lottery_ticket_hypothesis=False,
        )
    ]


class TorchPruning(pl.Callback):
    """A pruner of Torch-Pruning whose `regularize` is called after each backward pass, as its README does.

    Args:
        name: Of the pruner's class.
        importance: Of the class of its importance.
    """

    def __init__(self, name: str, importance: str) -> None:
        self.name, self.importance = name, importance
        self.pruner: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the pruner; it leaves the network in eval mode."""
        import torch_pruning as tp

        net: Any = pl_module.net
        importance = getattr(tp.importance, self.importance)()
        given = {"ignored_layers": [net.fc], "in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
        example = torch.zeros_like(pl_module.example_input_array)  # type: ignore[arg-type]
        self.pruner = getattr(tp.pruner, self.name)(net, example, importance=importance, pruning_ratio=0.5, **given)
        self.pruner.update_regularizer()
        net.train()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Add to the gradients."""
        self.pruner.regularize(pl_module.net)


WAYS: dict[str, Way] = {
    "BNSlimmingCallback": Way(_one(BNSlimmingCallback, strength=1e-5, **ONCE), CUT, PENALTY),
    "BNSlimmingCallback, smooth-L1": Way(_one(BNSlimmingCallback, strength=1e-5, delta=1e-3, **ONCE), CUT, PENALTY),
    "BNSlimmingCallback, proximal": Way(
        _one(BNSlimmingCallback, strength=1e-5, **ONCE), CUT, PENALTY, optimizer=partial(AdamW, lr=1e-4)
    ),
    "Torch-Pruning, BNScalePruner": Way(_one(TorchPruning, "BNScalePruner", "BNScaleImportance"), peer="torch-pruning"),
    "Torch-Pruning, GroupNormPruner": Way(
        _one(TorchPruning, "GroupNormPruner", "GroupMagnitudeImportance"), peer="torch-pruning"
    ),
    "L0PruneCallback": Way(_one(L0PruneCallback, strength=1e-6, gate_lr=1.0, **ONCE), CUT, LOOKING),
    "L0PruneCallback, a target of MACs": Way(_one(L0PruneCallback, 0.5, of="macs", gate_lr=1.0, **ONCE), CUT, LOOKING),
    "MagnitudePruneCallback, masks": Way(_masks, CUT, LOOKING),
    "ModelPruning": Way(_model_pruning, "on_train_start"),
    "RigLCallback": Way(_one(RigLCallback, MASKED, every_n_steps=STEPS, end=1.0), "on_before_optimizer_step", LOOKING),
    "FisherPruneCallback": Way(_one(FisherPruneCallback, 0.5, **ONCE), CUT, LOOKING),
    "PruneCallback, Taylor": Way(_one(PruneCallback, 0.5, criterion=Taylor(), **ONCE), CUT, LOOKING),
    "MagnitudePruneCallback": Way(_one(MagnitudePruneCallback, 0.5, **ONCE), CUT),
    "FisherRaoMonitor, at a cut": Way(
        lambda module: [FisherRaoMonitor(), MagnitudePruneCallback(0.5, **ONCE)],
        CUT,
    ),
    "SparsityMonitor": Way(_one(SparsityMonitor), "on_train_epoch_end"),
    "ChannelHealthMonitor": Way(_one(ChannelHealthMonitor), "on_validation_epoch_end"),
    "EWCCallback": Way(_consolidated),
    "DistillationCallback": Way(lambda module: [DistillationCallback(teacher=copy.deepcopy(module))]),
    "ChannelEquilibriumCallback": Way(_one(ChannelEquilibriumCallback)),
}
