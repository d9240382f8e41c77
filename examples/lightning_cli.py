"""Pruning from a LightningCLI: everything about it stands in lightning_cli.yaml, and nothing in this file.

One sees a fit that the yaml describes. All of what ran, defaults too, is saved as lightning_logs/version_0/config.yaml,
and `python lightning_cli.py fit --config <that file>` runs it again. Try also

    python lightning_cli.py fit --config lightning_cli.yaml --trainer.max_epochs 8
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lightning_prune import history_of
from lightning_prune.workbench import Digits


class Net(pl.LightningModule):
    """A small convolutional network; the yaml brings its optimizer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fc = nn.Linear(2 * width * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(self.conv2(self.conv1(images).relu()).relu(), 2)
        return self.fc(features.flatten(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)


if __name__ == "__main__":
    arguments = sys.argv[1:] or ["fit", "--config", str(Path(__file__).with_suffix(".yaml"))]
    cli = LightningCLI(Net, Digits, args=arguments)
    for record in history_of(cli.model):
        print(f"epoch {record.epoch}: {record}")
