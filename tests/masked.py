"""Masks in a fit: whether a network's pruned weights are exactly 0, and a callback that looks after every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_prune.callbacks import MagnitudePruneCallback, Retraining
from lightning_prune.masks.held import Masks, masks_of

KEEP = Retraining(dead="keep", dropout="keep")


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def wrong(masks: Masks, weights: dict[str, Tensor]) -> list[str]:
    """The masks under which something else than +0 stands; empty where all is well."""
    bits = {name: torch.view_as_real(gone) if gone.is_complex() else gone for name, gone in _gone(masks, weights)}
    return [name for name, gone in bits.items() if bool(((gone != 0) | gone.signbit()).any())]


def _gone(masks: Masks, weights: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name, weights[name][~mask]) for name, mask in masks.items()]


def is_exact(module: nn.Module) -> bool:
    """Whether there are masks, and every pruned weight is +0."""
    masks = masks_of(module)
    return bool(masks) and not wrong(masks, weights_of(module))


def masked(ratio: float = 0.5, **arguments: Any) -> MagnitudePruneCallback:
    options: dict[str, Any] = {"granularity": "weights", "begin": 0, "end": 2, "retraining": KEEP}
    return MagnitudePruneCallback(ratio, **(options | arguments))


class Exact(Callback):
    """Looks at the network after every batch, and notes what else is asked of it."""

    def __init__(self, look: Callable[[pl.Trainer, pl.LightningModule], Any] | None = None) -> None:
        self.look, self.seen = look, list[Any]()
        self.masks: list[Masks] = []
        self.wrong: list[tuple[int, list[str]]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        masks, weights = masks_of(pl_module), weights_of(pl_module)
        self.masks.append(masks)
        if wrong(masks, weights) or not all(bool(weight.isfinite().all()) for weight in weights.values()):
            self.wrong.append((trainer.global_step, wrong(masks, weights)))
        if self.look:
            self.seen.append(self.look(trainer, pl_module))
