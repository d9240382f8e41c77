"""What masks cost once they are on: a training step beside one of plain Lightning, in turns, and of ModelPruning.

    python benchmarks/mask_cost.py [--model resnet50] [--rounds 5] [--steps 6] [--out mask_cost.json]

SGD with momentum on 8 images of 3 x 64 x 64, one thread, 90 % of the weights masked before the first step and channels
left as they are. In each round all three fits take the same number of steps, in an order that turns; the first step of
a fit warms up and does not count. Printed: medians, the median of the rounds' ratios to plain Lightning with its
quartiles, and the time that is spent inside our hooks as a share of the step. ModelPruning (Lightning's own) computes
each weight from a mask in every forward pass; its lottery tickets are off.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning.pytorch as pl
import torch
import torchvision
from lightning.pytorch.callbacks import ModelPruning
from steps_on_noise import Classifier, Clock
from torch import nn
from torch.optim import SGD

from lightning_prune.callbacks import MagnitudePruneCallback, Retraining
from lightning_prune.callbacks.upkeep import Upkeep

RATIO = 0.9


class Timed(Upkeep):
    """Notes what each step's upkeep takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def before_step(self, *given: Any) -> None:
        """Time it."""
        start = time.perf_counter()
        super().before_step(*given)
        self.seconds.append(time.perf_counter() - start)

    def _after_step(self, *given: Any) -> None:
        start = time.perf_counter()
        super()._after_step(*given)
        self.seconds[-1] += time.perf_counter() - start


class Pruned(ModelPruning):
    """Prunes before the first step, and no more."""

    def on_train_start(self, *_: Any) -> None:
        """Do what it does at the end of an epoch."""
        self.apply_pruning(RATIO)


def ours() -> MagnitudePruneCallback:
    """Return our callback, with a clock in its upkeep."""
    keep = Retraining(dead="keep", dropout="keep")
    callback = MagnitudePruneCallback(RATIO, granularity="weights", begin=0, end=0, retraining=keep)
    callback.upkeep = Timed()
    return callback


def theirs(net: nn.Module) -> ModelPruning:
    """Return Lightning's callback, for the same weights."""
    weights = [(module, "weight") for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return Pruned(
        "l1_unstructured",
        parameters_to_prune=weights,
        amount=RATIO,
        apply_pruning=False,
        make_pruning_permanent=False,
        use_lottery_ticket_hypothesis=False,
    )


def fitted(which: str, name: str, steps: int) -> tuple[float, float]:
    """Train, and return the median seconds of a step, and of our upkeep in it."""
    net = torchvision.models.get_model(name, weights=None)
    module, clock = Classifier(net, partial(SGD, lr=0.01, momentum=0.9), steps), Clock()
    callbacks = {"plain": lambda: [], "masks": lambda: [ours()], "ModelPruning": lambda: [theirs(module)]}[which]()
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[*callbacks, clock], **quiet).fit(module)
    upkeep = callbacks[0].upkeep.seconds[1:] if which == "masks" else [0.0]
    return clock.step, median(upkeep)


def measured(name: str, rounds: int, steps: int) -> dict[str, list[float]]:
    """Take all of them in turns."""
    found: dict[str, list[float]] = {"plain": [], "masks": [], "ModelPruning": [], "inside": []}
    order = ["plain", "masks", "ModelPruning"]
    for _ in range(rounds):
        for which in order:
            step, upkeep = fitted(which, name, steps)
            found[which].append(step)
            found["inside"] += [upkeep / step] if which == "masks" else []
        order = [*order[1:], order[0]]
    return found


def main() -> None:
    """Measure, and print medians, ratios and their spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = measured(given.model, given.rounds, given.steps)
    print(f"plain {median(found['plain']):.4f} s")
    for which in ("masks", "ModelPruning"):
        ratios = [step / plain for step, plain in zip(found[which], found["plain"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        seconds = median(found[which])
        print(f"{which} {seconds:.4f} s, ratio {median(ratios):.4f} ({low:.4f} to {high:.4f})")
    print(f"inside our hooks {median(found['inside']):.3%} of a step")
    if given.out:
        given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
