"""Elastic weight consolidation on permuted MNIST, against plain fine-tuning, by the mean accuracy over all tasks.

    python benchmarks/ewc.py --data ROOT [--seeds 0,1,2] [--tasks 3] [--strength 100] [--split test] [--out ewc.json]

Tasks have the same 10,000 images, each with its own order of pixels (Kirkpatrick et al. 2017), and come
one after the other: a network of 784-256-256-10 is trained on each for 5 epochs of SGD. "Together" is trained on all of
them at once, for as long. The strength was chosen from 10, 100 and 1,000 on validation images with another seed
(`--seeds 100 --split val`).
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import lightning.pytorch as pl
import torch
from circumstances import circumstances
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_prune.callbacks import EWCCallback
from lightning_prune.workbench import Classifier, TorchvisionImages
from lightning_prune.workbench.batches import EpochShuffle, TensorImages, TensorLoader, loader

EPOCHS, LR, BATCH = 5, 0.05, 128
IMAGES = 10_000
INFORMATION = 16
"""Batches that F is estimated on: 2,048 images."""

METHODS = ("fine-tuning", "EWC", "together")

Pixels = tuple[Tensor, Tensor]
"""Images (n, 784) and labels (n,)."""


def network() -> nn.Sequential:
    """A network with two hidden layers."""
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def tasks(root: Path, seed: int, count: int, split: str) -> list[tuple[Pixels, Pixels]]:
    """Training and evaluation images of each task; the first has its pixels in their places."""
    data = TorchvisionImages("MNIST", root, seed=seed, limit_train=IMAGES)
    data.setup()
    sets = (data.train_dataloader(), data.test_dataloader() if split == "test" else data.val_dataloader())
    train, rated = (each.dataset.tensors for each in sets)  # type: ignore[attr-defined]
    draw = partial(torch.randperm, 784, generator=torch.Generator().manual_seed(seed))
    orders = [torch.arange(784), *[draw() for _ in range(count - 1)]]
    return [tuple((images.flatten(1)[:, order], labels) for images, labels in (train, rated)) for order in orders]  # type: ignore[misc]


def batches(images: Pixels, seed: int) -> TensorLoader:
    """Training batches, shuffled anew each epoch."""
    return loader(TensorImages(*images), BATCH, order=EpochShuffle(len(images[0]), seed))


def fit(module: Classifier, images: Pixels, seed: int, callbacks: list[pl.Callback]) -> None:
    """Train on some images."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches(images, seed))


def measure(method: str, every: list[tuple[Pixels, Pixels]], seed: int, strength: float) -> dict[str, object]:
    """Train with one method and one seed; tell the accuracy on each task in the end, in %."""
    pl.seed_everything(seed, verbose=False)
    net, start = network(), time.perf_counter()
    module = Classifier(net, 10, optimizer=partial(torch.optim.SGD, lr=LR, momentum=0.9))
    ewc = EWCCallback(strength, batches=INFORMATION, seed=seed)
    trained = [train for train, _ in every]
    if method == "together":
        trained = [tuple(torch.cat(parts) for parts in zip(*trained, strict=True))]  # type: ignore[list-item]
    for images in trained:
        fit(module, images, seed, [ewc] if method == "EWC" else [])
        if method == "EWC":
            ewc.consolidate(module, batches(images, seed))
    found = [100 * float((net(images).argmax(1) == labels).float().mean()) for _, (images, labels) in every]
    seconds = round(time.perf_counter() - start, 1)
    return {"method": method, "seed": seed, "tasks": found, "mean": mean(found), "seconds": seconds}


def table(rows: list[dict[str, object]]) -> Table:
    """Mean and standard deviation over the seeds."""
    count = len(rows[0]["tasks"])  # type: ignore[arg-type]
    shown = Table(
        "method", *[f"task {at + 1}" for at in range(count)], "mean of tasks", "s", title="Accuracy in the end, %"
    )
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        columns = [*zip(*[row["tasks"] for row in own], strict=True), [row["mean"] for row in own]]  # type: ignore[misc]
        shown.add_row(method, *map(_spread, columns), f"{mean(row['seconds'] for row in own):.0f}")  # type: ignore[misc]
    return shown


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f} +- {stdev(values) if len(values) > 1 else 0:.2f}"


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST/raw")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--strength", type=float, default=100.0)
    parser.add_argument(
        "--split", choices=("test", "val"), default="test", help="the images that accuracy is measured on"
    )
    parser.add_argument("--out", type=Path, help="file of results, JSON")
    return parser.parse_args()


def main() -> None:
    """Measure all methods with all seeds, and print the table."""
    given = arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = []
    for seed in given.seeds:
        every = tasks(given.data, seed, given.tasks, given.split)
        rows += [measure(method, every, seed, given.strength) for method in METHODS]
        print(*[f"{row['method']} {row['mean']:.2f} %" for row in rows[-len(METHODS) :]], sep=", ", flush=True)
    Console().print(table(rows))
    if given.out:
        setting = {"epochs": EPOCHS, "lr": LR, "batch": BATCH, "images": IMAGES, "batches": INFORMATION}
        whole = {**circumstances(), **setting, "strength": given.strength, "split": given.split, "rows": rows}
        given.out.write_text(json.dumps(whole, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
