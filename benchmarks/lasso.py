"""Channel pruning by LASSO and least squares beside other criteria, with and without a refit (He et al. 2017, table 1).

    python benchmarks/lasso.py --data ROOT [--nets vgg16_bn resnet20] [--speed-ups 2,4,5] [--seeds 0]
    python benchmarks/lasso.py --table [--out lasso.jsonl]

The dense nets of papers.py (FashionMNIST, trained on 10,000 images) are cut 2, 4 and 5 times in MACs. A refit looks at
5,000 of these images, at 10 points of each output, and at no labels. Told is the test accuracy right after the cut;
and for the rows named in `TUNED` after 1 and 5 epochs of fine-tuning, each with a cosine schedule of its own, from an
LR of 0.01. What stands in the file already is skipped.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter

import lightning.pytorch as pl
import torch
from circumstances import circumstances, note
from papers_rows import Bench, Setting, Task
from papers_slimming import RESNET20_FASHION, VGG16_FASHION
from torch import Tensor, nn

from lightning_prune import prune, reconstruct
from lightning_prune.allocation import Allocation, ByCost, ShallowToDeep, Uniform
from lightning_prune.cost import count_macs
from lightning_prune.criteria import Criterion, FirstK, Lasso, Magnitude, MaxResponse, Random
from lightning_prune.inputs import Inputs
from lightning_prune.reconstruction import Reconstruction
from lightning_prune.types import Trunks

IMAGES, BATCH = 5000, 250
NETS: dict[str, Task] = {"vgg16_bn": VGG16_FASHION, "resnet20": RESNET20_FASHION}
TUNE = Setting(5, 0.01, 1e-4, batch_size=64, limit=10_000)


@dataclass(frozen=True)
class Way:
    """One way to cut a net."""

    criterion: Criterion
    refit: bool = True
    allocation: Allocation = field(default_factory=Uniform)
    trunks: Trunks = "whole"
    settings: Reconstruction = field(default_factory=Reconstruction)

    def cut(self, net: nn.Module, speed_up: float, seen: list[Tensor]) -> dict[str, float]:
        """Cut a net in place; return what is known of the refit."""
        if not self.refit:
            ratio = 1 - 1 / speed_up
            prune(
                net,
                seen[0],
                pruning_ratio=ratio,
                of="macs",
                criterion=self.criterion,
                allocation=self.allocation,
                trunks=self.trunks,
            )
            return {}
        done = reconstruct(
            net,
            seen,
            speed_up=speed_up,
            criterion=self.criterion,
            allocation=self.allocation,
            trunks=self.trunks,
            reconstruction=self.settings,
        )
        return {"worst layer error": max(refit.error for refit in done.refits), "MiB": done.nbytes / 2**20}


WAYS: dict[str, Way] = {
    "LASSO, refit": Way(Lasso()),
    "LASSO, refit, 1 : 1.5": Way(Lasso(), allocation=ShallowToDeep()),
    "LASSO, refit, error per MAC": Way(Lasso(), allocation=ByCost()),
    "LASSO, refit, sampled": Way(Lasso(), trunks="sampled"),
    "LASSO, refit, error per MAC, sampled": Way(Lasso(), allocation=ByCost(), trunks="sampled"),
    "LASSO, refit to current outputs": Way(Lasso(), settings=Reconstruction(targets="current")),
    "max response, refit": Way(MaxResponse()),
    "max response": Way(MaxResponse(), refit=False),
    "magnitude, refit": Way(Magnitude()),
    "magnitude": Way(Magnitude(), refit=False),
    "random, refit": Way(Random()),
    "random": Way(Random(), refit=False),
    "first k, refit": Way(FirstK()),
    "first k": Way(FirstK(), refit=False),
}
TUNED = ("LASSO, refit", "LASSO, refit, error per MAC", "magnitude, refit", "magnitude", "random")
RESIDUAL_ONLY = ("LASSO, refit, sampled", "LASSO, refit, error per MAC, sampled")


def rows(given: argparse.Namespace) -> Iterator[tuple[str, float, str, int]]:
    """Each net, speed-up, way and seed."""
    for seed in given.seeds:
        for net in given.nets:
            for speed_up in given.speed_ups:
                for way in WAYS:
                    if (net == "resnet20" or way not in RESIDUAL_ONLY) and (not given.ways or way in given.ways):
                        yield net, speed_up, way, seed


def measure(net_name: str, speed_up: float, way: str, seed: int, bench: Bench, *, tune: bool) -> dict[str, object]:
    """Cut, look, and train on."""
    task = NETS[net_name]
    dense = bench.dense(task, seed).eval()
    pl.seed_everything(seed, verbose=False)
    images = torch.cat([images for images, _ in bench.images(task, seed, task.dense).train_dataloader()])[:IMAGES]
    net, example = deepcopy(dense), Inputs((images[:1],))
    start = perf_counter()
    known = WAYS[way].cut(net, speed_up, list(images.split(BATCH)))
    seconds = perf_counter() - start
    result: dict[str, object] = {"net": net_name, "speed_up": speed_up, "way": way, "seed": seed}
    result |= {"dense": 100 - bench.errors(dense, task, seed)["error"], "seconds": round(seconds, 1)}
    result |= {"reached": count_macs(dense, example) / count_macs(net, example), **known}
    result["0 epochs"] = 100 - bench.errors(net, task, seed)["error"]
    for epochs in (1, 5) if tune and way in TUNED else ():
        tuned = deepcopy(net)
        bench.train(tuned, task, seed, replace(TUNE, epochs=epochs))
        result[f"{epochs} epochs"] = 100 - bench.errors(tuned, task, seed)["error"]
    return {**result, **circumstances()}


def table(out: Path) -> str:
    """One line for each net, speed-up and way: test accuracy in percent, mean +- standard deviation over the seeds."""
    found: dict[tuple[str, float, str], dict[int, dict[str, object]]] = {}
    for line in out.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault((row["net"], row["speed_up"], row["way"]), {})[row["seed"]] = row
    lines = [
        "| net | MACs | way | dense | no training | 1 epoch | 5 epochs | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (net, speed_up, way), seeds in found.items():
        runs = list(seeds.values())
        cells = [
            told([run[key] for run in runs if key in run]) for key in ("dense", "0 epochs", "1 epochs", "5 epochs")
        ]
        seconds = told([run["seconds"] for run in runs])
        lines.append(f"| {net} | {speed_up:g}x | {way} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def told(values: list[float]) -> str:
    """Mean and spread."""
    spread = f" +- {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}" if values else ""


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with FashionMNIST/raw")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument(
        "--speed-ups", type=lambda text: [float(one) for one in text.split(",")], default=[2.0, 4.0, 5.0]
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[], metavar="WAY")
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0])
    parser.add_argument("--no-tuning", action="store_true", help="leave the fine-tuning out")
    parser.add_argument("--out", type=Path, default=Path("lasso.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path("papers_cache"), help="folder of trained dense weights")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(table(given.out))
        return
    if given.data is None:
        parser.error("--data ROOT says where the images lie")
    warnings.simplefilter("ignore")
    bench = Bench(given.data, given.cache)
    there = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    known = {(row["net"], row["speed_up"], row["way"], row["seed"]) for row in there}
    for row in rows(given):
        if row not in known:
            result = measure(*row, bench, tune=not given.no_tuning)
            note(given.out, result)
            print(json.dumps({key: result[key] for key in result if key not in circumstances()}), flush=True)


if __name__ == "__main__":
    main()
