"""Seconds of one core for reading channel groups, and for a whole 50 % cut: `python benchmarks/read.py [model ...]`."""

import sys
import time
from collections.abc import Callable

import torch
import torchvision

from lightning_prune import find_groups, prune


def seconds(work: Callable[[torch.nn.Module], object], name: str) -> float:
    """Return the best of three, each on a fresh model."""
    times = []
    for _ in range(3):
        model = torchvision.models.get_model(name)
        start = time.process_time()
        work(model)
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    torch.set_num_threads(1)
    images = torch.zeros(1, 3, 224, 224)
    for name in sys.argv[1:] or ("resnet50", "densenet121", "mobilenet_v3_large"):
        reading = seconds(lambda model: find_groups(model, images), name)
        cutting = seconds(lambda model: prune(model, images, pruning_ratio=0.5), name)
        print(f"{name:24} find_groups {reading:.2f} s   prune {cutting:.2f} s")
