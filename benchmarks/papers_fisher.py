"""Rows of Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning", table 1: LeNet-5."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import torch
from papers_han import LENET5
from papers_rows import Bench, Row, Setting, Task
from torch import nn

from lightning_prune.allocation import Allocation, ByCost, Global
from lightning_prune.callbacks import FisherPruneCallback
from lightning_prune.cost import count_macs, count_params
from lightning_prune.inputs import Inputs

PRUNING = Setting(16, 0.02, batch_size=128)
"""Three channels go every 10 steps, and the LR falls to 0 by the end: three quarters of the fit are fine-tuning."""


def macs(net: nn.Module) -> int:
    """Multiply-accumulates for one image."""
    return count_macs(net, Inputs((torch.zeros(1, 1, 28, 28),)))


def pruned(
    task: Task, bench: Bench, seed: int, *, left: float, allocation: Allocation | None = None
) -> dict[str, object]:
    """The dense net, trained on while three channels go every 10 steps, until so much of its MACs is left."""
    net = bench.dense(task, seed)
    dense = macs(net), count_params(net)
    callback = FisherPruneCallback(
        1 - left, of="macs", channels_per_event=3, every_n_steps=10, allocation=allocation or Global()
    )
    bench.train(net, task, seed, PRUNING, [callback])
    widths = {name: float(len(p)) for name, p in net.named_parameters() if p.dim() > 1}
    return {
        **bench.errors(net, task, seed),
        "% of MACs": 100 * macs(net) / dense[0],
        "% of parameters": 100 * count_params(net) / dense[1],
        **{f"channels of {name.removesuffix('.weight')}": width for name, width in list(widths.items())[:-1]},
        "setting": asdict(PRUNING),
    }


def trained_on(task: Task, bench: Bench, seed: int) -> dict[str, object]:
    """The dense net, trained on for as long as the others."""
    net = bench.dense(task, seed)
    bench.train(net, task, seed, PRUNING)
    return {**bench.errors(net, task, seed), "setting": asdict(PRUNING)}


ROWS = (
    Row("fisher, lenet_5 dense, trained as long", partial(trained_on, LENET5), {"error": 0.80}),
    Row("fisher, lenet_5, beta = 0", partial(pruned, LENET5, left=0.26), {"error": 0.84, "% of MACs": 26.0}),
    Row(
        "fisher, lenet_5, beta > 0",
        partial(pruned, LENET5, left=0.10, allocation=ByCost(beta=30.0)),
        {"error": 0.79, "% of MACs": 10.0},
    ),
    Row(
        "fisher, lenet_5, beta*",
        partial(pruned, LENET5, left=0.17, allocation=ByCost()),
        {"error": 0.86, "% of MACs": 17.0},
    ),
)
