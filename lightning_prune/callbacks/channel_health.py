"""Logs which channels of a network do nothing, from the validation that takes place anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from math import nan
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from typing_extensions import override

from lightning_prune.batches import taken_apart
from lightning_prune.callbacks.monitor import drawing_boards
from lightning_prune.chance import random_state_kept
from lightning_prune.charts import curve_picture, tiles_picture
from lightning_prune.metrics import CumulativeAblationCurve, InhibitedChannels
from lightning_prune.metrics.channel_activity import Form
from lightning_prune.metrics.responses import Activation, layers_of


class ChannelHealthMonitor(pl.Callback):
    """Logs at the end of every validation `health/inhibited`, the share of channels that do next to nothing.

    And `health/inhibited/<layer>`, and `health/activity/<layer>`, the mean activity of a layer's channels: see
    `lightning_prune.metrics.InhibitedChannels`. It listens to the validation batches as they run, which costs no pass
    more; where validation loaders run different layers, it takes all of them. They are metrics like any other: every
    logger gets them, and EarlyStopping or ModelCheckpoint can watch them. Where the logger draws (TensorBoard), a
    picture shows the share of each layer over the epochs, and the cumulative ablation curve at the end of the fit, if
    it is asked for.

    Args:
        threshold: Activities below are inhibited, > 0.
        form: "mean" or "max" over examples and positions.
        activation: What follows the norms in the network.
        layers: Patterns of layers' names (`fnmatch` style) to look behind; None takes all norms. Channels lie last
            behind layers of tokens, as Linear, Embedding, LayerNorm and attention, and in dimension 1 behind others.
        every_n_epochs: It listens in every n-th epoch, >= 1.
        ablation: A curve to measure on the validation data when the fit ends, logged as `health/ablation_area`; it
            runs each batch for each order and fraction, in the precision of the fit.
        ablation_batches: So many batches of each validation loader for that at most, >= 1.

    Raises:
        ValueError: An argument is out of its range.
        MisconfigurationException: (at the start of a fit) There is no validation.

    Example:
        >>> monitor = ChannelHealthMonitor(ablation=CumulativeAblationCurve(orders=10))
    """

    def __init__(
        self,
        threshold: float = 1e-2,
        form: Form = "mean",
        *,
        activation: Activation = torch.relu,
        layers: list[str] | None = None,
        every_n_epochs: int = 1,
        ablation: CumulativeAblationCurve | None = None,
        ablation_batches: int = 10,
    ) -> None:
        for name, value in {"every_n_epochs": every_n_epochs, "ablation_batches": ablation_batches}.items():
            if not value >= 1:
                raise ValueError(f"`{name}` is 1 or more; got {value}.")
        self.metric = InhibitedChannels(threshold, form, activation=activation, layers=layers)
        self.every_n_epochs = every_n_epochs
        self.ablation = ablation
        self.ablation_batches = ablation_batches
        self.epochs: list[int] = []
        self.shares: dict[str, list[float]] = {}
        self._listening = ExitStack()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers_of(pl_module, self.metric.layers)  # which can refuse
        if not trainer.enable_validation and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "ChannelHealthMonitor listens to the validation, and there is none. Give the Trainer validation data, "
                "or measure with lightning_prune.metrics.InhibitedChannels."
            )

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.metric = self.metric.to(pl_module.device)
        self.metric.reset()
        if trainer.sanity_checking or (trainer.state.fn == "fit" and (trainer.current_epoch + 1) % self.every_n_epochs):
            return
        self._listening.enter_context(self.metric.listening(pl_module))

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listening.close()
        if not trainer.strategy.reduce_boolean_decision(len(self.metric.count) > 0, all=False):
            return  # on all ranks: the next line waits for all
        with self.metric.sync_context():  # over all ranks
            activities, silent = self.metric.activities(), self.metric.inhibited()
        shares = {name: float(each.float().mean()) for name, each in silent.items()}
        # all ranks have the same figures, but of each that is not synchronised Lightning would warn
        pl_module.log("health/inhibited", torch.cat(list(silent.values())).float().mean(), sync_dist=True)
        for name, share in shares.items():
            pl_module.log(f"health/inhibited/{name}", share, sync_dist=True)
            pl_module.log(f"health/activity/{name}", activities[name].mean(), sync_dist=True)
        if trainer.state.fn == "fit":
            self._remember(trainer, shares)

    def _remember(self, trainer: pl.Trainer, shares: dict[str, float]) -> None:
        """Keep what the picture shows, and draw it; NaN stands where a layer was not run."""
        if self.epochs[-1:] == [trainer.current_epoch]:
            self.epochs.pop()
            self.shares = {name: values[:-1] for name, values in self.shares.items()}
        before = [nan] * len(self.epochs)
        names = dict.fromkeys((*self.shares, *shares))
        self.shares = {name: [*self.shares.get(name, before), shares.get(name, nan)] for name in names}
        self.epochs.append(trainer.current_epoch)
        for board in drawing_boards(trainer):
            picture = tiles_picture(self.shares, self.epochs, "share of inhibited channels", axes=("epoch", "layer"))
            board.add_image("health/inhibited", picture, trainer.global_step, dataformats="HWC")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._listening.close()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.ablation is None or trainer.val_dataloaders is None:
            return
        curve = self.ablation.to(pl_module.device)
        curve.reset()
        with random_state_kept(), trainer.precision_plugin.forward_context():
            for batch in _validation_batches(trainer, self.ablation_batches):
                parts = taken_apart(pl_module, batch)
                curve.update(pl_module, parts.inputs, parts.targets)
        accuracies, area = curve.compute().double().cpu().numpy(), float(curve.area())  # over all ranks
        rank_zero_info(f"ChannelHealthMonitor: the area under the cumulative ablation curve is {area:.4f}.")
        for logger in trainer.loggers:
            logger.log_metrics({"health/ablation_area": area}, trainer.global_step)
        for board in drawing_boards(trainer):
            axes = ("share of channels silenced", "accuracy")
            picture = curve_picture(curve.fractions, accuracies, "cumulative ablation: mean and range", axes=axes)
            board.add_image("health/ablation", picture, trainer.global_step, dataformats="HWC")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "shares": self.shares}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = list(state_dict["epochs"])
        self.shares = {name: list(values) for name, values in state_dict["shares"].items()}


def _validation_batches(trainer: pl.Trainer, most: int) -> Iterator[Any]:
    """Yield the first batches of each validation loader, as the validation itself gets them."""
    loaders = CombinedLoader(trainer.val_dataloaders, "sequential").flattened
    for place, (loader, limit) in enumerate(zip(loaders, trainer.num_val_batches, strict=True)):
        for batch in islice(loader, int(min(most, limit))):
            yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=place)
