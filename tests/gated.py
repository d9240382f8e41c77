"""Small networks with gates, and what a fit with gates must leave behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from fits import Module, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_prune.callbacks import L0PruneCallback
from lightning_prune.callbacks.base import unwrapped
from lightning_prune.layers.gates import gates_of

adam = partial(Adam, lr=0.01)

EAGER = {"gate_lr": 0.4, "every_n_steps": 1}
"""Gates that close within ten steps."""


def mlp(seed: int = 0) -> nn.Sequential:
    """36 inputs, hidden layers of 12 ("net.1") and 8 ("net.3"), and 4 outputs."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


def fitted(
    own: L0PruneCallback,
    *others: Callback,
    steps: int,
    make: Callable[..., Optimizer] = adam,
    net: nn.Module | None = None,
    **settings: Any,
) -> tuple[Module, pl.Trainer]:
    """Train for so many steps, or some more, without validation."""
    module = Module(make, net=net)
    fit = trainer(own, *others, **({"max_epochs": -(-steps // 6), "limit_val_batches": 0} | settings))
    fit.fit(module)
    return module, fit


def nothing_left(module: nn.Module, fit: pl.Trainer | None = None) -> None:
    """See that there is no gate, hook, class or param group of ours, and that every parameter is optimized."""
    assert gates_of(module) is None
    assert not any("gate" in name for name in module.state_dict())
    for layer in module.modules():
        assert not type(layer).__module__.startswith("lightning_prune"), layer
        assert not layer._forward_pre_hooks
        assert not layer._forward_hooks
        assert "reading" not in layer.__dict__
    for optimizer in map(unwrapped, fit.optimizers if fit is not None else ()):
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        (group,) = optimizer.param_groups
        assert list(map(id, group["params"])) == list(map(id, module.parameters()))
        assert set(optimizer.state) <= set(module.parameters())


def alphas(module: nn.Module) -> dict[str, Tensor]:
    """Name of each gate -> a copy of its log alpha."""
    gates = gates_of(module)
    assert gates is not None
    return {name: gate.log_alpha.detach().clone() for name, gate in gates.named().items()}


class Gradients(Callback):
    """Notes at each optimizer step what the gradients are, and the log alphas."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.alphas: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        named = dict(pl_module.named_parameters())
        self.seen.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
        self.weights.append({n: p.detach().clone() for n, p in named.items()})
        self.alphas.append(alphas(pl_module) if gates_of(pl_module) is not None else {})


class Outputs(Callback):
    """Notes at the start of some steps what the network answers in eval mode, and how wide it is."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.seen: list[Tensor] = []
        self.sizes: list[dict[str, tuple[int, ...]]] = []
        self.inputs = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(3))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if trainer.global_step in self.steps and index % trainer.accumulate_grad_batches == 0:
            pl_module.eval()
            with torch.no_grad():
                self.seen.append(pl_module(self.inputs))
            pl_module.train()
            self.sizes.append({name: tuple(p.shape) for name, p in pl_module.named_parameters()})
