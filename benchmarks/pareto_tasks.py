"""What all methods of the Pareto benchmark are given alike: nets, images, dense weights, steps, and a ruler.

A net is trained once for each seed, and every method starts from these weights, trains `BUDGET` epochs with SGD, the
same LR at every step and the same order of images, and is asked for the same MACs. Widths and shares of the training
sets are small so that two cores get through all cells in some hours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import lightning.pytorch as pl
import torch
from papers_rows import Bench, Setting, Task
from torch import Tensor, nn

from lightning_prune.cost import count_macs, count_params
from lightning_prune.inputs import Inputs
from lightning_prune.workbench import VGG16BN, LeNet5, resnet20

TARGETS = (0.3, 0.5, 0.7, 0.85)
SEEDS = (0, 1, 2)
BUDGET = 3
"""Epochs that a method has, from its first look at the dense net to the end."""

_LENET = Setting(6, 0.02, 5e-4, batch_size=64, limit=10_000)
_VGG = Setting(10, 0.1, 5e-4, batch_size=64, limit=10_000)
_RESNET = Setting(10, 0.1, 5e-4, batch_size=64, limit=10_000)


def _task(name: str, dense: Setting, lr: float, **how: object) -> Task:
    return Task(name, dense=dense, more=replace(dense, epochs=BUDGET, lr=lr), **how)  # type: ignore[arg-type]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task("lenet5", _LENET, 0.02, make=LeNet5, images="MNIST"),
        _task("vgg16_bn", _VGG, 0.02, make=partial(VGG16BN, 1, 28, width=0.25), images="FashionMNIST"),
        _task("resnet20", _RESNET, 0.02, make=partial(resnet20, 1, 28, width=0.5), images="FashionMNIST"),
    )
}


@dataclass(frozen=True)
class Job:
    """One method's turn at one task, seed and target.

    Attributes:
        bench: Where images and dense weights lie.
        task: The net, its images and the settings.
        seed: Of weights, split and order.
        target: Fraction of the dense net's MACs that is to go, in (0, 1).
        example: One image.
    """

    bench: Bench
    task: Task
    seed: int
    target: float
    example: Tensor = field(default_factory=lambda: torch.zeros(1, 1, 28, 28))

    @property
    def steps(self) -> int:
        """Optimizer steps of the budget."""
        setting = self.task.more
        return setting.epochs * -(-(setting.limit or 0) // setting.batch_size)

    def dense(self) -> nn.Module:
        """The dense net, a copy of its own."""
        return deepcopy(self.bench.dense(self.task, self.seed))

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The first batches of training images with their labels."""
        loader = self.bench.images(self.task, self.seed, self.task.more).train_dataloader()
        return [batch for batch, _ in zip(loader, range(count), strict=False)]

    def train(self, net: nn.Module, callbacks: Sequence[pl.Callback] = ()) -> nn.Module:
        """Train for the budget, with callbacks that may prune; return the net."""
        self.bench.train(net, self.task, self.seed, self.task.more, callbacks)
        return net

    def macs(self, net: nn.Module) -> int:
        """Multiplications and additions of one image, in pairs."""
        return count_macs(net, Inputs((self.example,)))

    def removed(self, net: nn.Module) -> float:
        """The fraction of the dense net's MACs that is gone."""
        return 1 - self.macs(net) / self.macs(self.task.make())

    def measure(self, net: nn.Module) -> dict[str, float]:
        """Accuracy in percent of the official test images, sizes, and milliseconds at batch 1 and 64."""
        net = net.eval().to(memory_format=torch.contiguous_format)
        error = self.bench.errors(net, self.task, self.seed)
        return {
            "accuracy": 100 - error["error"],
            "val accuracy": 100 - error["val_error"],
            "macs": self.macs(net),
            "removed": self.removed(net),
            "params": count_params(net),
            "ms, batch 1": latency(net, self.example, 30),
            "ms, batch 64": latency(net, self.example.expand(64, -1, -1, -1).contiguous(), 7),
        }


def latency(net: nn.Module, images: Tensor, rounds: int) -> float:
    """Milliseconds that the thread spends in a pass, the median of some after three to warm up."""
    times = []
    with torch.inference_mode():
        for _ in range(rounds + 3):
            start = time.thread_time()
            net(images)
            times.append((time.thread_time() - start) * 1e3)
    return median(times[3:])


def least_ratio(removed: Callable[[float], float], target: float, steps: int = 8) -> float:
    """The smallest ratio, in 2^steps parts of 1, with which at least `target` of the MACs is gone.

    Args:
        removed: What a ratio in (0, 1) removes; it rises with the ratio.
        target: Fraction of the MACs.
        steps: Of the bisection.
    """
    low, high = 0, 2**steps
    while high - low > 1:
        middle = (low + high) // 2
        if removed(middle / 2**steps) >= target:
            high = middle
        else:
            low = middle
    return high / 2**steps
