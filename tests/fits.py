"""Small networks, data and Trainers for tests that train: 48 images of 6x6 pixels in 4 classes, batches of 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import PruneRecord
from lightning_prune.workbench.batches import TensorImages, loader

STEPS = 6
"""Batches in an epoch."""

EXAMPLE = torch.zeros(2, 1, 6, 6)

momentum = partial(SGD, lr=0.05, momentum=0.9)


def network(seed: int = 0) -> nn.Sequential:
    """Two groups of 8 channels that can go ("net.0" and "net.3"), and the head's 4 that cannot."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


class Module(pl.LightningModule):
    """A classifier. With `example=None` the first batch is what the callback reads the network with."""

    def __init__(
        self,
        optimizer: Callable[..., Optimizer] = momentum,
        scheduler: Callable[[Optimizer], dict[str, Any]] | None = None,
        *,
        net: nn.Module | None = None,
        example: Tensor | None = EXAMPLE,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.net = net or network(seed)
        self.example_input_array = example
        self._optimizer, self._scheduler = optimizer, scheduler

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return images()

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return images(seed=1)

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.parameters())
        return {"optimizer": optimizer, **(self._scheduler(optimizer) if self._scheduler else {})}


class Resumable(Module):
    """Its loader goes on in the middle of an epoch."""

    def train_dataloader(self) -> Any:
        return loader(TensorImages(*images().dataset.tensors), 8)  # type: ignore[attr-defined]


def images(seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(48, 1, 6, 6, generator=generator)
    labels = torch.randint(4, (48,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=8)


def trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **(quiet | settings))


def widths(module: nn.Module) -> list[int]:
    """Channels of the two convolutions."""
    return [layer.out_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def kept_of(tensor: Tensor, record: PruneRecord, name: str) -> Tensor:
    """What a record keeps of a tensor from before its cut, by hand."""
    for dim, positions in record.kept.get(name, {}).items() if tensor.dim() else ():
        tensor = tensor.index_select(dim, torch.tensor(positions)) if tensor.shape[dim] > 1 else tensor
    return tensor


def states(module: nn.Module, optimizers: Iterable[Optimizer | LightningOptimizer]) -> dict[str, dict[str, Tensor]]:
    """Parameter name -> copies of its optimizer's state tensors, and of itself under "self"."""
    torch_optimizers = [item.optimizer if isinstance(item, LightningOptimizer) else item for item in optimizers]
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in module.named_parameters():
        state = next((item.state[parameter] for item in torch_optimizers if parameter in item.state), {})
        tensors = {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}
        found[name] = {"self": parameter.detach().clone(), **tensors}
    return found


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two state dicts are the same bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
