"""Our methods in the Pareto benchmark: the callbacks of one fit, each asked for the same MACs."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from pareto_tasks import Job
from torch import nn

from lightning_prune import prune
from lightning_prune.allocation import ByCost, Global
from lightning_prune.callbacks import (
    BNSlimmingCallback,
    FisherPruneCallback,
    L0PruneCallback,
    LassoPruneCallback,
    MagnitudePruneCallback,
    PruneCallback,
)
from lightning_prune.criteria import LAMP, GeometricMedian, Random, Taylor
from lightning_prune.schedules import cubic

Made = Callable[[Job], pl.Callback]


def at_once(job: Job) -> nn.Module:
    """What a newcomer with a trained net gets: `prune` with its defaults, then training."""
    net = job.dense()
    prune(net, job.example, pruning_ratio=job.target, of="macs")
    return job.train(net)


def in_mid_fit(job: Job) -> pl.Callback:
    """What a newcomer who trains from scratch gets: events over the second third of the fit."""
    return MagnitudePruneCallback(job.target, of="macs")


def geometric_median(job: Job) -> pl.Callback:
    """Before the first step."""
    return PruneCallback(job.target, of="macs", criterion=GeometricMedian(), begin=0)


def lamp(job: Job) -> pl.Callback:
    """Before the first step, over all layers."""
    return PruneCallback(job.target, of="macs", criterion=LAMP(), allocation=Global(), begin=0)


def random(job: Job) -> pl.Callback:
    """Before the first step."""
    return PruneCallback(job.target, of="macs", criterion=Random(), begin=0)


def taylor(job: Job) -> pl.Callback:
    """In five events over the first third, by the gradients since the last one."""
    every, begin = _early(job)
    return PruneCallback(
        job.target,
        of="macs",
        criterion=Taylor(),
        allocation=Global(),
        schedule=cubic,
        begin=begin,
        end=begin + 5 * every,
        every_n_steps=every,
    )


def fisher(job: Job) -> pl.Callback:
    """The same by Fisher information."""
    every, begin = _early(job)
    return FisherPruneCallback(job.target, of="macs", begin=begin, end=begin + 5 * every, every_n_steps=every)


def fisher_by_cost(job: Job) -> pl.Callback:
    """The same, weighed against the MACs that a channel costs."""
    every, begin = _early(job)
    return FisherPruneCallback(
        job.target, of="macs", allocation=ByCost(), begin=begin, end=begin + 5 * every, every_n_steps=every
    )


def taylor_by_cost(job: Job) -> pl.Callback:
    """As Fisher by cost, with the scores of Taylor."""
    every, begin = _early(job)
    return PruneCallback(
        job.target,
        of="macs",
        criterion=Taylor(),
        allocation=ByCost(),
        schedule=cubic,
        begin=begin,
        end=begin + 5 * every,
        every_n_steps=every,
    )


def slimming(job: Job) -> pl.Callback:
    """L1 on the BatchNorm scales for the first epoch, then the smallest go."""
    return BNSlimmingCallback(job.target, of="macs", strength=1e-3, allocation=Global(), begin=1)


def l0(job: Job) -> pl.Callback:
    """Gates for two epochs."""
    return L0PruneCallback(job.target, of="macs", begin=2, end=2)


def lasso(job: Job) -> pl.Callback:
    """Before the first step, each layer refitted."""
    return LassoPruneCallback(job.target, of="macs")


def lasso_by_cost(job: Job) -> pl.Callback:
    """The same, with as much error for each MAC saved everywhere."""
    return LassoPruneCallback(job.target, of="macs", allocation=ByCost())


def _early(job: Job) -> tuple[int, int]:
    """Steps between five events and before the first, in the first third of the budget."""
    every = max(job.steps // 18, 1)
    return every, every


def way(made: Made) -> Callable[[Job], nn.Module]:
    """A method: the dense net, trained for the budget with a callback."""

    def run(job: Job) -> nn.Module:
        return job.train(job.dense(), [made(job)])

    return run
