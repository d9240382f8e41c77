"""Sparse training from scratch: static random masks, SET and RigL at equal sparsity, budget and first masks.

    python benchmarks/growing.py --data ROOT [--only NAME ...] [--seeds 0,1,2] [--sparsity 0.98] [--out growing.jsonl]
    python benchmarks/growing.py --table [--out growing.jsonl]

LeNet-300-100 on MNIST, as in "Rigging the Lottery" (Evci et al. 2020). All weights are masked by ERK. Each method and
seed is appended to the file of results as it ends; what is there already is skipped.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import lightning.pytorch as pl
import torch
from circumstances import circumstances, note
from papers_rows import Bench, Setting, Task
from papers_table import done

from lightning_prune.callbacks import RigLCallback
from lightning_prune.workbench import LeNet300

SETTING = Setting(epochs=10, lr=0.2, weight_decay=1e-4)
EVERY = 100
"""Chosen on validation images; the test images are looked at once, after the last epoch."""

TASK = Task("lenet_300_100 from scratch", LeNet300, "MNIST", dense=SETTING, more=SETTING)

METHODS: dict[str, Callable[..., RigLCallback] | None] = {
    "dense": None,
    "static": partial(RigLCallback, drop_fraction=0.0),
    "SET": partial(RigLCallback, grow="random", every_n_steps=EVERY),
    "RigL": partial(RigLCallback, every_n_steps=EVERY),
}


def measure(name: str, bench: Bench, seed: int, sparsity: float) -> dict[str, object]:
    """Train with one method and one seed, and say what came of it."""
    pl.seed_everything(seed, verbose=False)
    net, method = LeNet300(), METHODS[name]
    start = time.perf_counter()
    bench.train(net, TASK, seed, SETTING, [] if method is None else [method(sparsity, seed=seed)])
    seconds = round(time.perf_counter() - start, 1)
    weights = sum(int(parameter.count_nonzero()) for parameter in net.parameters() if parameter.dim() > 1)
    setting = {**asdict(SETTING), "every": EVERY, "sparsity": sparsity}
    return {
        "row": name,
        "seed": seed,
        **bench.errors(net, TASK, seed),
        "weights": weights,
        "seconds": seconds,
        **setting,
    }


def table(out: Path) -> str:
    """The mean and the standard deviation of each method's errors."""
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    lines = [f"{'':8} {'test error %':>14} {'validation error %':>20} {'weights':>9} {'seconds':>8}  seeds"]
    for name in METHODS:
        own = [row for row in rows if row["row"] == name]
        if own:
            test, val = (_spread([row[key] for row in own]) for key in ("error", "val_error"))
            weights, seconds = (mean(row[key] for row in own) for key in ("weights", "seconds"))
            lines.append(f"{name:8} {test:>14} {val:>20} {weights:>9,.0f} {seconds:>8.1f}  {len(own)}")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f} +- {stdev(values) if len(values) > 1 else 0:.2f}"


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST/raw")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME", help="methods")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--out", type=Path, default=Path("growing.jsonl"), help="file of results, one JSON a line")
    parser.add_argument("--table", action="store_true", help="print what was measured")
    given = parser.parse_args()
    if not given.table and given.data is None:
        parser.error("--data ROOT says where the images lie, unless --table only prints what was measured")
    return given


def main() -> None:
    """Measure what is missing, and print all."""
    given = arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for seed in [] if given.table else given.seeds:
        for name in given.only:
            if (name, seed) not in done(given.out):
                result = measure(name, Bench(given.data, Path("unused")), seed, given.sparsity)
                note(given.out, {**result, **circumstances()})
                print(f"{name}, seed {seed}: {result['error']:.2f} %, {result['seconds']} s", flush=True)
    print(table(given.out))


if __name__ == "__main__":
    main()
