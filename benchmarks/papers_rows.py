"""What a row of a paper's table is made of: images, a way to train, dense weights kept for all rows, an error."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, TypeAlias

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_prune.workbench import Classifier, Digits, TorchvisionImages
from lightning_prune.workbench.data import ImageSet, MemoryImages


@dataclass(frozen=True)
class Setting:
    """How a net is trained: SGD with Nesterov momentum 0.9 and an LR that falls to zero along a cosine, step by step.

    Attributes:
        epochs: Passes over the training images.
        lr: The LR of the first step.
        weight_decay: L2 on all parameters.
        batch_size: Images in a batch.
        limit: Train on that many images only, or on all.
        cycles: How often the LR goes through the cosine; divides the epochs.
    """

    epochs: int
    lr: float
    weight_decay: float = 5e-4
    batch_size: int = 128
    limit: int | None = None
    cycles: int = 1


Callbacks: TypeAlias = Callable[[Setting], list[pl.Callback]]
"""Makes the callbacks of one fit, anew for each seed, when it is known how the net will be trained."""


def no_callbacks(setting: Setting) -> list[pl.Callback]:
    """Plain training."""
    return []


@dataclass(frozen=True)
class Task:
    """A net, its images, and how its dense reference is trained.

    Attributes:
        name: Unique among the tasks.
        make: Builds the net with fresh weights.
        images: The set of images; "digits" are those of scikit-learn.
        dense: How the dense net is trained.
        more: How it, or a pruned net, is trained on from there.
    """

    name: str
    make: Callable[[], nn.Module]
    images: ImageSet | Literal["digits"]
    dense: Setting
    more: Setting


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: Unique among the rows.
        run: Measures it with one seed; what it returns is written down under these names.
        paper: The paper's figures under the same names.
    """

    name: str
    run: Callable[[Bench, int], dict[str, object]]
    paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Where the images lie and where dense weights are kept."""

    root: Path
    cache: Path

    def images(self, task: Task, seed: int, setting: Setting) -> MemoryImages:
        """The images of a task in memory, split and ordered by the seed."""
        data = _images(task.images, self.root, seed, setting.limit)
        data.batch_size = setting.batch_size
        return data

    def dense(self, task: Task, seed: int) -> nn.Module:
        """The dense net of a task, trained once for all rows that start from it."""
        return self.kept(task, seed, task.name, asdict(task.dense), no_callbacks)

    def kept(self, task: Task, seed: int, name: str, told: dict[str, object], callbacks: Callbacks) -> nn.Module:
        """A fresh net of a task, trained as its dense one is but with callbacks, once for all rows that start from it.

        Args:
            task: The net and its images.
            seed: Of weights, split and order.
            name: Under which the weights are kept.
            told: All settings that they depend on.
            callbacks: Makes the callbacks.
        """
        torch.manual_seed(seed)
        net = task.make()
        kept = self.cache / f"{name}-{seed}-{_short(told)}.pt"
        if kept.exists():
            net.load_state_dict(torch.load(kept, weights_only=True))
            return net
        self.train(net, task, seed, task.dense, callbacks(task.dense))
        self.cache.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), kept.with_suffix(".part"))
        kept.with_suffix(".part").rename(kept)
        return net

    def train(
        self, net: nn.Module, task: Task, seed: int, setting: Setting, callbacks: Sequence[pl.Callback] = ()
    ) -> pl.LightningModule:
        """Train a net in place, with callbacks that may prune it."""
        data = self.images(task, seed, setting)
        net = net.train().to(memory_format=torch.channels_last)  # Lightning keeps the mode; faster on CPUs
        module = Training(net, setting, data)
        trainer = pl.Trainer(max_epochs=setting.epochs, callbacks=list(callbacks), **_QUIET)  # type: ignore[arg-type]
        trainer.fit(module, train_dataloaders=data.train_dataloader())
        if not all(bool(parameter.isfinite().all()) for parameter in net.parameters()):
            raise FloatingPointError(f"{task.name} diverged with seed {seed} under {setting}. Lower `lr`.")
        return module

    def errors(self, net: nn.Module, task: Task, seed: int) -> dict[str, float]:
        """Percent of the official test images, and of the validation images, that the net gets wrong."""
        data = self.images(task, seed, task.dense)
        return {"error": _error(net, data.test_dataloader()), "val_error": _error(net, data.val_dataloader())}

    def logits(self, net: nn.Module, task: Task, seed: int) -> Tensor:
        """What the net says of the official test images."""
        net.eval()
        with torch.no_grad():
            return torch.cat([net(images) for images, _ in self.images(task, seed, task.dense).test_dataloader()])


class Training(Classifier):
    """The workbench's classifier without its logging of each step, which costs small nets two thirds of an epoch."""

    def __init__(self, net: nn.Module, setting: Setting, data: MemoryImages) -> None:
        sgd = partial(torch.optim.SGD, lr=setting.lr, momentum=0.9, nesterov=True, weight_decay=setting.weight_decay)
        example = torch.zeros(2, data.in_channels, data.image_size, data.image_size)
        super().__init__(net, data.num_classes, optimizer=sgd, example=example)
        self.cycles = setting.cycles

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Let the LR fall at each step."""
        optimizer = self._make_optimizer(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches) // self.cycles
        cosine = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


_QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@lru_cache(maxsize=2)
def _images(name: ImageSet | Literal["digits"], root: Path, seed: int, limit: int | None) -> MemoryImages:
    data = Digits(seed=seed) if name == "digits" else TorchvisionImages(name, root, seed=seed, limit_train=limit)
    data.setup()
    return data


def _error(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    net.eval()
    with torch.no_grad():
        right = torch.cat([net(images).argmax(1) == labels for images, labels in batches])
    return round(100 * (1 - float(right.double().mean())), 4)


def _short(setting: dict[str, object]) -> str:
    return hashlib.sha256(repr(sorted(setting.items())).encode()).hexdigest()[:8]
