"""What Channel Equilibrium costs: seconds per training step of ResNet-20 at batch 128, beside BatchNorm and SE.

    python benchmarks/equilibrium_cost.py [--rounds 15] [--out equilibrium_cost.json]

Images of 28 x 28 pixels, SGD with momentum, one thread. The nets take their steps in turns; told is the median, and the
median and the quartiles of the ratios to the BatchNorm net's step of the same round, with planes (NCHW) and with
channels last in memory. Squeeze-and-excitation stands behind the last norm of all nine blocks, Channel Equilibrium
where Shao et al. 2020 put it: behind the stem and the six blocks of the first two stages.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import torch
import torch.nn.functional as F
from circumstances import circumstances
from equilibrium import squeezed
from torch import Tensor, nn

from lightning_prune.cost import count_macs, count_params
from lightning_prune.inputs import Inputs
from lightning_prune.workbench import resnet20

NETS = {
    "bn": partial(resnet20, 1, 28),
    "se": squeezed,
    **{norm: partial(resnet20, 1, 28, norm=norm) for norm in ("ce", "bd", "ir")},
}
LAYOUTS = {"planes": torch.contiguous_format, "channels last": torch.channels_last}


def step(net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """Take a step; return its seconds."""
    start = perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()
    return perf_counter() - start


def measure(layout: torch.memory_format, rounds: int) -> dict[str, object]:
    """Let all nets take their steps in turns."""
    torch.manual_seed(0)
    images, labels = torch.randn(128, 1, 28, 28).to(memory_format=layout), torch.randint(10, (128,))
    nets = {name: make().to(memory_format=layout) for name, make in NETS.items()}
    sgd = {name: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for name, net in nets.items()}
    seconds: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(rounds + 2):
        for name, net in nets.items():
            seconds[name].append(step(net, sgd[name], images, labels))
    found: dict[str, object] = {}
    for name, net in nets.items():
        ratios = [own / plain for own, plain in zip(seconds[name][2:], seconds["bn"][2:], strict=True)]
        found[name] = {
            "seconds": round(median(seconds[name][2:]), 4),
            "ratio": round(median(ratios), 3),
            "quartiles": [round(quartile, 3) for quartile in quantiles(ratios, n=4)[::2]],
            "params": count_params(net),
            "macs": count_macs(net, Inputs((images[:1],))),
        }
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("equilibrium_cost.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, object] = {name: measure(layout, given.rounds) for name, layout in LAYOUTS.items()}
    text = json.dumps({**found, **circumstances()}, indent=2)
    given.out.write_text(f"{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
