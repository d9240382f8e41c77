"""The tables of four papers, each row beside the paper's: Han 2015 (weights and connections), Liu 2017 (slimming),
Theis 2018 (Fisher pruning), Louizos 2018 (L0).

    python benchmarks/papers.py --data ROOT [--only NAME ...] [--seeds 0,1,2] [--out papers.jsonl]
    python benchmarks/papers.py --table [--out papers.jsonl]

Every row and seed is appended to the file of results as it ends. What is there already is skipped: run the same
command again after an interruption, or with --again to measure anew; the last result of a row and seed counts.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import papers_fisher
import papers_han
import papers_l0
import papers_slimming
import torch
from circumstances import circumstances, note
from papers_rows import Bench, Row
from papers_table import done, table

ROWS: dict[str, Row] = {
    row.name: row for row in (*papers_han.ROWS, *papers_slimming.ROWS, *papers_fisher.ROWS, *papers_l0.ROWS)
}


def measure(row: Row, bench: Bench, seed: int) -> dict[str, object]:
    """Run one row with one seed, and say under which circumstances."""
    pl.seed_everything(seed, verbose=False)
    start = time.perf_counter()
    figures = row.run(bench, seed)
    seconds = round(time.perf_counter() - start, 1)
    return {"row": row.name, "seed": seed, **figures, "seconds": seconds, **circumstances()}


def collect(rows: list[Row], bench: Bench, seeds: list[int], out: Path, *, again: bool) -> None:
    """Run what is missing and append it to the file of results."""
    for row in rows:
        for seed in seeds:
            if not again and (row.name, seed) in done(out):
                print(f"{row.name}, seed {seed}: is in {out}")
                continue
            result = measure(row, bench, seed)
            note(out, result)
            figures = {key: value for key, value in result.items() if isinstance(value, float)}
            text = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            print(f"{row.name}, seed {seed}: {text}", flush=True)


def chosen(names: list[str]) -> list[Row]:
    """The rows of these names, or whose names hold one that is no row's; all if none is given."""
    for name in names:
        if not any(name in row for row in ROWS):
            raise SystemExit(f"`--only` takes rows, or parts of their names; got {name!r}. The rows are: {list(ROWS)}.")
    wanted = {row for name in names for row in ([name] if name in ROWS else ROWS) if name in row}
    return [row for name, row in ROWS.items() if not names or name in wanted]


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST/raw and FashionMNIST/raw")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows, or parts of their names")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("papers.jsonl"), help="file of results, one JSON a line")
    parser.add_argument("--cache", type=Path, default=Path("papers_cache"), help="folder for trained dense weights")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are in the file")
    parser.add_argument("--table", action="store_true", help="print the results beside the papers' figures")
    given = parser.parse_args()
    if not given.table and given.data is None:
        parser.error("--data ROOT says where the images lie, unless --table only prints what was measured")
    return given


def main() -> None:
    """Measure what is missing, or print what was measured."""
    given = arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = chosen(given.only)
    if given.table:
        print(table(rows, given.out))
    else:
        collect(rows, Bench(given.data, given.cache), given.seeds, given.out, again=given.again)


if __name__ == "__main__":
    main()
