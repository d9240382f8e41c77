"""Pruning while a network is fine-tuned to a smaller task: accuracy against MACs, by criterion.

    python benchmarks/transfer.py --data ROOT [--seeds 0,1,2] [--out transfer.json] [--picture transfer.png]

A network of three convolutions (16, 32, 64 channels, with BatchNorm) is trained on 10,000 images of FashionMNIST, all
ten classes. Then its head is exchanged for one of three classes (T-shirt, pullover, shirt: the hardest to tell apart),
and it is fine-tuned on the 3,000 images or so of these, while more and more of its MACs go, up to 97 %, every 20 steps,
for 13 times; some 100 steps more follow. Before each cut, and in the end, the accuracy on all 3,000 test images of the
classes is noted beside the MACs that are left.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable
from copy import deepcopy
from math import log10
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from papers_rows import Bench, Setting, Task
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import history_of
from lightning_prune.allocation import ByCost, Global
from lightning_prune.callbacks import FisherPruneCallback, PruneCallback
from lightning_prune.criteria import Magnitude, Random
from lightning_prune.schedules import linear
from lightning_prune.workbench import TorchvisionImages

CLASSES = (0, 2, 6)
EPOCHS, EVERY, CUTS, RATIO = 4, 20, 13, 0.97
WHEN: dict[str, Any] = {
    "of": "macs",
    "schedule": linear,
    "begin": EVERY,
    "end": EVERY * (CUTS + 1),
    "every_n_steps": EVERY,
}


def net() -> nn.Sequential:
    """Three convolutions for images of 28 x 28."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 10))


METHODS: dict[str, Callable[[int], PruneCallback]] = {
    "Fisher": lambda seed: FisherPruneCallback(RATIO, **WHEN),
    "Fisher with cost": lambda seed: FisherPruneCallback(RATIO, allocation=ByCost(), **WHEN),
    "magnitude": lambda seed: PruneCallback(RATIO, criterion=Magnitude(), allocation=Global(), **WHEN),
    "L1": lambda seed: PruneCallback(RATIO, criterion=Magnitude(1, normalize=None), allocation=Global(), **WHEN),
    "random": lambda seed: PruneCallback(RATIO, criterion=Random(seed), allocation=Global(), **WHEN),
}
TASK = Task(
    "transfer", net, "FashionMNIST", dense=(_SETTING := Setting(6, 0.05, 5e-4, 64, limit=10_000)), more=_SETTING
)


class FineTuning(pl.LightningModule):
    """A network on three classes."""

    def __init__(self, net: nn.Module, images: Tensor, labels: Tensor, seed: int) -> None:
        super().__init__()
        self.net, self.images, self.labels, self.seed = net, images, labels, seed
        self.example_input_array = torch.zeros(2, 1, 28, 28)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        """Return batches of 32."""
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(TensorDataset(self.images, self.labels), batch_size=32, shuffle=True, generator=order)

    def configure_optimizers(self) -> Any:
        """Return SGD with a small LR, as for a network that is trained already."""
        return SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


class Curve(pl.Callback):
    """Notes accuracy and the MACs that are left, before each cut and in the end; stands before the pruning callback."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.points: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Note a point where a cut may be due."""
        if trainer.global_step % EVERY == 0 and EVERY <= trainer.global_step <= EVERY * (CUTS + 1):
            self._note(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the last point."""
        self._note(pl_module)

    def _note(self, pl_module: pl.LightningModule) -> None:
        pl_module.eval()
        with torch.no_grad():
            right = (pl_module(self.images).argmax(1) == self.labels).float().mean()
        pl_module.train()
        records = history_of(pl_module)
        self.points.append((1 - records[-1].macs.removed if records else 1.0, float(right)))


def of_classes(data: TorchvisionImages, split: str) -> tuple[Tensor, Tensor]:
    """The images of the three classes, labelled 0 to 2."""
    loader = {"train": data.train_dataloader, "test": data.test_dataloader}[split]()
    pairs = list(loader)
    images, labels = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
    chosen = torch.isin(labels, torch.tensor(CLASSES))
    return images[chosen], torch.searchsorted(torch.tensor(CLASSES), labels[chosen])


def curves(bench: Bench, seed: int) -> dict[str, dict[str, Any]]:
    """The curve of each method, and the widths in the end."""
    dense = bench.dense(TASK, seed)
    data = bench.images(TASK, seed, TASK.dense)
    train, test = of_classes(data, "train"), of_classes(data, "test")
    found = {}
    for name, make in METHODS.items():
        pl.seed_everything(seed, verbose=False)
        small = deepcopy(dense)
        small[-1] = nn.Linear(64 * 9, len(CLASSES))
        module, curve = FineTuning(small, *train, seed), Curve(*test)
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        callbacks = [curve, make(seed)]
        pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", enable_model_summary=False, callbacks=callbacks, **quiet).fit(
            module
        )
        widths = [layer.out_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        found[name] = {"points": curve.points, "widths": widths}
    return found


def drawn(
    found: dict[str, dict[str, list[list[tuple[float, float]]]]], wide: int = 760, high: int = 460
) -> Image.Image:
    """The mean curves, MACs left on a logarithmic axis."""
    colours = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (127, 127, 127))
    image = Image.new("RGB", (wide, high), "white")
    draw = ImageDraw.Draw(image)
    left, right, top, bottom, low = 60, wide - 160, 20, high - 45, 0.6

    def place(macs: float, accuracy: float) -> tuple[float, float]:
        return left + (right - left) * (log10(macs) + 1.6) / 1.6, bottom - (bottom - top) * (accuracy - low) / (1 - low)

    for percent in range(60, 101, 10):
        y = place(1, percent / 100)[1]
        draw.line((left, y, right, y), fill=(225, 225, 225))
        draw.text((left - 38, y - 6), f"{percent} %", fill=(60, 60, 60))
    for share in (1.0, 0.5, 0.2, 0.1, 0.05, 0.03):
        x = place(share, low)[0]
        draw.line((x, top, x, bottom), fill=(225, 225, 225))
        draw.text((x - 12, bottom + 6), f"{share:.0%}", fill=(60, 60, 60))
    draw.text(((left + right) / 2 - 40, bottom + 24), "MACs that are left", fill=(60, 60, 60))
    for row, (name, colour) in enumerate(zip(METHODS, colours, strict=True)):
        runs = [seed[name]["points"] for seed in found.values()]
        points = [tuple(mean(values) for values in zip(*at, strict=True)) for at in zip(*runs, strict=True)]
        draw.line([place(*point) for point in points], fill=colour, width=3)
        draw.text((right + 12, top + 18 * row), name, fill=colour)
    return image


def main() -> None:
    """Measure, print a table, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with FashionMNIST/raw")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path("papers_cache"), help="folder for trained dense weights")
    parser.add_argument("--out", type=Path, default=Path("transfer.json"))
    parser.add_argument("--picture", type=Path, default=Path("transfer.png"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = {seed: curves(Bench(given.data, given.cache), seed) for seed in given.seeds}
    given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    drawn(found).save(given.picture)  # type: ignore[arg-type]
    for name in METHODS:
        cells = []
        for place in (0, 5, 8, 10, 12, 13, 14):
            at = [found[seed][name]["points"][place] for seed in given.seeds]
            spread = stdev([point[1] for point in at]) if len(at) > 1 else 0.0
            cells.append(f"{mean(p[0] for p in at):.0%}: {mean(p[1] for p in at):.1%} +- {spread:.1%}")
        print(f"{name:17}", "   ".join(cells), [found[seed][name]["widths"] for seed in given.seeds])


if __name__ == "__main__":
    main()
