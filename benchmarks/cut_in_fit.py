"""What a cut costs in the middle of a fit: score, plan, trial, cut, optimizer, verification and log.

    python benchmarks/cut_in_fit.py [--model resnet50] [--repeats 3] [--out cut_in_fit.json]

Seconds of the prune event beside those of 20 training steps on 8 images of 3 x 64 x 64, in the same fit, and the
memory that the event takes beyond what the fit has in use when it begins, beside that of the model's parameters.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchvision
from memory import forget_peak, peak, resident
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.callbacks import MagnitudePruneCallback

STEPS = 20
OPTIMIZERS = {"SGD, momentum": partial(SGD, lr=0.01, momentum=0.9), "AdamW": partial(AdamW, lr=1e-3)}


class Classifier(pl.LightningModule):
    """A torchvision model on noise."""

    def __init__(self, name: str, optimizer: str) -> None:
        super().__init__()
        self.net = torchvision.models.get_model(name, weights=None)
        self.example_input_array = torch.zeros(1, 3, 64, 64)
        self.optimizer = optimizer

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        """Return 20 batches of 8."""
        images = torch.randn(STEPS * 8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.zeros(STEPS * 8, dtype=torch.long)), batch_size=8)

    def configure_optimizers(self) -> Any:
        """Return the optimizer asked for."""
        return OPTIMIZERS[self.optimizer](self.parameters())


class Measured(MagnitudePruneCallback):
    """Times its event and the epoch before, and watches the peak of memory."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what the event takes."""
        now = time.perf_counter()
        if trainer.current_epoch == 1:
            self.training = now - self.began
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            forget_peak()
            before, start = resident(), time.perf_counter()
            super().on_train_epoch_start(trainer, pl_module)
            self.event = time.perf_counter() - start
            self.memory = peak() - before
        self.began = time.perf_counter()


def measured(name: str, optimizer: str) -> dict[str, float]:
    """Train two epochs and cut between them."""
    net = Classifier(name, optimizer)
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters()) / 2**20
    callback = Measured(0.5, begin=1, end=1)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback], **quiet).fit(net)  # type: ignore[arg-type]
    return {
        "event": callback.event,
        "20 steps": callback.training,
        "share": callback.event / callback.training,
        "MiB": callback.memory,
        "of the parameters": callback.memory / parameters,
    }


def main() -> None:
    """Measure, and print mean and spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = {}
    for optimizer in OPTIMIZERS:
        runs = [measured(given.model, optimizer) for _ in range(given.repeats)]
        results[optimizer] = runs
        spread = {key: (mean(run[key] for run in runs), stdev(run[key] for run in runs)) for key in runs[0]}
        print(optimizer, "  ".join(f"{key} {middle:.3g} +- {wide:.2g}" for key, (middle, wide) in spread.items()))
        if given.out:
            given.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
