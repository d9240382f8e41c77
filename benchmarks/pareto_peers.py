"""The peers of the Pareto benchmark, each used as its documentation does, and the small nets that nobody pruned.

No peer aims at MACs: its pruning ratio is found by bisection on copies, in 256ths, before the clock of the method runs.
What Torch-Pruning and torch-kirigami cut, they cut before the first step; where they train sparse first, that is for
the first epoch, after which the optimizer is pointed at the new parameters and keeps its LR schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelPruning
from pareto_tasks import Job, least_ratio
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.criteria import FirstK

GRADIENT_BATCHES = 10
"""Batches that the scores of a trained net are taken from, by all peers that take gradients."""


def torch_pruning(
    job: Job, kind: str, importance: str, *, everywhere: bool = False, reg: float | None = None
) -> nn.Module:
    """Torch-Pruning: with `reg` sparse training first, `everywhere` one threshold for all layers."""
    import torch_pruning as tp

    def pruner(net: nn.Module, ratio: float) -> Any:
        last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
        chosen = getattr(tp.importance, importance)()
        more = {} if reg is None else {"reg": reg}
        return getattr(tp.pruner, kind)(
            net,
            job.example,
            importance=chosen,
            pruning_ratio=ratio,
            global_pruning=everywhere,
            ignored_layers=[last],
            **more,
        )

    def cut(net: nn.Module) -> None:
        if "Taylor" in importance:
            accumulate(net, job)
        ratio = least_ratio(partial(removed, job, net, lambda twin, ratio: pruner(twin, ratio).step()), job.target)
        pruner(net, ratio).step()
        net.zero_grad(set_to_none=True)

    net = job.dense().train()
    if reg is None:
        cut(net)
        return job.train(net)
    return job.train(net, [Sparse(pruner(net, 0.5), cut)])


class Sparse(pl.Callback):
    """Trains sparse with a pruner of Torch-Pruning for the first epoch, then cuts."""

    def __init__(self, pruner: Any, cut: Callable[[nn.Module], None]) -> None:
        self.pruner, self.cut = pruner, cut

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut, and point the optimizer at what is left; momentum is lost."""
        if trainer.current_epoch == 1:
            self.cut(pl_module.net)  # type: ignore[arg-type]
            pl_module.train()  # Torch-Pruning leaves the net in eval mode
            optimizer = trainer.optimizers[0]
            optimizer.state.clear()
            optimizer.param_groups[0]["params"] = list(pl_module.parameters())
        elif hasattr(self.pruner, "update_regularizer"):
            self.pruner.update_regularizer()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the penalty's gradient."""
        if trainer.current_epoch == 0:
            self.pruner.regularize(pl_module.net)


def removed(job: Job, net: nn.Module, cut: Callable[[nn.Module, float], object], ratio: float) -> float:
    """What a ratio removes of the MACs, on a copy."""
    twin = deepcopy(net)
    for old, new in zip(net.parameters(), twin.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    cut(twin, ratio)
    return job.removed(twin)


def accumulate(net: nn.Module, job: Job) -> None:
    """Leave the gradient of the loss over some batches."""
    net.zero_grad()
    for images, labels in job.batches(GRADIENT_BATCHES):
        F.cross_entropy(net(images), labels).backward()


def kirigami(job: Job, *, taylor: bool = False) -> nn.Module:
    """torch-kirigami: each axis gives the same share of what its coupled weights score least, in one question an axis.

    Its documented way asks once for every channel; for these nets it takes 10 to 70 seconds a cut, and scores the same.
    """
    net = job.dense().train()
    if taylor:
        accumulate(net, job)
    ratio = least_ratio(partial(removed, job, net, partial(_cut_axes, job=job, taylor=taylor)), job.target, steps=5)
    _cut_axes(net, ratio, job=job, taylor=taylor)
    net.zero_grad(set_to_none=True)
    return job.train(net)


def _cut_axes(net: nn.Module, ratio: float, *, job: Job, taylor: bool) -> None:
    """Take the same share of every axis, in one plan."""
    from kirigami import channel_axes
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Pruner

    mode = net.training
    graph = DependencyGraph.build(net.eval(), args=(job.example,))
    pruner = Pruner(net, graph=graph)
    tensors = dict(net.named_parameters())
    going, seen = [], set[tuple[str, int]]()
    for axis in channel_axes(graph):
        if (axis.tensor.paths[0], axis.dim) in seen:
            continue
        size = axis.tensor.shape[axis.dim]
        probe = axis.select(range(size // 2))
        impact = graph.propagate(remove=[probe], constraints=pruner.constraints)
        if impact.status != "resolved":
            continue
        coupled = list(_alike(impact, size))
        seen.update(coupled)
        scores = torch.stack([_score(tensors[path], dim, taylor=taylor) for path, dim in coupled]).sum(0)
        least = scores.argsort()[: min(int(ratio * size), size - 1)].tolist()
        if least:
            going.append(axis.select(sorted(least)))
    pruner.apply(pruner.plan_remove(going))
    net.train(mode)


def _alike(impact: Any, size: int) -> Iterator[tuple[str, int]]:
    """The parameters and dimensions that lose the channels of the same numbers."""
    for selection in impact.parameters:
        for dim, length in enumerate(selection.tensor.shape):
            if length == size and list(selection.fully_selected_indices(dim)) == list(range(size // 2)):
                yield selection.tensor.paths[0], dim


def _score(weight: Tensor, dim: int, *, taylor: bool) -> Tensor:
    values = weight.detach() * weight.grad if taylor and weight.grad is not None else weight.detach()
    rows = values.movedim(dim, 0).flatten(1) if values.dim() > 1 else values.unsqueeze(1)
    return rows.sum(1).abs() if taylor else rows.square().sum(1)


def model_pruning(job: Job) -> nn.Module:
    """Lightning's own callback: masks whole channels after the first epoch, by norm; its MACs do not fall."""
    net = job.dense()
    layers = [(m, "weight") for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][:-1]
    ratio = least_ratio(partial(removed, job, net, partial(_cut_first, job=job)), job.target)
    masks = ModelPruning(
        "ln_structured",
        layers,
        use_global_unstructured=False,
        amount=ratio,
        apply_pruning=lambda epoch: epoch == 0,
        use_lottery_ticket_hypothesis=False,
        pruning_dim=0,
        pruning_norm=2,
    )
    return job.train(net, [masks])


def narrow(job: Job) -> nn.Module:
    """A uniformly narrower net with fresh weights, trained for as long as the dense net and the budget together."""
    torch.manual_seed(job.seed)
    net = job.task.make()
    _cut_first(net, least_ratio(partial(removed, job, net, partial(_cut_first, job=job)), job.target), job=job)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    setting = replace(job.task.dense, epochs=job.task.dense.epochs + job.task.more.epochs)
    job.bench.train(net, job.task, job.seed, setting)
    return net


def _cut_first(net: nn.Module, ratio: float, *, job: Job) -> None:
    """Keep the first channels of every layer: widths are what is wanted."""
    prune(net, job.example, pruning_ratio=ratio, criterion=FirstK(), constants="drop")
