"""Rows of Louizos, Welling, Kingma 2018, "Learning sparse neural networks through L0 regularization", table 1.

Beside them three methods that halve the MACs of a ResNet-20, with the same epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial

import lightning.pytorch as pl
from papers_han import LENET5, LENET300
from papers_rows import Bench, Callbacks, Row, Setting, Task
from papers_slimming import RESNET20_FASHION, size, strength
from torch import nn

from lightning_prune.allocation import Global
from lightning_prune.callbacks import BNSlimmingCallback, L0PruneCallback, MagnitudePruneCallback
from lightning_prune.schedules import cubic

MLP, CAFFE = Setting(60, 0.1, weight_decay=5e-4), Setting(25, 0.02)
LAST, GATE_LR = 3, 5e-3
"""Gates are on but for the last epochs: their noise keeps nets from overfitting. The paper has 200 epochs of Adam."""

PAPER_PRICES_MLP = {"*fc1:inputs": 0.1, "*fc1": 0.011, "*fc2": 0.0032}
PAPER_PRICES_CAFFE = {"*conv1": 0.002, "*conv2": 0.006, "*fc1:inputs": 0.1, "*fc1": 0.00125}
"""The paper's lambda of 0.1 counts for each gate the weights on one side of it only; with both sides, as here, a
channel of the Caffe net's second convolution has 17 times as many, one of its first linear layer 80 times."""

APART_MLP = {"*fc1:inputs": 0.1, "*fc1": 0.15, "*fc2": 0.5}
APART_CAFFE = {"*conv*": 0.05, "*fc1:inputs": 0.1, "*fc1": 0.2}
"""Such that the widths come near to those of the paper with separate lambdas."""

TWICE = replace(RESNET20_FASHION.dense, epochs=2 * RESNET20_FASHION.dense.epochs, cycles=2)
HALF = TWICE.epochs // 2


def gated(
    task: Task, bench: Bench, seed: int, *, setting: Setting, strengths: Mapping[str, float] | float
) -> dict[str, object]:
    """A fresh net with gates on its channels and on the inputs of its first linear layer."""
    pl.seed_everything(seed, verbose=False)
    net = task.make()
    callback = L0PruneCallback(
        strength=strengths,
        granularity={"*": "channels", "*fc1": "inputs"},
        gate_lr=GATE_LR,
        drop_rate=0.5,
        seed=seed,
        begin=setting.epochs - LAST,
    )
    bench.train(net, task, seed, setting, [callback])
    return {**bench.errors(net, task, seed), **architecture(net), "setting": {**asdict(setting), "lambda": strengths}}


def architecture(net: nn.Module) -> dict[str, object]:
    """The channels of each convolution, and the inputs of each linear layer that are read, as the paper counts them."""
    convolutions = {name: len(m.weight) for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    linear = {name: m.weight for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    read = {name: int((weight.detach() != 0).any(0).sum()) for name, weight in linear.items()}
    widths = {f"channels of {name}": float(width) for name, width in convolutions.items()}
    return {**widths, **{f"inputs of {name}": float(width) for name, width in read.items()}}


def halved(task: Task, bench: Bench, seed: int, *, callbacks: Callbacks) -> dict[str, object]:
    """A fresh net that loses half of its MACs in the middle of twice the dense net's epochs."""
    pl.seed_everything(seed, verbose=False)
    net = task.make()
    before = size(net)
    bench.train(net, task, seed, TWICE, callbacks(TWICE))
    less = {f"% fewer {key}": 100 * (1 - now / before[key]) for key, now in size(net).items()}
    return {**bench.errors(net, task, seed), **less, "setting": asdict(TWICE)}


def l0(setting: Setting) -> list[pl.Callback]:
    """Gates over the second third of the first half and over its last one: what is untrained cannot choose."""
    return [L0PruneCallback(0.5, of="macs", drop_rate=0.1, start=HALF // 3, begin=HALF)]


def slimming(setting: Setting) -> list[pl.Callback]:
    """The L1 penalty over the first half."""
    lam = strength(RESNET20_FASHION.dense)
    return [BNSlimmingCallback(0.5, of="macs", strength=lam, begin=HALF, initial_scale=0.5)]


def magnitude(setting: Setting) -> list[pl.Callback]:
    """The smallest channels go over the second quarter."""
    return [MagnitudePruneCallback(0.5, of="macs", allocation=Global(), schedule=cubic, begin=HALF // 2, end=HALF)]


PAPER_MLP = {"error": 1.4, "inputs of fc1": 219.0, "inputs of fc2": 214.0, "inputs of fc3": 100.0}
PAPER_MLP_APART = {"error": 1.8, "inputs of fc1": 266.0, "inputs of fc2": 88.0, "inputs of fc3": 33.0}
PAPER_CAFFE = {
    "error": 0.9,
    "channels of conv1": 20.0,
    "channels of conv2": 25.0,
    "inputs of fc1": 45.0,
    "inputs of fc2": 462.0,
}
PAPER_CAFFE_APART = {
    "error": 1.0,
    "channels of conv1": 9.0,
    "channels of conv2": 18.0,
    "inputs of fc1": 65.0,
    "inputs of fc2": 25.0,
}

ROWS = (
    Row("l0, lenet_300_100", partial(gated, LENET300, setting=MLP, strengths=PAPER_PRICES_MLP), PAPER_MLP),
    Row(
        "l0, lenet_300_100, separate lambdas",
        partial(gated, LENET300, setting=MLP, strengths=APART_MLP),
        PAPER_MLP_APART,
    ),
    Row("l0, lenet_5", partial(gated, LENET5, setting=CAFFE, strengths=PAPER_PRICES_CAFFE), PAPER_CAFFE),
    Row(
        "l0, lenet_5, separate lambdas",
        partial(gated, LENET5, setting=CAFFE, strengths=APART_CAFFE),
        PAPER_CAFFE_APART,
    ),
    *(
        Row(f"{name}, resnet20, FashionMNIST, half of the MACs", partial(halved, RESNET20_FASHION, callbacks=callbacks))
        for name, callbacks in (("l0", l0), ("slimming", slimming), ("magnitude", magnitude))
    ),
)
