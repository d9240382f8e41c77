"""Networks and data whose sensitivity is known, and a look at all that a scan must leave alone."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.sensitivity import Sensitivity


def linear(rows: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows)
    return layer


def two_layers() -> nn.Sequential:
    """The first layer's small weights are never used (inputs 2 and 3 are 0); the second needs all of its weights."""
    first = linear([[2.0, 0.0, 0.1, 0.1], [0.0, 2.0, 0.1, 0.1]])
    return nn.Sequential(first, linear([[1.0, 0.0], [0.0, 3.0]]))


def two_batches() -> list[tuple[Tensor, Tensor]]:
    inputs = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [1.0, 0, 0, 0]])
    targets = torch.tensor([0, 1, 0])
    return [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        *(nn.Flatten(), nn.Linear(6 * 16, 8), nn.ReLU(), nn.Linear(8, 3)),
    )


def images(count: int = 12) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(count, 1, 6, 6), torch.arange(count) % 3)]


def values(scan: Sensitivity, metric: str = "accuracy") -> dict[str, tuple[float | None, ...]]:
    return {row.layer: row.values[metric] for row in scan.rows}


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


class Data(pl.LightningDataModule):
    """Remembers what it was asked; its inputs are doubled by a hook."""

    calls: ClassVar[list[str]] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2, batch[1]

    def val_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(3)
        data = TensorDataset(torch.randn(10, 4, generator=generator), torch.arange(10) % 3)
        return DataLoader(data, batch_size=4)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "identities": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "attributes": [list(vars(module)) for module in model.modules()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].copy(),
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for part in ("identities", "modes", "attributes", "python"):
        assert after[part] == before[part], part
    for name, tensor in before["state"].items():
        assert after["state"][name].numpy().tobytes() == tensor.numpy().tobytes(), name
    assert torch.equal(after["torch"], before["torch"])
    assert np.array_equal(after["numpy"], before["numpy"])
