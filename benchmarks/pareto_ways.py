"""All methods of the Pareto benchmark by name, ours and the peers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import lightning.pytorch as pl
import pareto_ours as ours
import pareto_peers as peers
from circumstances import installed
from pareto_tasks import Job
from torch import nn

from lightning_prune.allocation import ByCost


@dataclass(frozen=True)
class Way:
    """One method.

    Attributes:
        library: Whose it is: "ours", a peer's name, or "-" for what no library is asked for.
        run: Trains, cuts and returns the net.
        package: What has to be installed.
        bn: Whether it needs BatchNorm.
        default: Whether it is what a newcomer to the library gets.
        cuts: Whether MACs fall.
        by_cost: Whether it knows what channels cost, so that it should meet what is asked for closely.
    """

    library: str
    run: Callable[[Job], nn.Module]
    package: str | None = None
    bn: bool = False
    default: bool = False
    cuts: bool = True
    by_cost: bool = False

    def skipped(self, task: str) -> str | None:
        """Why it does not run on a task, or None where it does."""
        if self.package and installed(self.package) is None:
            return f"{self.package} is not installed"
        return "the net has no BatchNorm" if self.bn and task == "lenet5" else None


def _ours(made: ours.Made, *, bn: bool = False) -> Way:
    return Way("ours", ours.way(made), bn=bn)


def _by_cost(made: Callable[..., pl.Callback]) -> Way:
    return Way("ours", ours.way(partial(made, allocation=ByCost())), by_cost=True)


def _tp(kind: str, importance: str, *, bn: bool = False, default: bool = False, **more: object) -> Way:
    run = partial(peers.torch_pruning, kind=kind, importance=importance, **more)
    return Way("Torch-Pruning", run, "torch-pruning", bn=bn, default=default)


def _kirigami(**more: bool) -> Way:
    return Way("torch-kirigami", partial(peers.kirigami, **more), "torch-kirigami", default=not more)


WAYS: dict[str, Way] = {
    "magnitude": Way("ours", ours.at_once, default=True),
    "magnitude in mid-fit": _ours(ours.in_mid_fit),
    "slimming": _ours(ours.slimming, bn=True),
    "Fisher": _ours(ours.fisher),
    "Fisher by cost": _by_cost(ours.fisher),
    "L0": _ours(ours.l0),
    "LASSO, refit": _ours(ours.lasso),
    "LASSO by cost, refit": _by_cost(ours.lasso),
    "Taylor": _ours(ours.taylor),
    "Taylor by cost": _by_cost(ours.taylor),
    "geometric median": _ours(ours.geometric_median),
    "LAMP": _ours(ours.lamp),
    "random": _ours(ours.random),
    "TP magnitude": _tp("BasePruner", "GroupMagnitudeImportance", default=True),
    "TP BN scale": _tp("BNScalePruner", "BNScaleImportance", bn=True, reg=1e-3),
    "TP Taylor": _tp("BasePruner", "GroupTaylorImportance", everywhere=True),
    "TP group norm": _tp("GroupNormPruner", "GroupMagnitudeImportance", reg=1e-3),
    "kirigami magnitude": _kirigami(),
    "kirigami Taylor": _kirigami(taylor=True),
    "ModelPruning": Way("Lightning", peers.model_pruning, default=True, cuts=False),
    "narrow from scratch": Way("-", peers.narrow),
}
