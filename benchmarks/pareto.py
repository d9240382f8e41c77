"""The same task, the same budget, every method and every peer: accuracy against MACs.

    python benchmarks/pareto.py --data ROOT [--quick] [--workers 2] [--out pareto.jsonl]
    python benchmarks/pareto.py --table [--picture pareto.png] [--out pareto.jsonl]

For each seed one dense net is trained for each task; every method starts from it, trains `BUDGET` epochs with the same
optimizer, LR at every step and order of images, and is asked for 30, 50, 70 and 85 % fewer MACs. What is told is the
accuracy on all official test images. Each cell runs in a process of its own, on one thread, and is written down as it
ends: started again, the benchmark goes on where it stopped, and tries again what failed. `--quick` measures seed 0, two
tasks, 50 and 85 %.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path

from apart import sent
from circumstances import circumstances, note, noted
from memory import peak, resident
from pareto_picture import draw
from pareto_table import table
from pareto_tasks import SEEDS, TARGETS, TASKS, Bench, Job
from pareto_ways import WAYS

HERE = Path(__file__).resolve().parent
Key = tuple[str, int, float, str]
PRELOADED = ["torch", "torchvision", "lightning", "lightning_prune.callbacks", "lightning_prune.workbench"]
"""Imported once, in the server that the processes of the cells are forked from."""
QUICK: Mapping[str, Sequence[object]] = {"tasks": ("lenet5", "vgg16_bn"), "seeds": (0,), "targets": (0.5, 0.85)}


@dataclass(frozen=True)
class Run:
    """What is asked of a run of the benchmark."""

    data: Path
    cache: Path
    out: Path
    workers: int
    limit: float
    tasks: Sequence[str] = field(default_factory=lambda: list(TASKS))
    seeds: Sequence[int] = SEEDS
    targets: Sequence[float] = TARGETS
    ways: Sequence[str] = field(default_factory=lambda: list(WAYS))

    def cells(self) -> list[Key]:
        """All cells, the dense nets of a seed first; 0 is their target."""
        found: list[Key] = []
        for seed in self.seeds:
            found += [(task, seed, 0.0, "dense") for task in self.tasks]
            found += [(task, seed, target, way) for target, way, task in product(self.targets, self.ways, self.tasks)]
        return found


def key(row: Mapping[str, object]) -> Key:
    """What names a row."""
    return str(row["task"]), int(str(row["seed"])), float(str(row["target"])), str(row["way"])


def run(asked: Run) -> None:
    """Measure the cells that are missing."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for the server, which imports torch
    there = {key(row) for row in noted(asked.out) if "failed" not in row}
    for seed in asked.seeds:
        cells = [cell for cell in asked.cells() if cell[1] == seed and cell not in there]
        for kind in (True, False):
            todo = [cell for cell in cells if (cell[3] == "dense") == kind]
            for number, row in enumerate(_all(todo, asked), 1):
                note(asked.out, row)
                said = row.get("failed") or row.get("skipped") or f"{row['accuracy']:.2f} %, {row['removed']:.1%} fewer"
                print(f"{number:4}/{len(todo)} {key(row)} {said}", flush=True)


def _all(todo: Sequence[Key], asked: Run) -> Iterator[dict[str, object]]:
    with ThreadPoolExecutor(asked.workers) as pool:
        for done in as_completed([pool.submit(_in_a_process, cell, asked) for cell in todo]):
            yield done.result()


def _in_a_process(cell: Key, asked: Run) -> dict[str, object]:
    """Measure one cell in a process of its own; where it fails or dies the row says so."""
    row: dict[str, object] = dict(zip(("task", "seed", "target", "way"), cell, strict=True))
    if cell[3] in WAYS and (reason := WAYS[cell[3]].skipped(cell[0])):
        return {**row, "skipped": reason, **circumstances()}
    found, stopped = sent(_child, (cell, asked.data, asked.cache), asked.limit, PRELOADED)
    return {**row, **(found or {"failed": stopped}), **circumstances()}


def _child(connection: Connection, cell: Key, data: Path, cache: Path) -> None:
    try:
        connection.send(measure(cell, Bench(data, cache)))
    except Exception as error:
        connection.send({"failed": f"{type(error).__name__}: {str(error)[:300]}"})


def measure(cell: Key, bench: Bench) -> dict[str, object]:
    """Run one method, and measure what comes of it; seconds are the process's own."""
    import lightning.pytorch as pl
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning_prune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    task, seed, target, way = cell
    job = Job(bench, TASKS[task], seed, target)
    bench.images(job.task, seed, job.task.more)
    pl.seed_everything(seed, verbose=False)
    before, start = resident(), time.process_time()
    net = bench.dense(job.task, seed) if way == "dense" else WAYS[way].run(job)
    seconds = time.process_time() - start
    memory = max(peak() - before, 0.0)
    return {**job.measure(net), "seconds": seconds, "MiB": memory}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST/raw and FashionMNIST/raw")
    parser.add_argument("--quick", action="store_true", help="seed 0, two tasks, two targets")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, metavar="WAY")
    parser.add_argument("--targets", nargs="+", type=float)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--workers", type=int, default=2, help="cells at a time, each on one thread")
    parser.add_argument("--limit", type=float, default=1200, help="seconds that a cell may take")
    parser.add_argument("--out", type=Path, default=HERE / "pareto.jsonl")
    parser.add_argument("--cache", type=Path, default=Path("papers_cache"), help="folder of trained dense weights")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--picture", type=Path, help="where the picture is written, .png or .svg")
    given = parser.parse_args(arguments)
    if not given.table:
        if given.data is None:
            parser.error("--data ROOT says where the images lie")
        chosen = dict(QUICK) if given.quick else {}
        chosen |= {name: value for name in ("tasks", "seeds", "targets", "ways") if (value := getattr(given, name))}
        run(Run(given.data, given.cache, given.out, given.workers, given.limit, **chosen))  # type: ignore[arg-type]
    rows = noted(given.out)
    if not rows:
        sys.exit(f"{given.out} has no results; run without --table first.")
    print(table(rows))
    if given.picture:
        draw(rows, given.picture)


if __name__ == "__main__":
    main()
