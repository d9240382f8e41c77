"""Kill a training with SIGKILL at random moments, resume it, and compare with the unbroken one, bit for bit.

    python benchmarks/soak.py [--kills 40] [--seed 0] [--out soak.json]

A fit of 12 epochs on the digits with 3 cuts writes a checkpoint every few steps. A third of the kills fall anywhere, a
third while the network is being cut, a third while a checkpoint is being written. Each fit is resumed in a new process
from its last checkpoint, and must end with the weights, the optimizer state and the history of the unbroken one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing as mp
import random
import tempfile
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_prune import history_of
from lightning_prune.callbacks import MagnitudePruneCallback
from lightning_prune.schedules import linear
from lightning_prune.workbench.batches import EpochShuffle, TensorImages, loader

KINDS = ("anywhere", "cut", "checkpoint")
EPOCHS, IMAGES, BATCH = 12, 1024, 64


class Net(pl.LightningModule):
    """A small network with BatchNorm; AdamW, and a learning rate that changes at every step."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 10)),
        )
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.layers(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Set up AdamW with a cosine over all steps."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        # and not trainer.estimated_stepping_batches: it begins the first epoch before a checkpoint can tell which one
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * IMAGES // BATCH)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> Any:
        """Return the digits, in an order that depends on the epoch."""
        digits = load_digits()
        images = torch.tensor(digits.images[:IMAGES], dtype=torch.float32).unsqueeze(1) / 16
        return loader(
            TensorImages(images, torch.tensor(digits.target[:IMAGES])), BATCH, order=EpochShuffle(IMAGES, seed=0)
        )


def fit(folder: Path, pipe: Connection, ckpt: Path | None) -> None:
    """Train, from a checkpoint if there is one; tell each moment, and at last a hash of what came out."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    callback = MagnitudePruneCallback(0.6, schedule=linear, begin=2, end=8, every=2)
    telling(callback, "_cut", pipe, "cut")
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    telling(keep, "_save_checkpoint", pipe, "checkpoint")
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[callback, keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    net = Net(seed=0 if ckpt is None else 1)  # a resumed fit must owe nothing to how it was built
    pipe.send(("begins", 0))
    trainer.fit(net, ckpt_path=ckpt)
    state = trainer.optimizers[0].state_dict()["state"]
    tensors = [*net.state_dict().values(), *(value for one in state.values() for value in one.values())]
    weights = b"".join(tensor.numpy().tobytes() for tensor in tensors)
    cuts = repr([(record.epoch, record.step, record.kept) for record in history_of(net)])
    pipe.send(("ends", (hashlib.sha256(weights + cuts.encode()).hexdigest(), len(history_of(net)))))


def telling(owner: Any, method: str, pipe: Connection, kind: str) -> None:
    """Let a method tell when it begins."""
    own = getattr(owner, method)

    def told(trainer: pl.Trainer, *arguments: Any) -> None:
        pipe.send((kind, trainer.global_step))
        own(trainer, *arguments)
        pipe.send((f"{kind} done", trainer.global_step))

    setattr(owner, method, told)


@dataclass(frozen=True)
class Kill:
    """When a fit is killed.

    Attributes:
        kind: What it is aimed at.
        moment: What the fit tells when the waiting begins.
        number: The how manieth time that it tells so.
        seconds: How long is waited then.
    """

    kind: str
    moment: str
    number: int
    seconds: float


def run(folder: Path, ckpt: Path | None = None, kill: Kill | None = None) -> list[tuple[str, Any]]:
    """Run a fit in a process of its own, kill it when it is time, and return all that it told."""
    context = mp.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=fit, args=(folder, theirs, ckpt))
    process.start()
    theirs.close()
    told: list[tuple[str, Any]] = []
    try:
        while True:
            told.append(ours.recv())
            if kill is not None and [kind for kind, _ in told].count(kill.moment) == kill.number:
                time.sleep(kill.seconds)
                process.kill()
                kill = None
    except EOFError:
        process.join()
    return told


def newest(folder: Path) -> Path | None:
    """Return the checkpoint of the latest step."""
    files = {int(path.stem.rpartition("=")[2]): path for path in folder.glob("*.ckpt")}
    return files[max(files)] if files else None


def trial(kill: Kill, expected: object) -> dict[str, Any]:
    """Kill a fit, resume it, and compare."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told = run(folder, kill=kill)
        ckpt = newest(folder)
        leftover = sorted(path.name for path in folder.iterdir() if path.suffix != ".ckpt")
        ended = run(folder, ckpt)[-1] if told[-1][0] != "ends" else told[-1]
        return {
            **vars(kill),
            "killed": f"{told[-1][0]}, step {told[-1][1]}" if told[-1][0] != "ends" else "too late",
            "resumed": None if ckpt is None else ckpt.stem,
            "leftover": leftover,
            "equal": ended == ("ends", expected),
        }


def drawn(kills: int, seed: int, whole: list[tuple[str, Any]], seconds: float) -> list[Kill]:
    """Draw the moments: a third anywhere, a third in a cut, a third in the writing of a checkpoint."""
    draw = random.Random(seed)
    count = {kind: [moment for moment, _ in whole].count(kind) for kind in ("cut", "checkpoint")}
    found = []
    for number in range(kills):
        kind = KINDS[number % len(KINDS)]
        if kind == "anywhere":
            found.append(Kill(kind, "begins", 1, draw.uniform(0, seconds)))
        else:
            longest = 0.01 if kind == "cut" else 0.02
            found.append(Kill(kind, kind, draw.randint(1, count[kind]), draw.uniform(0, longest)))
    return found


def main() -> None:
    """Run the unbroken fit, then all that are killed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        whole = run(Path(folder))
        seconds = time.monotonic() - start
    expected = whole[-1][1]
    console = Console()
    console.print(f"unbroken: {seconds:.1f} s, {expected[1]} cuts, weights {expected[0][:12]}")
    results = []
    for kill in drawn(given.kills, given.seed, whole, seconds):
        results.append(trial(kill, expected))
        given.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
        console.print(f"{len(results):3} {results[-1]}")
    console.print(table(results))


def table(results: list[dict[str, Any]]) -> Table:
    """Sum up each kind of kill."""
    found = Table("killed", "times", "inside of it", "resumed from no checkpoint", "torn files", "end equal")
    for kind in (*KINDS, "all"):
        own = [one for one in results if kind in (one["kind"], "all")]
        found.add_row(
            kind,
            str(len(own)),
            str(sum(one["killed"].startswith(f"{one['moment']},") for one in own)),
            str(sum(one["resumed"] is None for one in own)),
            str(sum(bool(one["leftover"]) for one in own)),
            str(sum(one["equal"] for one in own)),
        )
    return found


if __name__ == "__main__":
    main()
