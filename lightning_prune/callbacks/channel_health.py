"""Logs which channels of a network do nothing, from the validation that takes place anyway."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_prune.batches import taken_apart
from lightning_prune.callbacks.monitor import drawing_boards
from lightning_prune.charts import curve_picture, tiles_picture
from lightning_prune.metrics import CumulativeAblationCurve, InhibitedChannels
from lightning_prune.metrics.channel_activity import Form
from lightning_prune.metrics.responses import Activation, layers_of, seen


class ChannelHealthMonitor(pl.Callback):
    """Logs at the end of every validation `health/inhibited`, the share of channels that do next to nothing.

    And `health/inhibited/<layer>`, and `health/activity/<layer>`, the mean activity of a layer's channels: see
    `lightning_prune.metrics.InhibitedChannels`. It listens to the validation batches as they run, which costs no pass
    more. They are metrics like any other: every logger gets them, and EarlyStopping or ModelCheckpoint can watch them.
    Where the logger draws (TensorBoard), a picture shows the share of each layer over the epochs, and the cumulative
    ablation curve at the end of the fit, if it is asked for.

    Args:
        threshold: Activities below are inhibited, > 0.
        form: "mean" or "max" over examples and positions.
        activation: What follows the norms in the network.
        layers: Patterns of layers' names (`fnmatch` style) to look behind; None takes all norms.
        every_n_epochs: It listens in every n-th epoch, >= 1.
        ablation: A curve to measure on the validation data when the fit ends, logged as `health/ablation_area`; it
            runs each batch for each order and fraction.
        ablation_batches: So many batches for that at most, >= 1.

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
            if value < 1:
                raise ValueError(f"`{name}` is 1 or more; got {value}.")
        self.metric = InhibitedChannels(threshold, form, activation=activation, layers=layers)
        self.every_n_epochs = every_n_epochs
        self.ablation = ablation
        self.ablation_batches = ablation_batches
        self.epochs: list[int] = []
        self.shares: dict[str, list[float]] = {}
        self._listening = ExitStack()
        self._heard: dict[str, list[Tensor]] = {}

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
        self._heard = {}
        layers = layers_of(pl_module, self.metric.layers)
        self._listening.enter_context(seen(layers, self._hear))

    def _hear(self, name: str, output: Tensor) -> None:
        self._heard.setdefault(name, []).append(output.clone())  # what comes next may work in place

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._heard:
            self.metric.take_in(self._heard)
            self._heard = {}

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listening.close()
        if not trainer.strategy.reduce_boolean_decision(bool(self.metric.count.any())):  # on all ranks, or none
            return
        with self.metric.sync_context():  # over all ranks
            activities, silent = self.metric.activities(), self.metric.inhibited()
        shares = {name: float(each.float().mean()) for name, each in silent.items()}
        pl_module.log("health/inhibited", torch.cat(list(silent.values())).float().mean(), rank_zero_only=True)
        for name, share in shares.items():
            pl_module.log(f"health/inhibited/{name}", share, rank_zero_only=True)
            pl_module.log(f"health/activity/{name}", activities[name].mean(), rank_zero_only=True)
        if trainer.state.fn == "fit":
            self._remember(trainer, shares)

    def _remember(self, trainer: pl.Trainer, shares: dict[str, float]) -> None:
        """Keep what the picture shows, and draw it."""
        if self.epochs[-1:] == [trainer.current_epoch]:
            self.epochs.pop()
            self.shares = {name: values[:-1] for name, values in self.shares.items()}
        self.epochs.append(trainer.current_epoch)
        self.shares = {name: [*self.shares.get(name, []), share] for name, share in shares.items()}
        for board in drawing_boards(trainer):
            picture = tiles_picture(self.shares, self.epochs, "inhibited channels of each layer, over the epochs")
            board.add_image("health/inhibited", picture, trainer.global_step, dataformats="HWC")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._listening.close()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.ablation is None or not trainer.val_dataloaders:
            return
        curve = self.ablation.to(pl_module.device)
        curve.reset()
        loaders = trainer.val_dataloaders
        loader = loaders[0] if isinstance(loaders, list) else loaders
        for batch in islice(loader, self.ablation_batches):
            parts = taken_apart(pl_module, trainer.strategy.batch_to_device(batch))
            curve.update(pl_module, parts.inputs, parts.targets)
        area = float(curve.area())
        rank_zero_info(f"ChannelHealthMonitor: the area under the cumulative ablation curve is {area:.4f}.")
        for logger in trainer.loggers:
            logger.log_metrics({"health/ablation_area": area}, trainer.global_step)
        for board in drawing_boards(trainer):
            values = curve.compute().double().cpu().numpy()
            picture = curve_picture(curve.fractions, values, "accuracy against the share of channels silenced")
            board.add_image("health/ablation", picture, trainer.global_step, dataformats="HWC")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "shares": self.shares}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = list(state_dict["epochs"])
        self.shares = {name: list(values) for name, values in state_dict["shares"].items()}
