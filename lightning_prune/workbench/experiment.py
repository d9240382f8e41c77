"""One experiment: train a network with a prune callback, and its dense twin beside it, and compare the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_prune.callbacks import LassoPruneCallback, PruneCallback, SparsityMonitor
from lightning_prune.cost import batch_of, count_macs, count_params, measure_latency
from lightning_prune.history import history_of
from lightning_prune.inputs import Inputs
from lightning_prune.masks.held import masks_of, sparsity
from lightning_prune.types import PruneRecord
from lightning_prune.workbench.data import MemoryImages
from lightning_prune.workbench.final_figures import log_final_figures
from lightning_prune.workbench.probe import CutProbe
from lightning_prune.workbench.scales import ScalesOverEpochs


@dataclass(frozen=True)
class Experiment:
    """What an experiment is made of.

    Attributes:
        data: The images.
        classifier: Makes the LightningModule, with the same weights each time.
        method: The prune callback.
        trainer: Makes the Trainer for some callbacks; the first argument names the run, "dense" or "pruned".
        dense_twin: Whether the network is also trained unpruned.
        latency_batches: The batch sizes whose latency is measured.
        hparams: What loggers are told of this experiment beside its figures: name -> number, text or None.
    """

    data: MemoryImages
    classifier: Callable[[], pl.LightningModule]
    method: PruneCallback
    trainer: Callable[[str, list[pl.Callback]], pl.Trainer]
    dense_twin: bool = True
    latency_batches: Sequence[int] = (1, 64)
    hparams: Mapping[str, Any] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Train, test and measure.

        Returns:
            Plain data: accuracies in [0, 1], counts, latencies in milliseconds, seconds; each cut, and the widths
            before and after; with BatchNorm histograms of its scales over the epochs; and with masks on weights the
            sparsity of these weights, in [0, 1].
        """
        dense = self.classifier()
        summary: dict[str, Any] = {"accuracy": {}, "seconds": {}}
        if self.dense_twin:
            summary["accuracy"]["dense"] = self._train("dense", dense, self.trainer("dense", []), summary)
        pruned, probe, scales = self.classifier(), CutProbe(), ScalesOverEpochs()
        trainer = self.trainer("pruned", [self.method, probe, scales, SparsityMonitor()])
        summary["accuracy"]["end"] = self._train("pruned", pruned, trainer, summary)
        summary["accuracy"] |= {"val_before_cut": probe.before, "val_after_cut": probe.after}
        summary |= _told(history_of(pruned))
        masks = masks_of(pruned)
        if masks:
            summary["sparsity"] = round(sparsity(masks), 6)
        histograms = scales.histograms()
        if histograms is not None:
            summary["scales"] = histograms
        summary |= self._costs(dense, pruned)
        log_final_figures(trainer.loggers, self.hparams, summary)
        return summary

    def _train(self, name: str, module: pl.LightningModule, trainer: pl.Trainer, summary: dict[str, Any]) -> float:
        """Fit and test; note the seconds and return the test accuracy."""
        start = perf_counter()
        if trainer.max_epochs == 0 and isinstance(self.method, LassoPruneCallback):  # a fit of no epochs calls no hooks
            trainer.validate(module, self.data, verbose=False)
            trainer.save_checkpoint(
                Path(trainer.default_root_dir) / "checkpoints" / "untrained.ckpt", weights_only=True
            )
        else:
            trainer.fit(module, self.data)
        summary["seconds"][name] = round(perf_counter() - start, 1)
        return float(trainer.test(module, self.data, verbose=False)[0]["test/acc"])

    def _costs(self, dense: nn.Module, pruned: nn.Module) -> dict[str, Any]:
        """Compare the two networks; latencies are taken in turns, since machines drift."""
        example = Inputs((torch.zeros(2, self.data.in_channels, self.data.image_size, self.data.image_size),))
        networks = {"dense": deepcopy(dense).cpu(), "pruned": deepcopy(pruned).cpu()}
        return {
            "params": {name: count_params(network) for name, network in networks.items()},
            "macs": {name: count_macs(network, example) for name, network in networks.items()},
            "latency_ms": {
                f"batch_{size}": _latencies(networks, batch_of(example, size)) for size in self.latency_batches
            },
        }


def _told(records: Sequence[PruneRecord]) -> dict[str, Any]:
    """Tell all cuts, and each group's width before the first and after the last."""
    events = [
        {
            "epoch": record.epoch,
            "step": record.step,
            "of": record.of,
            "asked": record.asked,
            "reached": record.reached,
            "params": {"before": record.params.before, "after": record.params.after},
            "macs": {"before": record.macs.before, "after": record.macs.after},
            "held_back": dict(record.held_back),
        }
        for record in records
    ]
    last = records[-1].channels if records else {}
    widths = {name: {"dense": change.dense, "pruned": change.after} for name, change in last.items()}
    return {"events": events, "widths": widths}


def _latencies(networks: dict[str, nn.Module], inputs: Inputs, rounds: int = 3) -> dict[str, float]:
    """Return the best of several medians for each network, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(rounds):
        for name, network in networks.items():
            times[name].append(measure_latency(network, inputs, seconds=0.3))
    return {name: round(min(values), 4) for name, values in times.items()}
