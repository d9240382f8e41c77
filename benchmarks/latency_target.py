"""Whether `of="latency"` keeps its word: asked for 40 % less, measured dense against pruned.

    python benchmarks/latency_target.py [model ...] [--pixels 64] [--batches 1 64] [--ratio 0.4] [--out FILE]

Each network is pruned for its own batch size, from a table of timings that starts empty. Then dense and pruned take
turns, many rounds, one thread; the figure is 1 - pruned / dense of the medians, in wall time and in seconds of the
thread (which other work on the machine does not enter).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch import Tensor, nn

from lightning_prune import prune

MODELS = ("resnet18", "mobilenet_v2", "vgg11_bn")


def turns(networks: list[nn.Module], images: Tensor, rounds: int) -> list[tuple[float, float]]:
    """The median seconds of a pass of each network: by the wall, and of the thread."""
    times: list[list[tuple[float, float]]] = [[] for _ in networks]
    with torch.inference_mode():
        for at in range(rounds + 2):
            for found, network in zip(times, networks, strict=True):
                wall, thread = time.perf_counter(), time.thread_time()
                network(images)
                if at >= 2:
                    found.append((time.perf_counter() - wall, time.thread_time() - thread))
    return [(median(one[0] for one in found), median(one[1] for one in found)) for found in times]


def measured(name: str, pixels: int, batch: int, ratio: float, rounds: int) -> dict[str, object]:
    """Prune one network, and measure what it has gained."""
    torch.manual_seed(0)
    dense = torchvision.models.get_model(name, weights=None).eval()
    small, images = copy.deepcopy(dense), torch.rand(batch, 3, pixels, pixels)
    start = time.perf_counter()
    record = prune(small, images, pruning_ratio=ratio, of="latency")
    seconds = time.perf_counter() - start
    (wall, thread), (wall_now, thread_now) = turns([dense, small], images, rounds)
    found = {"predicted": record.reached, "wall": 1 - wall_now / wall, "thread": 1 - thread_now / thread}
    told = ", ".join(f"{key} {value:.1%}" for key, value in found.items())
    print(f"{name:14} batch {batch:3}: asked {ratio:.0%}, {told}; MACs -{record.macs.removed:.0%}, {seconds:.0f} s")
    return {"model": name, "batch": batch, "asked": ratio, **found, "macs": record.macs.removed, "seconds": seconds}


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIGHTNING_PRUNE_CACHE"] = folder
        pairs = [(name, batch) for name in given.models for batch in given.batches]
        found = [measured(name, given.pixels, batch, given.ratio, given.rounds) for name, batch in pairs]
    if given.out:
        given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
