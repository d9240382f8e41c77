"""Rows of Liu et al. 2017, "Learning efficient convolutional networks through network slimming", tables 1 and 2."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from itertools import product

import lightning.pytorch as pl
import torch
from papers_rows import Bench, Callbacks, Row, Setting, Task
from papers_watch import Milestones, Scales, batch_norms, scale_counts
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.allocation import Allocation, Global, Uniform
from lightning_prune.calibration import recalibrate
from lightning_prune.callbacks import BNSlimmingCallback
from lightning_prune.cost import count_macs, count_params
from lightning_prune.criteria import BNScale
from lightning_prune.inputs import Inputs
from lightning_prune.types import Constants
from lightning_prune.workbench import VGG16BN, MnistFC, resnet20


class SmallCNN(nn.Module):
    """Three convolutions of 24, 48 and 48 channels, each with a batch norm and a ReLU: enough for 8 x 8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.conv2, self.bn2 = nn.Conv2d(24, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        self.conv3, self.bn3 = nn.Conv2d(48, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        self.fc = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 1, 8, 8) to logits (batch, 10)."""
        x = torch.relu(self.bn1(self.conv1(images)))
        x = torch.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        logits: Tensor = self.fc(torch.relu(self.bn3(self.conv3(x))).mean((2, 3)))
        return logits


_FC = Setting(30, 0.1, weight_decay=1e-4, batch_size=256)
_TEN, _SIX, _FOUR = (Setting(epochs, 0.1, 1e-4, batch_size=64, limit=10_000) for epochs in (10, 6, 4))
_DIGITS = Setting(60, 0.06, weight_decay=1e-4, batch_size=64)
MNIST_FC = Task("mnist_fc", partial(MnistFC, bn_scale=0.5), "MNIST", dense=_FC, more=_FC)
VGG16, RESNET = partial(VGG16BN, 1, 28, width=0.25, bn_scale=0.5), partial(resnet20, 1, 28)
VGG16_FASHION = Task("vgg16_bn, FashionMNIST", VGG16, "FashionMNIST", dense=_TEN, more=_TEN)
VGG16_MNIST = Task("vgg16_bn, MNIST", VGG16, "MNIST", dense=_FOUR, more=_FOUR)
RESNET20_FASHION = Task("resnet20, FashionMNIST", RESNET, "FashionMNIST", dense=_SIX, more=_SIX)
RESNET20_MNIST = Task("resnet20, MNIST", RESNET, "MNIST", dense=_FOUR, more=_FOUR)
IN_PASSES = replace(VGG16_FASHION, dense=replace(_SIX, lr=0.05))
DIGITS = Task("small_cnn", SmallCNN, "digits", dense=_DIGITS, more=_DIGITS)
"""Trained and fine-tuned alike, as in the paper; the convolutional nets on 10,000 images, to end in time."""


def dense(task: Task, bench: Bench, seed: int) -> dict[str, object]:
    """The dense reference, trained without a penalty."""
    net = bench.dense(task, seed)
    return {**bench.errors(net, task, seed), **size(net), "setting": asdict(task.dense)}


def trained_on(task: Task, bench: Bench, seed: int) -> dict[str, object]:
    """The dense net, trained on for as long as a slimmed net is fine-tuned."""
    net = bench.dense(task, seed)
    bench.train(net, task, seed, task.more)
    return {**bench.errors(net, task, seed), **size(net), "setting": asdict(task.more)}


def slimmed(task: Task, bench: Bench, seed: int, *, callbacks: Callbacks, passes: int = 1) -> dict[str, object]:
    """A fresh net, trained sparse, cut and fine-tuned, once for each pass, and how much smaller it is in the end.

    Each half of a pass has the whole LR schedule, as in the paper; the cut falls between the two.

    Args:
        task: The net and its images.
        bench: Where things lie.
        seed: Of weights, split and order.
        callbacks: Makes the callbacks that slim and cut.
        passes: How often.
    """
    pl.seed_everything(seed, verbose=False)
    net = task.make()
    before = size(net)
    setting = replace(task.dense, epochs=2 * passes * task.dense.epochs, cycles=2 * passes)
    scales, milestones = Scales(), Milestones(setting, lambda: bench.errors(net, task, seed)["error"])
    bench.train(net, task, seed, setting, [scales, *callbacks(setting), milestones])
    less = {f"% fewer {key}": 100 * (1 - now / before[key]) for key, now in size(net).items()}
    errors = bench.errors(net, task, seed)
    return {**errors, **less, **milestones.figures, "scales": scales.counts, "setting": asdict(setting)}


def at_half_time(setting: Setting, *, ratio: float, strength: float, per_layer: bool = False) -> list[pl.Callback]:
    """A callback that slims over the first half of a fit, and cuts then."""
    allocation = Uniform() if per_layer else Global()
    begin = setting.epochs // 2
    return [BNSlimmingCallback(ratio, strength=strength, allocation=allocation, begin=begin, initial_scale=0.5)]


def slim(task: Task, bench: Bench, seed: int, strength: float) -> nn.Module:
    """A fresh net, trained with the penalty and not cut; trained once for all rows that start from it."""
    callbacks = partial(_penalty_only, strength=strength)
    return bench.kept(task, seed, f"{task.name}-slim", {**asdict(task.dense), "strength": strength}, callbacks)


def _penalty_only(setting: Setting, *, strength: float) -> list[pl.Callback]:
    """The penalty is off in the last epoch, whose LR is nearly 0: it ends with an event, and that one cuts nothing."""
    return [BNSlimmingCallback(0.0, strength=strength, begin=setting.epochs - 1, initial_scale=0.5)]


def fine_tuned(
    task: Task, bench: Bench, seed: int, *, ratio: float, strength: float, allocation: Allocation | None = None
) -> dict[str, object]:
    """A slimmed net, cut before the first step of a fit that fine-tunes it."""
    net = slim(task, bench, seed, strength)
    before, slimmed = size(net), bench.errors(net, task, seed)["error"]
    milestones = Milestones(task.more, lambda: bench.errors(net, task, seed)["error"])
    cut = BNSlimmingCallback(ratio, strength=strength, allocation=allocation, begin=0)
    bench.train(net, task, seed, task.more, [cut, milestones])
    less = {f"% fewer {key}": 100 * (1 - now / before[key]) for key, now in size(net).items()}
    after = {"error before the cut": slimmed, "error right after it": milestones.figures["error right after cut 1"]}
    setting = {**asdict(task.more), "strength": strength}
    return {**bench.errors(net, task, seed), **less, **after, "setting": setting}


def absorbed(
    task: Task, bench: Bench, seed: int, *, strength: float, ratios: Sequence[float] = (0.3, 0.5, 0.6, 0.7)
) -> dict[str, object]:
    """A slimmed net right after cuts that drop, or absorb, what the removed channels emit; nothing is trained after.

    For each ratio the accuracy, the same after the running statistics have been estimated anew over 20 batches, and the
    root mean square of what the cut has changed the logits by.
    """
    net = slim(task, bench, seed, strength)
    images = bench.images(task, seed, task.dense)
    example = torch.zeros(2, images.in_channels, images.image_size, images.image_size)
    errors, logits = bench.errors(net, task, seed), bench.logits(net, task, seed)
    found: dict[str, object] = {}
    ways: tuple[Constants, ...] = ("drop", "absorb")
    for ratio, constants in product(ratios, ways):
        small = deepcopy(net)
        prune(small, example, pruning_ratio=ratio, criterion=BNScale(), allocation=Global(), constants=constants)
        name = f"at {ratio:.0%}, {constants}"
        found[f"accuracy {name}"] = 100 - bench.errors(small, task, seed)["error"]
        found[f"logits' change {name}"] = float((bench.logits(small, task, seed) - logits).square().mean().sqrt())
        recalibrate(small, images.train_dataloader(), 20)
        found[f"accuracy {name}, recalibrated"] = 100 - bench.errors(small, task, seed)["error"]
    setting = {**asdict(task.dense), "strength": strength}
    return {
        **errors,
        "accuracy before": 100 - errors["error"],
        **found,
        "scales": scale_counts(net),
        "setting": setting,
    }


def size(net: nn.Module) -> dict[str, float]:
    """Parameters, multiply-accumulates for one image, and channels behind a batch norm."""
    return {
        "parameters": float(count_params(net)),
        "MACs": float(count_macs(net, Inputs((torch.zeros(1, 1, 28, 28),)))),
        "channels": float(sum(norm.num_features for norm in batch_norms(net))),
    }


RATIOS, PASSES = (0.4, 0.5, 0.6, 0.7), (0.5, 0.75, 0.875)
"""Of channels."""

MNIST_80 = partial(at_half_time, ratio=0.8, strength=2e-4, per_layer=True)
"""Scales can travel by 0.65 in 30 epochs; with the paper's 1e-4 they could not reach zero."""


def strength(setting: Setting) -> float:
    """For the convolutional nets: scales can travel by 1.4 in as many epochs, of 141 steps each, as they have."""
    return 0.002 / (setting.lr * setting.epochs)


def half_and_half(setting: Setting) -> list[pl.Callback]:
    """Passes that each take half of the channels that are left, and no more than half of any layer's."""
    half = strength(replace(setting, epochs=setting.epochs // setting.cycles))
    return [BNSlimmingCallback(PASSES, strength=half, allocation=Global(event_cap=0.5), initial_scale=0.5)]


ROWS = (
    Row("absorption, small_cnn", partial(absorbed, DIGITS, strength=0.015)),
    Row("mnist_fc dense", partial(dense, MNIST_FC), {"error": 1.43}),
    Row("mnist_fc dense, trained as long", partial(trained_on, MNIST_FC)),
    Row("mnist_fc 80 %", partial(slimmed, MNIST_FC, callbacks=MNIST_80), {"error": 1.49, "% fewer parameters": 84.4}),
    Row("vgg16_bn, FashionMNIST, in passes", partial(slimmed, IN_PASSES, callbacks=half_and_half, passes=len(PASSES))),
    *(
        row
        for task in (VGG16_FASHION, VGG16_MNIST, RESNET20_FASHION, RESNET20_MNIST)
        for row in (
            Row(f"{task.name} dense", partial(dense, task)),
            Row(f"{task.name} dense, trained as long", partial(trained_on, task)),
            Row(f"absorption, {task.name}", partial(absorbed, task, strength=strength(task.dense))),
            *(
                Row(f"{task.name} {ratio:.0%}", partial(fine_tuned, task, ratio=ratio, strength=strength(task.dense)))
                for ratio in RATIOS
            ),
        )
    ),
)
