"""An image classifier as a Lightning module: any network, cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import lightning.pytorch as pl
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Images (batch, channels, h, w) and labels (batch,)."""


class Classifier(pl.LightningModule):
    """Trains a network to tell classes apart.

    Args:
        net: Images to logits (batch, num_classes).
        num_classes: How many labels there are.
        optimizer: Makes the optimizer from the parameters; in Hydra a `_partial_: true`.
        lr_scheduler: Makes the LR schedule from the optimizer, stepped after each epoch; None keeps the LR.
        label_smoothing: Probability mass spread over all classes, in [0, 1).
        example: A batch of images to trace the network on, or None.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        label_smoothing: float = 0.0,
        example: Tensor | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"`num_classes` is how many labels there are, 2 or more; got {num_classes}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` is a share of the probability, in [0, 1); got {label_smoothing}.")
        self.net = net
        self.label_smoothing = label_smoothing
        self.example_input_array = example
        self.train_acc, self.val_acc, self.test_acc = (_accuracy(num_classes) for _ in range(3))
        self._make_optimizer = optimizer
        self._make_lr_scheduler = lr_scheduler

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, channels, h, w) to logits (batch, num_classes)."""
        logits: Tensor = self.net(images)
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        loss, logits = self._loss(batch)
        self.train_acc(logits, batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy of one batch."""
        loss, logits = self._loss(batch)
        self.val_acc(logits, batch[1])
        self.log("val/loss", loss)
        self.log("val/acc", self.val_acc, prog_bar=True)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy of one batch."""
        _, logits = self._loss(batch)
        self.test_acc(logits, batch[1])
        self.log("test/acc", self.test_acc)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, with its LR schedule if there is one."""
        optimizer = self._make_optimizer(self.parameters())
        if self._make_lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._make_lr_scheduler(optimizer)}

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = self(images)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing), logits


def _accuracy(num_classes: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(num_classes, average="micro")
