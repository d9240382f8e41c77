"""How well criteria know what a channel is worth: rank correlation of scores with the loss that its removal costs.

    python benchmarks/rank_correlation.py [--seeds 0,1,2] [--out rank_correlation.json]

A small network with BatchNorm (24, 48 and 48 channels) is trained on scikit-learn's digits. Then each channel is
turned off by itself, by zeros in the weights that read it, and the loss over all training images is measured in eval
mode. Criteria that look on have seen one pass over these images. Printed: Spearman's rank correlation over all
channels, mean +- standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import warnings
from copy import deepcopy
from pathlib import Path
from statistics import mean, stdev

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from papers_rows import Bench
from papers_slimming import DIGITS
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional import spearman_corrcoef

from lightning_prune.criteria import BNScale, Criterion, Fisher, Gathered, Magnitude, Random, Taylor, score_groups
from lightning_prune.criteria.readers import readers_of
from lightning_prune.graph import Graph, read

CRITERIA: dict[str, Criterion] = {
    "Fisher": Fisher(),
    "Taylor": Taylor(),
    "magnitude": Magnitude(),
    "BN scale": BNScale(),
    "random": Random(),
}


def whole_loss(net: nn.Module, batches: DataLoader[tuple[Tensor, ...]]) -> float:
    """The mean loss over all images."""
    with torch.no_grad():
        losses = [F.cross_entropy(net(images), labels, reduction="none") for images, labels in batches]
    return float(torch.cat(losses).double().mean())


def increases(net: nn.Module, graph: Graph, batches: DataLoader[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Group name -> what the removal of each of its channels adds to the loss."""
    before, found = whole_loss(net, batches), {}
    for name, readers in readers_of(net, graph).items():
        losses = []
        for channel in range(len(readers[0].positions)):
            without = deepcopy(net)
            for reader in readers:
                weight = without.get_submodule(reader.module).weight
                assert isinstance(weight, Tensor)
                weight.data[:, reader.positions[channel]] = 0
            losses.append(whole_loss(without, batches) - before)
        found[name] = torch.tensor(losses)
    return found


def correlations(seed: int, bench: Bench) -> dict[str, float]:
    """The rank correlation of each criterion."""
    pl.seed_everything(seed, verbose=False)
    net, data = bench.dense(DIGITS, seed).eval(), bench.images(DIGITS, seed, DIGITS.dense)
    batches, example = data.train_dataloader(), torch.zeros(2, 1, 8, 8)
    graph = read(net, example)
    truth, found = increases(net, graph, batches), {}
    for name, criterion in CRITERIA.items():
        if isinstance(criterion, Gathered):
            with criterion.gathering(net, example):
                for images, labels in batches:
                    F.cross_entropy(net(images), labels).backward()
                    criterion.take()
        scores = score_groups(criterion, net, graph.groups)
        pairs = [(scores[group], truth[group]) for group in truth if group in scores]
        left, right = (torch.cat(side).double() for side in zip(*pairs, strict=True))
        found[name] = float(spearman_corrcoef(left, right))
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path("papers_cache"), help="folder for trained dense weights")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {seed: correlations(seed, Bench(Path(), given.cache)) for seed in given.seeds}
    for name in CRITERIA:
        values = [found[seed][name] for seed in given.seeds]
        print(f"{name:12} {mean(values):.3f} +- {stdev(values) if len(values) > 1 else 0:.3f}")
    if given.out:
        given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
