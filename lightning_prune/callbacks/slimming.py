"""Network Slimming: a penalty drives BatchNorm scales to zero, then the channels with the smallest go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_prune.allocation import Allocation, Global
from lightning_prune.callbacks.base import PruneCallback, unwrapped
from lightning_prune.criteria import BNScale
from lightning_prune.graph import ignored_tensors
from lightning_prune.penalties import L1, Update
from lightning_prune.schedules import Schedule, one_shot
from lightning_prune.types import Heads, Unit


class BNSlimmingCallback(PruneCallback):
    """Adds strength * sum |gamma| over all BatchNorm scales while training, and prunes by |gamma|.

    Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming" (arXiv 1708.06519). The
    penalty ends with the last prune event, as in the paper's fine-tuning.

    Args:
        pruning_ratio: Fraction to be gone in the end, in [0, 1).
        strength: The paper's lambda: 1e-4 for its VGG, 1e-5 for its ResNets, over 160 epochs. A short training
            needs more: scales travel by at most strength * sum(lr) / (1 - momentum), and start at 1.
        update: "subgradient" adds to the gradient, "proximal" soft-thresholds after the step; "auto" takes the
            first for SGD and the second for all optimizers that rescale gradients.
        allocation: `Global()` if None, as in the paper; `Global(cap=0.5)` spares every layer half of its channels.

    The other arguments are those of `PruneCallback`. Layers under `ignore` get no penalty.

    Example:
        >>> callback = BNSlimmingCallback(0.5, strength=1e-3, begin=10)
    """

    def __init__(
        self,
        pruning_ratio: float = 0.5,
        *,
        strength: float = 1e-4,
        update: Update = "auto",
        of: Unit = "channels",
        allocation: Allocation | None = None,
        schedule: Schedule = one_shot,
        begin: int | None = None,
        end: int | None = None,
        every: int = 1,
        every_n_steps: int | None = None,
        ignore: Sequence[str] = (),
        heads: Heads = "whole",
        min_channels: int = 1,
        round_to: int | None = None,
    ) -> None:
        super().__init__(
            pruning_ratio,
            of=of,
            criterion=BNScale(),
            allocation=allocation or Global(),
            schedule=schedule,
            begin=begin,
            end=end,
            every=every,
            every_n_steps=every_n_steps,
            ignore=ignore,
            heads=heads,
            min_channels=min_channels,
            round_to=round_to,
        )
        self.penalty = L1(strength, update)
        self._scales: list[Parameter] = []
        self._handles: list[RemovableHandle] = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._scales = penalised_scales(pl_module, self.request.ignore)
        super().on_train_start(trainer, pl_module)
        for optimizer in map(unwrapped, trainer.optimizers):
            update = self.penalty.update_for(optimizer)
            rank_zero_info(
                f"{type(self).__name__}: L1 penalty of {self.penalty.strength:g} on {len(self._scales)} BatchNorm "
                f"scales, as {update} update for {type(optimizer).__name__}"
            )
            if update == "proximal":
                self._handles.append(optimizer.register_step_post_hook(self._shrink))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        optimizer = unwrapped(optimizer)
        if not self.is_finished and self.penalty.update_for(optimizer) == "subgradient":
            for group in optimizer.param_groups:
                self.penalty.add_to_gradients(self._scales_in(group))

    def _shrink(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.is_finished:
            for group in optimizer.param_groups:
                self.penalty.shrink(self._scales_in(group), float(group["lr"]))

    def _scales_in(self, group: dict[str, Any]) -> list[Parameter]:
        own = {id(parameter) for parameter in group["params"]}
        return [scale for scale in self._scales if id(scale) in own and scale.requires_grad]

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def penalised_scales(pl_module: pl.LightningModule, ignore: Sequence[str]) -> list[Parameter]:
    """List the scales of all BatchNorm layers (1d, 2d, 3d, Sync) outside `ignore`.

    Raises:
        MisconfigurationException: There is none.
    """
    protected = ignored_tensors(pl_module, ignore)
    layers = [(name, module) for name, module in pl_module.named_modules() if isinstance(module, _BatchNorm)]
    scales = [layer.weight for name, layer in layers if layer.affine and f"{name}.weight" not in protected]
    if not scales:
        raise MisconfigurationException(
            f"BNSlimmingCallback needs BatchNorm scales, and {type(pl_module).__name__} has none "
            f"(ignore={list(ignore)}). Add BatchNorm layers, or use MagnitudePruneCallback."
        )
    return scales
