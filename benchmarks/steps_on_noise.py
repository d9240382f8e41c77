"""What the benchmarks of training steps share: a network on noise, and a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    """A network on noise: batches of 8 images of 3 x size x size."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., Any], steps: int, size: int = 64) -> None:
        super().__init__()
        self.net, self.optimizer, self.steps, self.size = net, optimizer, steps, size
        self.example_input_array = torch.zeros(1, 3, size, size)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        """Return batches of 8."""
        images = torch.randn(self.steps * 8, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.zeros(self.steps * 8, dtype=torch.long)), batch_size=8)

    def configure_optimizers(self) -> Any:
        """Return the optimizer asked for."""
        return self.optimizer(self.parameters())


class Clock(pl.Callback):
    """Times steps from the start of one batch to the start of the next; last in the list, so behind all events.

    Args:
        timer: Says what time it is; `time.process_time` counts only when this process runs, which on a machine that
            others use too is what can be compared.
    """

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self.timer = timer
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        """Note the time."""
        self.starts.append(self.timer())

    @property
    def step(self) -> float:
        """The median step, without the first."""
        return median(after - before for before, after in zip(self.starts[1:], self.starts[2:], strict=False))
