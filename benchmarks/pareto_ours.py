"""Our methods in the Pareto benchmark: the callbacks of one fit, each asked for the same MACs."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from pareto_tasks import Job
from torch import nn

from lightning_prune import prune
from lightning_prune.allocation import Allocation, Global
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


def taylor(job: Job, allocation: Allocation | None = None) -> pl.Callback:
    """In five events over the first third, by the gradients since the last one; over all layers, if nothing is said."""
    allocation = allocation or Global()
    return PruneCallback(
        job.target, of="macs", criterion=Taylor(), allocation=allocation, schedule=cubic, **_over_the_first_third(job)
    )


def fisher(job: Job, allocation: Allocation | None = None) -> pl.Callback:
    """The same by Fisher information."""
    return FisherPruneCallback(job.target, of="macs", allocation=allocation, **_over_the_first_third(job))


def slimming(job: Job) -> pl.Callback:
    """L1 on the BatchNorm scales for the first epoch, then the smallest go."""
    return BNSlimmingCallback(job.target, of="macs", strength=1e-3, allocation=Global(), begin=1)


def l0(job: Job) -> pl.Callback:
    """Gates for two epochs."""
    return L0PruneCallback(job.target, of="macs", begin=2, end=2)


def lasso(job: Job, allocation: Allocation | None = None) -> pl.Callback:
    """Before the first step, each layer refitted."""
    return LassoPruneCallback(job.target, of="macs", allocation=allocation)


def _over_the_first_third(job: Job) -> dict[str, int]:
    """When five events are to happen, with as many steps before the first as between two."""
    every = max(job.steps // 18, 1)
    return {"begin": every, "end": 6 * every, "every_n_steps": every}


def way(made: Made) -> Callable[[Job], nn.Module]:
    """A method: the dense net, trained for the budget with a callback."""

    def run(job: Job) -> nn.Module:
        return job.train(job.dense(), [made(job)])

    return run
