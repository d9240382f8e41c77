"""Elastic weight consolidation: what earlier tasks have learned holds the weights that matter to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf
from typing import Any, Literal, TypeAlias, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.callbacks.base import unwrapped
from lightning_prune.callbacks.calibration import training_batches, training_data
from lightning_prune.callbacks.ranks import average_over_ranks
from lightning_prune.consolidation import Consolidation, Named
from lightning_prune.cut import Cut, Offsets
from lightning_prune.errors import PruningError
from lightning_prune.information import fisher_information
from lightning_prune.likelihoods import Labels, Loss, check_labels
from lightning_prune.masks.held import masks_of
from lightning_prune.surgery import Undo
from lightning_prune.tensors import named_parameters
from lightning_prune.witnesses import watch

Moment: TypeAlias = Literal["fit_end"]
"""When a task is consolidated by itself."""


class EWCCallback(pl.Callback):
    """Holds the weights that matter to earlier tasks near to where these left them, while a new task is trained.

    While a task trains, the gradient of

        strength / 2 * sum_i F_i (theta_i - theta*_i)^2

    is added to the loss's, once per optimizer step: after gradients are accumulated, averaged over ranks and unscaled,
    and before they are clipped. theta* is where the last task ended, F_i the Fisher information of parameter i,
    E_n[(d log p(y_n | x_n) / d theta_i)^2] per example, summed over the tasks. Kirkpatrick et al. 2017 (arXiv
    1612.00796); one penalty for all tasks after Huszar 2017 (arXiv 1712.03847). `ewc/penalty` is logged.

    Each task ends with `consolidate`, by hand or by itself with consolidate_on="fit_end". What is held travels in
    every checkpoint and through every cut of channels; a constant that a cut absorbs into a bias moves the bias's
    theta* as far. Masked weights are not pulled at. Parameters without a gradient, frozen ones and those that are new
    are free.

    Args:
        strength: lambda, >= 0, in units of the loss; it depends on the problem (the paper's is 400 for Atari).
        decay: What is left of the earlier tasks' F when one is consolidated, in [0, 1]; less than 1 is online EWC
            (gamma of Schwarz et al. 2018, arXiv 1805.06370).
        loss: Takes outputs and targets and returns -log p of each example, of shape (n,); None takes cross-entropy
            for targets that are whole numbers, and half the squared error for real ones.
        labels: "model" draws labels from the network's own distribution; "data" takes those of the data, with which
            F vanishes as a network fits them (see `fisher_information`).
        consolidate_on: "fit_end" consolidates each fit by itself, on its training data; None leaves it to you.
        batches: So many batches of it are taken then; None takes all.
        seed: Of the labels that are drawn.

    Raises:
        ValueError: An argument is out of its range, or does not go with the loss.

    Example:
        >>> ewc = EWCCallback(strength=100.0)
        >>> # Trainer(...).fit(module, task_a); ewc.consolidate(module, task_a)
        >>> # Trainer(..., callbacks=[ewc]).fit(module, task_b)
    """

    def __init__(
        self,
        strength: float,
        *,
        decay: float = 1.0,
        loss: Loss | None = None,
        labels: Labels = "model",
        consolidate_on: Moment | None = None,
        batches: int | None = None,
        seed: int = 0,
    ) -> None:
        check_labels(labels, loss)
        _check_numbers(strength, decay, batches)
        if consolidate_on is not None and consolidate_on not in get_args(Moment):
            raise ValueError(f"`consolidate_on` is 'fit_end' or None; got {consolidate_on!r}.")
        self.strength = strength
        self.decay = decay
        self.loss = loss
        self.labels = labels
        self.consolidate_on = consolidate_on
        self.batches = batches
        self.seed = seed
        self.held = Consolidation()
        self._names: dict[Tensor, str] = {}
        self._values: dict[int, Tensor] = {}

    @property
    def information(self) -> Named:
        """The Fisher information of all tasks so far, by parameter name."""
        return self.held.information

    def consolidate(self, source: pl.Trainer | nn.Module, data: object = None, *, batches: int | None = None) -> None:
        """Let what comes hold to the network as it is now, by what it has learned on some data.

        Args:
            source: The network, or the Trainer that has fitted it.
            data: Batches (inputs, targets): a loader or a list of them, or a LightningDataModule whose training data
                are taken. None takes the training data of the Trainer.
            batches: So many batches are taken at most; None takes all.

        Raises:
            MisconfigurationException: The Trainer has fitted nothing, or there are no data.
            PruningError: The network is not the one that earlier tasks were consolidated with.
        """
        model = _network(source)
        found = _ready(_batches(source, data), model, source if isinstance(source, pl.Trainer) else None)
        self._take(model, self._estimated(model, found, self.batches if batches is None else batches))

    def _estimated(self, model: nn.Module, batches: Iterable[Any], most: int | None) -> dict[str, Tensor]:
        return fisher_information(model, batches, loss=self.loss, labels=self.labels, most=most, seed=self.seed)

    def _take(self, model: nn.Module, information: Named) -> None:
        parameters = named_parameters(model)
        self.held.check_fit(parameters)
        self.held = self.held.then(parameters, information, self.decay)
        watch(model, self)
        count = sum(each.numel() for each in information.values())
        rank_zero_info(f"{type(self).__name__}: task {self.held.tasks} consolidated, {count:,} parameters")

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the parameters that are held.

        Raises:
            MisconfigurationException: They are not those of this network.
        """
        parameters = named_parameters(pl_module)
        try:
            self.held.check_fit(parameters)
        except PruningError as error:
            raise MisconfigurationException(str(error)) from error
        self.held = self.held.beside(parameters)
        self._follow(pl_module)
        watch(pl_module, self)

    def _follow(self, model: nn.Module) -> None:
        anchors = self.held.anchors
        self._names = {each: name for name, each in named_parameters(model).items() if name in anchors}

    def before_cut(self, model: nn.Module) -> None:
        """Nothing is noted before a cut."""

    def after_cut(self, model: nn.Module, cut: Cut, offsets: Offsets) -> Undo:
        """Let what is held follow a cut."""
        before, names = self.held, self._names
        self.held = before.after(cut, offsets)
        self._follow(model)

        def undo() -> None:
            self.held, self._names = before, names

        return undo

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        optimizer = unwrapped(optimizer)
        masks = masks_of(pl_module)
        values = [
            sign * self.held.add_to_gradients(parameters, sign * self.strength, masks)
            for group in optimizer.param_groups
            if (parameters := self._held_in(group)) and (sign := -1 if group.get("maximize") else 1)
        ]
        if values:
            self._values[id(optimizer)] = torch.stack(values).sum()

    def _held_in(self, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the parameters of a param group that have an anchor and a gradient, by name."""
        return {self._names[each]: each for each in group["params"] if each in self._names and each.grad is not None}

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._values and not trainer.barebones:
            pl_module.log("ewc/penalty", torch.stack(list(self._values.values())).sum())
        self._values = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.consolidate_on == "fit_end":
            training_data(trainer, f"{type(self).__name__}(consolidate_on='fit_end')", "`consolidate`")

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.consolidate_on == "fit_end":
            information = self._estimated(pl_module, training_batches(trainer), self.batches)
            average_over_ranks(trainer, information.values())
            self._take(pl_module, information)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._names, self._values = {}, {}

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._names, self._values = {}, {}

    @override
    def state_dict(self) -> dict[str, Any]:
        held = self.held
        return {"anchors": dict(held.anchors), "information": dict(held.information), "tasks": held.tasks}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.held = Consolidation(**state_dict)


def _check_numbers(strength: float, decay: float, batches: int | None) -> None:
    if not 0 <= strength < inf:
        raise ValueError(
            f"`strength` is the lambda of the penalty, 0 or more; got {strength}. Try powers of 10 from 1 on."
        )
    if not 0 <= decay <= 1:
        raise ValueError(
            f"`decay` is what is left of earlier tasks' information, in [0, 1]; got {decay}. 1 keeps all of it."
        )
    if batches is not None and batches < 1:
        raise ValueError(f"`batches` is how many batches F is estimated on, 1 or more; got {batches}. None takes all.")


def _network(source: pl.Trainer | nn.Module) -> nn.Module:
    model = source.strategy.lightning_module if isinstance(source, pl.Trainer) else source
    if model is None:
        raise MisconfigurationException(
            "`consolidate` got a Trainer that has fitted no network yet. Call it after `trainer.fit(...)`, or pass the "
            "network and its data."
        )
    return model


def _batches(source: pl.Trainer | nn.Module, data: object) -> Iterable[Any]:
    if data is None and isinstance(source, pl.Trainer):
        data = source.train_dataloader
    if isinstance(data, pl.LightningDataModule):
        data = data.train_dataloader()
    if not isinstance(data, Iterable):
        raise MisconfigurationException(
            f"`data` is a loader or a list of batches, or a LightningDataModule; got {data!r}. Pass the training data."
        )
    return data


def _ready(batches: Iterable[Any], model: nn.Module, trainer: pl.Trainer | None) -> Iterator[Any]:
    """Yield batches where the network is, as Lightning would hand them to it."""
    device = next(model.parameters()).device
    for batch in batches:
        converted = batch if trainer is None else trainer.precision_plugin.convert_input(batch)
        if isinstance(model, pl.LightningModule):
            yield model._apply_batch_transfer_handler(converted, device)
        else:
            yield move_data_to_device(converted, device)
