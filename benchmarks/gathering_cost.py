"""What it costs to gather the Fisher signal: a training step with a criterion looking on beside one without, in turns.

    python benchmarks/gathering_cost.py [--model resnet50] [--rounds 5] [--steps 6] [--out gathering_cost.json]

Steps on 8 images of 3 x 64 x 64 with SGD, one thread. In each round both fits take the same number of steps, in an
order that alternates; the first step of a fit warms up and does not count. Printed: medians, the median of the rounds'
ratios with its quartiles, and beside it the time that is spent inside of our hooks, as a share of the step.
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
from steps_on_noise import Classifier, Clock
from torch import nn
from torch.optim import SGD

from lightning_prune.callbacks import FisherPruneCallback
from lightning_prune.callbacks.gathering import Gathering
from lightning_prune.criteria import Fisher


class Timed(Fisher):
    """Notes the time inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self._inside = 0.0

    def _timed(self, call: Any, *given: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*given)
        finally:
            self._inside += time.perf_counter() - start

    def saw(self, *given: Any) -> None:
        """Time it."""
        self._timed(super().saw, *given)

    def take(self, *given: Any) -> None:
        """Time it."""
        self._timed(super().take, *given)

    def look(self, *given: Any) -> None:
        """Time it."""
        self._timed(super().look, *given)

    def look_away(self) -> None:
        """Time it."""
        self._timed(super().look_away)


def looking() -> tuple[FisherPruneCallback, Timed]:
    """A callback that gathers in every step, and cuts long after them."""
    callback, timed = FisherPruneCallback(0.5, begin=10**6, end=10**6, every_n_steps=1), Timed()
    callback.gathering = Gathering(timed)
    callback._check_reach = lambda *_: None  # type: ignore[method-assign]
    callback._rehearse = lambda *_: None  # type: ignore[method-assign]
    return callback, timed


def fitted(net: nn.Module, steps: int, *callbacks: pl.Callback) -> float:
    """Train, and return the median seconds of a step."""
    module, clock = Classifier(net, partial(SGD, lr=0.01, momentum=0.9), steps), Clock()
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=[*callbacks, clock], **quiet).fit(module)
    return clock.step


def measured(name: str, rounds: int, steps: int) -> dict[str, list[float]]:
    """Take both in turns."""
    net = torchvision.models.get_model(name, weights=None)
    found: dict[str, list[float]] = {"plain": [], "looking": [], "inside": []}
    for at in range(rounds):
        callback, timed = looking()
        runs: dict[str, tuple[pl.Callback, ...]] = {"plain": (), "looking": (callback,)}
        for which in sorted(runs, reverse=bool(at % 2)):
            found[which].append(fitted(net, steps, *runs[which]))
        found["inside"].append(timed._inside / steps / found["looking"][-1])
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
    ratios = [looking / plain for looking, plain in zip(found["looking"], found["plain"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    print(
        f"plain {median(found['plain']):.4f} s, looking {median(found['looking']):.4f} s, ratio {median(ratios):.4f} "
        f"({low:.4f} to {high:.4f}); inside the hooks {median(found['inside']):.3%} of a step"
    )
    if given.out:
        given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
