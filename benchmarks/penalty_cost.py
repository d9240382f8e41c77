"""What the slimming penalty costs: a training step with the callback beside one of plain Lightning, in turns.

    python benchmarks/penalty_cost.py [--model resnet50] [--rounds 5] [--steps 6] [--out penalty_cost.json]

Steps on 8 images of 3 x 64 x 64, one thread. In each round both fits take the same number of steps, in an order that
alternates; the first step of a fit warms up and does not count. Printed: medians, the median of the rounds' ratios
with its quartiles, and beside it the time that is spent inside the callback's hooks, as a share of the step.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning.pytorch as pl
import torch
import torchvision
from steps_on_noise import Classifier, Clock
from torch.optim import SGD, AdamW

from lightning_prune.callbacks import BNSlimmingCallback

SETTINGS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "SGD, subgradient": (partial(SGD, lr=0.01, momentum=0.9), {}),
    "SGD, smooth-L1": (partial(SGD, lr=0.01, momentum=0.9), {"delta": 1e-3}),
    "AdamW, proximal": (partial(AdamW, lr=1e-3), {}),
}


class Slimming(BNSlimmingCallback):
    """Never plans or cuts: only the penalty is measured, and the time inside of its hooks."""

    inside = 0.0

    def _check_ahead(self, *_: Any) -> None:
        pass

    def on_train_batch_start(self, *given: Any) -> None:
        """Time it."""
        start = time.perf_counter()
        super().on_train_batch_start(*given)
        self.inside += time.perf_counter() - start

    def on_before_optimizer_step(self, *given: Any) -> None:
        """Time it."""
        start = time.perf_counter()
        super().on_before_optimizer_step(*given)
        self.inside += time.perf_counter() - start

    def _shrink(self, *given: Any) -> None:
        start = time.perf_counter()
        super()._shrink(*given)
        self.inside += time.perf_counter() - start


def fitted(net: torch.nn.Module, optimizer: Callable[..., Any], steps: int, *callbacks: pl.Callback) -> float:
    """Train, and return the median seconds of a step."""
    clock = Clock()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=[clock, *callbacks], **quiet)  # type: ignore[arg-type]
    trainer.fit(Classifier(net, optimizer, steps))
    return clock.step


def measured(name: str, setting: str, rounds: int, steps: int) -> dict[str, list[float]]:
    """Take both in turns."""
    optimizer, arguments = SETTINGS[setting]
    net = torchvision.models.get_model(name, weights=None)
    found: dict[str, list[float]] = {"plain": [], "slimming": [], "inside": []}
    for at in range(rounds):
        callback = Slimming(0.5, strength=1e-5, begin=10**6, end=10**6, every_n_steps=1, **arguments)
        callback._check_reach = lambda *_: None  # type: ignore[method-assign]
        runs = {"plain": (), "slimming": (callback,)}
        for which in sorted(runs, reverse=bool(at % 2)):
            found[which].append(fitted(net, optimizer, steps, *runs[which]))
        found["inside"].append(callback.inside / steps / found["slimming"][-1])
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
    results = {}
    for setting in SETTINGS:
        found = results[setting] = measured(given.model, setting, given.rounds, given.steps)
        ratios = [slim / plain for slim, plain in zip(found["slimming"], found["plain"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        print(
            f"{setting}: plain {median(found['plain']):.4f} s, slimming {median(found['slimming']):.4f} s, ratio "
            f"{median(ratios):.4f} ({low:.4f} to {high:.4f}); inside the hooks {median(found['inside']):.3%} of a step"
        )
        if given.out:
            given.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
