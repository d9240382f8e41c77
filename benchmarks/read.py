"""Seconds of one core for reading channel groups and for a whole 50 % cut, beside Torch-Pruning where it is installed.

    python benchmarks/read.py [model ...] [--repeats 3] [--out read.json]

Without names, every classifier of torchvision with up to 100 million parameters. Both libraries score by magnitude, cut
half of every layer but the last, and start from a copy of the same model, in one run. The peer loses what removed
channels emit, so the ratio is also given for `constants="drop"`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch import Tensor, nn

from lightning_prune import find_groups, prune

LARGEST = 100e6
ENDLESS = ("swin", "maxvit")
"""Torch-Pruning does not come to an end on these."""


def seconds(work: Callable[[nn.Module], object], model: nn.Module, repeats: int) -> float:
    """Return the least CPU time of some runs, each on a copy of the model."""
    times = []
    for _ in range(repeats):
        twin = copy.deepcopy(model)
        start = time.process_time()
        work(twin)
        times.append(time.process_time() - start)
    return min(times)


def torch_pruning(model: nn.Module, images: Tensor) -> None:
    """Cut half of the channels with Torch-Pruning."""
    import torch_pruning as tp

    last = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    importance = tp.importance.MagnitudeImportance(p=2)
    tp.pruner.BasePruner(model, images, importance=importance, pruning_ratio=0.5, ignored_layers=[last]).step()


def measured(name: str, model: nn.Module, repeats: int) -> dict[str, float | str]:
    """Measure one model."""
    pixels = 299 if name == "inception_v3" else 224
    images = torch.zeros(1, 3, pixels, pixels)
    figures: dict[str, float | str] = {
        "find_groups": seconds(lambda twin: find_groups(twin, images), model, repeats),
        "prune": seconds(lambda twin: prune(twin, images, pruning_ratio=0.5), model, repeats),
        "prune, drop": seconds(lambda twin: prune(twin, images, pruning_ratio=0.5, constants="drop"), model, repeats),
    }
    if importlib.util.find_spec("torch_pruning"):
        try:
            figures["torch_pruning"] = seconds(lambda twin: torch_pruning(twin, images), model, repeats)
        except Exception as error:
            figures["torch_pruning"] = f"fails: {type(error).__name__}"
    return figures


def main() -> None:
    """Measure, print a line for each model, and what the ratios come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    measured("resnet18", torchvision.models.resnet18(), 1)  # what is loaded and looked up only once
    results: dict[str, dict[str, float | str]] = {}
    ratios = []
    for name in given.models or torchvision.models.list_models(torchvision.models):
        if not given.models and any(part in name for part in ENDLESS):
            continue
        model = torchvision.models.get_model(name, weights=None)
        if not given.models and sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
            continue
        figures = results[name] = measured(name, model, given.repeats)
        peer = figures.get("torch_pruning", "")
        if isinstance(peer, float):
            ratios.append((float(figures["prune"]) / peer, float(figures["prune, drop"]) / peer))
            peer = "Torch-Pruning {:.2f} s   ratio {:.2f}, drop {:.2f}".format(peer, *ratios[-1])
        print(
            f"{name:24} find_groups {figures['find_groups']:.2f} s   prune {figures['prune']:.2f} s   {peer}",
            flush=True,
        )
        if given.out:
            given.out.write_text(json.dumps(results, indent=1))
    if ratios:
        for which, column in zip(("absorb", "drop"), zip(*ratios, strict=True), strict=True):
            print(f"{which}: {len(column)} ratios, median {median(column):.2f}, largest {max(column):.2f}")


if __name__ == "__main__":
    main()
