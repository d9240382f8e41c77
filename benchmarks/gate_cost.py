"""What gates cost: training steps of one network with a gate on every channel and without gates, in turns.

    python benchmarks/gate_cost.py [--model resnet50] [--pairs 15] [--sizes 64,128,224] [--out gate_cost.json]

Steps of SGD with momentum on 8 images, one thread. Small images are the hard case: the penalty costs the same however
large they are. A step draws the gates, runs forward and backward, adds the penalty's gradient, and moves parameters.
Printed: medians of the CPU time, and the median of the pairs' ratios with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lightning_prune.gates import Constraint, ExpectedL0, choose
from lightning_prune.graph import read
from lightning_prune.layers import HardConcrete
from lightning_prune.layers.gates import attach, gates_of, ungated

WAYS = ("per parameter", "a target of MACs", "a sample per example")


class Steps:
    """Takes steps of one network, with its gates and without."""

    def __init__(self, name: str, way: str, size: int) -> None:
        torch.manual_seed(0)
        self.net: nn.Module = torchvision.models.get_model(name, weights=None)
        self.images, self.labels = torch.randn(8, 3, size, size), torch.randint(1000, (8,))
        graph = read(self.net, self.images)
        gates = choose(self.net, graph, {"*": "channels"}, HardConcrete, per_example=way == WAYS[2]).gates
        self.cost = ExpectedL0(self.net, graph, gates, "macs" if way == WAYS[1] else "params")
        self.constraint = Constraint(0.5, 1000, 3.8) if way == WAYS[1] else None
        attach(self.net, gates)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)
        self.generator = torch.Generator().manual_seed(0)

    def _run(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.net(self.images), self.labels).backward()

    def _pull(self) -> float | Tensor:
        if self.constraint is None:
            return 1e-6
        gone = 1 - self.cost.tested(self.constraint.margin) / self.cost.present
        return self.constraint.pull(gone) / self.cost.present

    def gated(self) -> float:
        """Return the CPU seconds of a step with gates."""
        gates = gates_of(self.net)
        assert gates is not None
        start = time.process_time()
        gates.draw(self.generator, len(self.images))
        self._run()
        self.cost.add_to_gradients(dict.fromkeys(self.cost.named, self._pull()))
        self.optimizer.step()
        for gate in self.cost.named.values():
            gate.clamp_()
        return time.process_time() - start

    def plain(self) -> float:
        """Return the CPU seconds of a step without."""
        with ungated(self.net):
            start = time.process_time()
            self._run()
            self.optimizer.step()
            return time.process_time() - start


def measured(name: str, way: str, size: int, pairs: int) -> dict[str, list[float]]:
    """Take steps in turns, in an order that alternates; the first of each warms up."""
    steps = Steps(name, way, size)
    found: dict[str, list[float]] = {"plain": [], "gated": []}
    for at in range(pairs + 1):
        for which in sorted(found, reverse=bool(at % 2)):
            found[which].append(getattr(steps, which)())
    return {which: seconds[1:] for which, seconds in found.items()}


def main() -> None:
    """Measure, and print medians, ratios and their spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], default=[64, 128, 224])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for size in given.sizes:
        for way in WAYS:
            found = results[f"{way}, {size} pixels"] = measured(given.model, way, size, given.pairs)
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
