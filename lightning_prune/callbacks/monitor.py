"""Logs what pruning does to whatever logger the Trainer has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_prune.charts import tiles_picture
from lightning_prune.cost import count_macs, count_params
from lightning_prune.graph import read
from lightning_prune.history import history_of
from lightning_prune.layers.gates import ungated
from lightning_prune.masks.held import layer_sparsity, masks_of, sparsity
from lightning_prune.picture import draw
from lightning_prune.report import widths_picture
from lightning_prune.types import ChannelGroups


class SparsityMonitor(pl.Callback):
    """Logs at the end of every epoch `prune/pruning_ratio`, `prune/params`, `prune/macs` and `prune/channels/<group>`.

    While the model holds masks on weights, `prune/sparsity` is the share of these weights that are pruned, in [0, 1],
    and `prune/sparsity/<weight>` that of each.

    They are metrics like any other: every logger gets them, and EarlyStopping or ModelCheckpoint can watch them.
    Where the logger draws (TensorBoard), there join them a histogram of the BatchNorm scales, a picture of the layers'
    widths before and after, one of the share of weights that masks leave in each layer over the epochs, and, with
    matplotlib, one of the channel groups. MACs are per example.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._dense: dict[str, float] = {}
        self._groups: ChannelGroups | None = None
        self._drawn = 0
        self._densities: dict[int, dict[str, float]] = {}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._forget()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._dense and not history_of(pl_module):
            graph = read(pl_module, batch if pl_module.example_input_array is None else pl_module.example_input_array)
            widths = {f"channels/{group.name}": float(group.size) for group in graph.groups}
            with ungated(pl_module):
                counts = {"params": float(count_params(pl_module)), "macs": float(count_macs(pl_module, graph.inputs))}
            self._dense = {"pruning_ratio": 0.0, **counts, **widths}
            self._groups = graph.groups

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, value in {**self._metrics(pl_module), **_sparsities(pl_module)}.items():
            pl_module.log(f"prune/{name}", value, rank_zero_only=True)
        self._densities[trainer.current_epoch] = {
            name: 1 - share for name, share in layer_sparsity(masks_of(pl_module)).items()
        }
        for experiment in drawing_boards(trainer):
            self._draw(experiment, pl_module, trainer.global_step)
        self._groups = None

    def _metrics(self, pl_module: pl.LightningModule) -> dict[str, float]:
        records = history_of(pl_module)
        if not records:
            return self._dense
        last = records[-1]
        widths = {f"channels/{name}": float(change.after) for name, change in last.channels.items()}
        return {
            "pruning_ratio": last.reached,
            "params": float(last.params.after),
            "macs": float(last.macs.after),
            **widths,
        }

    def _draw(self, experiment: Any, pl_module: pl.LightningModule, step: int) -> None:
        scales = bn_scales(pl_module)
        if scales is not None:
            experiment.add_histogram("prune/bn_scales", scales, step)
        records = history_of(pl_module)
        if len(records) > self._drawn:
            self._drawn = len(records)
            experiment.add_image("prune/widths", widths_picture(records[-1].channels), step, dataformats="HWC")
        if any(self._densities.values()):
            experiment.add_image("prune/mask_density", _density_picture(self._densities), step, dataformats="HWC")
        if self._groups is not None and find_spec("matplotlib"):
            experiment.add_figure("prune/groups", draw(self._groups), step)


def _sparsities(pl_module: pl.LightningModule) -> dict[str, float]:
    masks = masks_of(pl_module)
    layers = {f"sparsity/{name}": share for name, share in layer_sparsity(masks).items()}
    return {"sparsity": sparsity(masks), **layers} if masks else {}


def _density_picture(densities: Mapping[int, Mapping[str, float]]) -> NDArray[np.uint8]:
    """Draw a row for each layer that had a mask, and a tile for each epoch."""
    layers = dict.fromkeys(name for each in densities.values() for name in each)
    rows = {name: [each.get(name, math.nan) for each in densities.values()] for name in layers}
    return tiles_picture(rows, list(densities), "share of weights that masks leave", axes=("epoch", "layer"))


def drawing_boards(trainer: pl.Trainer) -> list[Any]:
    """Return the experiments of those loggers that take histograms and images."""
    experiments: list[Any] = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    if not trainer.is_global_zero:
        return []
    return [board for board in experiments if hasattr(board, "add_histogram") and hasattr(board, "add_image")]


def bn_scales(pl_module: pl.LightningModule) -> Tensor | None:
    """Return the absolute scales of all BatchNorm layers, (n,), on the CPU; None where there are none."""
    layers = [module for module in pl_module.modules() if isinstance(module, _BatchNorm) and module.affine]
    scales = [layer.weight.detach().abs().float().cpu() for layer in layers]
    return torch.cat(scales) if scales else None
