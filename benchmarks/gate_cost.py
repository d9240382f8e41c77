"""What gates cost: a training step with a gate on every channel beside one of plain Lightning, in turns.

    python benchmarks/gate_cost.py [--model resnet50] [--rounds 5] [--steps 6] [--out gate_cost.json]

Steps on 8 images, one thread: small images are the hard case, since gates are multiplied into weights
and cost the same however large the images are. In each round both fits take the same number of steps, in an order that
alternates; the first step of a fit warms up and does not count. Printed: medians of CPU time, and the median of the
rounds' ratios with its quartiles.
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

from lightning_prune.callbacks import L0PruneCallback

WAYS: dict[str, dict[str, Any]] = {
    "per parameter": {"strength": 0.1},
    "a target of MACs": {"pruning_ratio": 0.5, "of": "macs"},
    "a sample per example": {"strength": 0.1, "per_example": True},
}


def fitted(net: torch.nn.Module, size: int, steps: int, *callbacks: pl.Callback) -> float:
    """Train, and return the median CPU seconds of a step."""
    clock = Clock(time.process_time)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=[*callbacks, clock], **quiet)  # type: ignore[arg-type]
    trainer.fit(Classifier(net, partial(torch.optim.SGD, lr=1e-3, momentum=0.9), steps, size))
    return clock.step


def measured(name: str, way: str, size: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Take both in turns."""
    found: dict[str, list[float]] = {"plain": [], "gated": []}
    for at in range(rounds):
        callback = L0PruneCallback(**WAYS[way], begin=10**6, every_n_steps=1, gate_lr=1e-3)
        callback._check_reach = lambda *_: None  # type: ignore[method-assign]
        runs = {"plain": (), "gated": (callback,)}
        for which in sorted(runs, reverse=bool(at % 2)):
            net = torchvision.models.get_model(name, weights=None)
            found[which].append(fitted(net, size, steps, *runs[which]))
    return found


def main() -> None:
    """Measure, and print medians, ratios and their spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], default=[64, 128])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = {}
    for size in given.sizes:
        for way in WAYS:
            found = results[f"{way}, {size} pixels"] = measured(given.model, way, size, given.rounds, given.steps)
            ratios = [gated / plain for gated, plain in zip(found["gated"], found["plain"], strict=True)]
            low, _, high = quantiles(ratios, n=4)
            print(
                f"{way}, {size} pixels: plain {median(found['plain']):.4f} s, gated {median(found['gated']):.4f} s, "
                f"ratio {median(ratios):.4f} ({low:.4f} to {high:.4f})",
                flush=True,
            )
            if given.out:
                given.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
