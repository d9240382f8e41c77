"""What widths do to speed on this machine: a small VGG-16, dense and cut uniformly: `python benchmarks/widths.py`."""

import time
from statistics import median

import torch
from torch import nn

from lightning_prune import prune
from lightning_prune.workbench import VGG16BN

IMAGES = torch.randn(128, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def training_step(net: nn.Module) -> float:
    """Return the median of seven training steps in milliseconds, after two to warm up."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        optimizer.zero_grad()
        net(IMAGES).logsumexp(1).mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return median(times[2:]) * 1e3


if __name__ == "__main__":
    torch.set_num_threads(2)
    for ratio in (0.0, 0.47, 0.5):
        torch.manual_seed(0)
        net = VGG16BN(1, 28, 10, width=0.25)
        prune(net, IMAGES[:2], pruning_ratio=ratio)
        widths = sorted({layer.out_channels for layer in net.modules() if isinstance(layer, nn.Conv2d)})
        print(f"{ratio:.0%} of the channels cut, widths {widths}: {training_step(net):.0f} ms a training step")
