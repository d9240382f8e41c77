"""The BatchNorm scales of a network over the epochs of a fit, as histograms."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.monitor import bn_scales

_BINS = 40


class ScalesOverEpochs(pl.Callback):
    """Keeps the absolute scales of all BatchNorm layers at the end of each epoch."""

    def __init__(self) -> None:
        self._scales: dict[int, Tensor] = {}

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = bn_scales(pl_module)
        if found is not None:
            self._scales[trainer.current_epoch] = found

    def histograms(self) -> dict[str, Any] | None:
        """Return for each epoch how many scales lie in each of some equal bins from 0 to the largest of all.

        Returns:
            "epochs", "edges" (one more than bins) and "counts" (epochs x bins); None without BatchNorm or epochs.
        """
        if not self._scales:
            return None
        each = {epoch: scales.numpy() for epoch, scales in self._scales.items()}
        edges = np.linspace(0, max(float(scales.max(initial=0)) for scales in each.values()) or 1.0, _BINS + 1)
        counts = [np.histogram(scales, edges)[0].tolist() for scales in each.values()]
        return {"epochs": list(each), "edges": [round(float(edge), 6) for edge in edges], "counts": counts}
