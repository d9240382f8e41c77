"""Gates inside of a fit: put on in mid-training, in the optimizer, sampled for each batch, taken off at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks import param_groups
from lightning_prune.callbacks.averages import averaged_copies
from lightning_prune.callbacks.base import unwrapped
from lightning_prune.callbacks.masking import put_on
from lightning_prune.callbacks.ranks import average_over_ranks, without_reducer
from lightning_prune.callbacks.steady_steps import SteadySteps
from lightning_prune.chance import random_state_kept
from lightning_prune.cut import Cut
from lightning_prune.gates import Choice, GateSettings, choose, decay_gradients, fold
from lightning_prune.graph import Graph, ignored_tensors
from lightning_prune.layers import Bernoulli
from lightning_prune.layers.gated import weight_name
from lightning_prune.layers.gates import KEY, Gates, attach, detach, gates_of
from lightning_prune.masks.held import Masks, masks_of
from lightning_prune.surgery import together
from lightning_prune.tensors import named_modules

GROUP = "gates"
"""What loggers call the gates' param group."""


def fresh_gates(pl_module: pl.LightningModule, graph: Graph, settings: GateSettings, ignore: Sequence[str]) -> Choice:
    """Make the gates that settings ask for, the same each time; nobody else's random numbers change.

    Raises:
        ValueError: There is nothing to gate, or no strength for a gate.
    """
    with random_state_kept():
        torch.manual_seed(settings.seed)
        choice = choose(
            pl_module,
            graph,
            settings.granularity,
            settings.maker,
            ignored=ignored_tensors(pl_module, ignore),
            per_example=settings.per_example,
        )
    settings.strengths_of(choice.gates.named())
    return choice


class GateTraining:
    """Trains the gates of a network in the optimizer of its user.

    All ranks draw the same sample, as one process with the whole batch would: it depends on the seed, the epoch and the
    batch alone, so that a resumed fit draws what an unbroken one does, and nobody else's random numbers change.

    Args:
        weight_decay: Of the weights behind gates, where these are open.
        seed: Of the samples.
    """

    def __init__(self, weight_decay: float, seed: int) -> None:
        self.gate_lr = 0.0
        self.weight_decay = weight_decay
        self.seed = seed
        self.steady = SteadySteps()
        self._gates: Gates | None = None
        self._layers: dict[str, nn.Module] = {}
        self._optimizer: Optimizer | None = None
        self._handles: list[RemovableHandle] = []
        self._loss: Tensor | None = None

    @property
    def gates(self) -> Gates | None:
        """The gates that are trained at present."""
        return self._gates

    def put_on(self, trainer: pl.Trainer, pl_module: pl.LightningModule, gates: Gates, gate_lr: float) -> None:
        """Put gates on the network and its averaged copies, and give them to the optimizer.

        Args:
            trainer: The Trainer.
            pl_module: The network.
            gates: The gates.
            gate_lr: Their learning rate; it follows the schedule of the first param group in proportion.
        """
        self.gate_lr = gate_lr
        with without_reducer(trainer), together() as steps:
            attach(pl_module, gates.to(pl_module.device))
            steps.append(partial(_detach, pl_module))
            for copy in averaged_copies(trainer):
                attach(copy, deepcopy(gates))
                steps.append(partial(_detach, copy))
            self.take_up(trainer, pl_module)

    def try_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule, gates: Gates) -> None:
        """See that an optimizer can train gates; nothing is left of it.

        Raises:
            MisconfigurationException: None trains the layers that would read through them, or it allows no param group
                of its own or no step on a vector.
        """
        optimizer = _optimizer_of(trainer, _layers_of(pl_module, gates))
        parameters = [nn.Parameter(torch.ones(2, device=pl_module.device))]
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        undo, steady = param_groups.join(optimizer, parameters, 1.0, schedulers=schedulers, name=GROUP), SteadySteps()
        try:
            steady.attach(optimizer, parameters)
        finally:
            steady.detach()
            undo()

    def take_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train the gates that the network has: let the optimizer have them, in a param group of their own.

        Raises:
            MisconfigurationException: No optimizer trains the layers that read through them.
        """
        self._gates = gates_of(pl_module)
        if self._gates is None:
            return
        self._layers = _layers_of(pl_module, self._gates)
        self._optimizer = _optimizer_of(trainer, self._layers)
        parameters = list(self._gates.parameters())
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for other in map(unwrapped, trainer.optimizers):
            _take_out(other, parameters, but_of=self._optimizer)
        param_groups.join(self._optimizer, parameters, self.gate_lr, schedulers=schedulers, name=GROUP)
        self.steady.attach(self._optimizer, parameters)
        self._handles = [self._optimizer.register_step_post_hook(self._after_step)]

    def is_moved_by(self, optimizer: Optimizer) -> bool:
        """Tell whether it is an optimizer of the gates."""
        return self._gates is not None and optimizer is self._optimizer

    def draw(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        """Draw the sample for a batch."""
        if self._gates is not None:
            mixed = np.random.SeedSequence([self.seed, trainer.current_epoch, batch_idx]).generate_state(2)
            generator = torch.Generator().manual_seed(int(mixed[0]) << 32 | int(mixed[1]))
            self._gates.draw(generator, extract_batch_size(batch) if self._gates.per_example else None)

    def see_loss(self, loss: Tensor) -> None:
        """Keep the loss, for gates that no gradient goes through."""
        self._loss = loss.detach()

    def after_backward(self) -> None:
        """Let gates that no gradient goes through estimate theirs from the loss."""
        for gate in self._binary():
            if self._loss is not None and gate.sample.grad is not None:
                gate.take(self._loss)
        self._loss = None

    def before_step(self, trainer: pl.Trainer) -> None:
        """Complete the gradients of gates and of the weights behind them, but for the penalty."""
        assert self._gates is not None
        estimated = [gate.log_alpha.grad for gate in self._binary() if gate.log_alpha.grad is not None]
        average_over_ranks(trainer, estimated)
        if self.weight_decay:
            decay_gradients(self._layers, self._gates, self.weight_decay)

    def _binary(self) -> list[Bernoulli]:
        if self._gates is None:
            return []
        return [gate for gate in self._gates.named().values() if isinstance(gate, Bernoulli)]

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for gate in () if self._gates is None else self._gates.named().values():
            gate.clamp_()

    def follow(self, cut: Cut) -> None:
        """Let what is known of the gates' gradients follow a cut that has been done."""
        for name, gate in () if self._gates is None else self._gates.named_parameters():
            self.steady.follow(gate, cut.kept.get(f"{KEY}.{name}", {}))

    def take_off(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        """Fold the gates into the weights, of the averaged copies too, and take them out of the optimizer.

        Returns:
            Names of weights that hold a mask from now on: those that had gates of their own, or on their input.
        """
        assert self._gates is not None
        assert self._optimizer is not None
        parameters = list(self._gates.parameters())
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        with without_reducer(trainer), together() as steps:
            steps.append(param_groups.leave(self._optimizer, parameters, schedulers))
            for network in averaged_copies(trainer):
                steps.append(fold(network).undo)
            folded = fold(pl_module)
        self.leave()
        if folded.masks:
            put_on({**masks_of(pl_module), **_joined(folded.masks, masks_of(pl_module))}, trainer, pl_module)
        return list(folded.masks)

    def leave(self) -> None:
        """Let go of network and optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.steady.detach()
        self._gates, self._optimizer, self._loss, self._layers = None, None, None, {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs beside the gates and the optimizer."""
        return {"steady": self.steady.state_dict(), "gate_lr": self.gate_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up an interrupted fit."""
        self.gate_lr = state["gate_lr"]
        self.steady.load_state_dict(state["steady"])


def _layers_of(pl_module: pl.LightningModule, gates: Gates) -> dict[str, nn.Module]:
    """Return the layers that read through gates, by name."""
    return {name: named_modules(pl_module)[name] for name in gates.read_by()}


def _optimizer_of(trainer: pl.Trainer, layers: Mapping[str, nn.Module]) -> Optimizer:
    """Return the optimizer that moves most of some layers."""
    weights = {id(getattr(layer, weight_name(layer))) for layer in layers.values()}
    moved = {
        optimizer: sum(id(each) in weights for group in optimizer.param_groups for each in group["params"])
        for optimizer in map(unwrapped, trainer.optimizers)
    }
    best = max(moved, key=lambda optimizer: moved[optimizer], default=None)
    if best is None or not moved[best]:
        raise MisconfigurationException(
            f"No optimizer moves a layer that reads through gates, such as {next(iter(layers), None)!r}. Let "
            "`configure_optimizers` return one that does, or gate other layers (`granularity`)."
        )
    return best


def _detach(network: nn.Module) -> None:
    detach(network)


def _joined(masks: Masks, known: Masks) -> Masks:
    """Let masks also prune what those prune that are known already."""
    return {name: mask & known[name].to(mask.device) if name in known else mask for name, mask in masks.items()}


def _take_out(optimizer: Optimizer, parameters: Iterable[nn.Parameter], but_of: Optimizer) -> None:
    """Take parameters out of the optimizers that are not to have them."""
    if optimizer is not but_of:
        gone = set(map(id, parameters))
        for group in optimizer.param_groups:
            group["params"][:] = [each for each in group["params"] if id(each) not in gone]
