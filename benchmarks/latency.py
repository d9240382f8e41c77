"""Predicted latency beside measured latency, for networks cut to five widths.

    python benchmarks/latency.py [model ...] [--pixels 64] [--batches 1 8] [--rounds 12] [--wall] [--out latency.json]

Uniform cuts of 0, 20, 40, 60 and 80 % of the channels, one thread. The prediction is `predicted_latency` of the plan on
the dense network, from operations timed alone in a table that starts empty; the measured figure is the lower
quartile of the rounds, half of them before the table is made and half after it, in each of which all five networks
run in turns; the table holds lower quartiles too. Both count the seconds of the thread, so that other work on the
machine does not stand in them; with --wall both count wall time, and the networks are measured by `measure_latency`.
Printed too: the seconds that the table took, those of a second prediction, and the multiple that widths are worth being
rounded to.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
import torchvision
from torch import nn

from lightning_prune import prune
from lightning_prune.cost import (
    Bench,
    LatencyPrice,
    LatencyTable,
    Machine,
    batch_of,
    measure_latency,
    predicted_latency,
    preferred_multiple,
)
from lightning_prune.graph import read
from lightning_prune.inputs import Inputs
from lightning_prune.pruner import Request, draft_cut

MODELS = ("resnet18", "mobilenet_v2", "vgg11_bn")
RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8)


@dataclass
class Row:
    """One network at one width."""

    model: str
    batch: int
    ratio: float
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """How far the prediction is off, as a fraction of what was measured."""
        return self.predicted / self.measured - 1

    def __str__(self) -> str:
        figures = f"predicted {self.predicted:8.3f} ms   measured {self.measured:8.3f} ms   {self.error:+.1%}"
        return f"{self.model:14} batch {self.batch}   ratio {self.ratio:.1f}   {figures}"


def thread_latency(model: nn.Module, inputs: Inputs) -> float:
    """Return the milliseconds that the thread spends in a pass, after one to warm up."""
    with torch.inference_mode():
        inputs.call(model)
        start = time.thread_time()
        inputs.call(model)
        return (time.thread_time() - start) * 1e3


def timed(models: list[nn.Module], inputs: Inputs, rounds: int, wall: bool) -> list[list[float]]:
    """Return the milliseconds of each model in each round, all measured in turns."""
    found: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for times, model in zip(found, models, strict=True):
            times.append(measure_latency(model, inputs, seconds=0.05) if wall else thread_latency(model, inputs))
    return found


def measured(name: str, batch: int, given: argparse.Namespace, table: LatencyTable) -> list[Row]:
    """Predict and measure one network at all widths."""
    model = torchvision.models.get_model(name, weights=None).eval()
    images = torch.rand(1, 3, given.pixels, given.pixels)
    graph = read(model, images)
    clock = time.perf_counter if given.wall else time.thread_time
    stopwatch = Bench(torch.device("cpu"), clock)
    price = LatencyPrice(graph, model, batch_size=batch, table=table, stopwatch=stopwatch)
    plans = [draft_cut(model, images, Request(ratio, constants="drop")).plan for ratio in RATIOS]
    twins, inputs = [copy.deepcopy(model) for _ in RATIOS], batch_of(graph.inputs, batch)
    for twin, ratio in zip(twins, RATIOS, strict=True):
        prune(twin, images, pruning_ratio=ratio, constants="drop")
    before = timed(twins, inputs, given.rounds, given.wall)
    seconds, known = [], len(table.timings)
    for _ in range(2):
        start = time.perf_counter()
        predicted = [predicted_latency(graph, plan, price) for plan in plans]
        seconds.append(time.perf_counter() - start)
    count = len(table.timings) - known
    after = timed(twins, inputs, given.rounds, given.wall)
    times = [quantiles(early + late)[0] for early, late in zip(before, after, strict=True)]
    print(f"{name}, batch {batch}: {count} timings in {seconds[0]:.1f} s, again {seconds[1]:.2f} s", end=", ")
    print(f"widths in multiples of {preferred_multiple(price)}")
    return [Row(name, batch, *figures) for figures in zip(RATIOS, predicted, times, strict=True)]


def main() -> None:
    """Measure, print a line for each width, and what the errors come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table, rows = LatencyTable(Machine.here(torch.device("cpu"))), []
    for name in given.models:
        for batch in given.batches:
            found = measured(name, batch, given, table)
            rows += found
            print(*found, sep="\n", flush=True)
    for name in given.models:
        errors = [abs(row.error) for row in rows if row.model == name]
        print(f"{name}: median error {median(errors):.1%}, largest {max(errors):.1%}")
    print(f"all: median error {median(abs(row.error) for row in rows):.1%}")
    if given.out:
        content = {"machine": str(table.machine), "wall": given.wall, "rows": [vars(row) for row in rows]}
        given.out.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
