"""What each callback costs: a step beside the bare fit's, and an event; and what peers' penalties and masks cost.

    python benchmarks/overhead.py [model ...] [--rounds 5] [--ways NAME ...] [--out overhead.jsonl] [--table]

Steps of torchvision's networks on 8 images of 3 x 64 x 64, one thread; small batches are the hard case, for what a
callback does to parameters costs the same however many images there are. A fit is an epoch of 8 steps and one more; its
step is the median of 6. Each fit with a callback stands between two without, and is divided by their mean. In the steps
that count nothing is cut: events come after them, masks of 90 % of the weights before them. Told are CPU times: the
ratio's median and quartiles over the rounds, what of a step is spent in Lightning's hooks of the callback (a part of
its cost: some works in hooks of torch too), its event, and all that it does once before the first step, each in steps
of the bare fit. What the file has already is not measured again, but
what failed is. `--table` prints what the file has.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from circumstances import circumstances, installed, note, noted
from layout import markdown, middle
from overhead_ways import STEPS, WAYS
from steps_on_noise import Seconds, fitted
from torch import nn

HERE = Path(__file__).resolve().parent
MODELS = ("resnet18", "resnet50")

Row = dict[str, Any]


def measured(net: nn.Module, way: str, rounds: int) -> Row:
    """Measure one way; what goes wrong stands in its row."""
    given = WAYS[way]
    if given.peer is not None and installed(given.peer) is None:
        return {"skipped": f"{given.peer} is not installed"}
    try:
        return {"runs": list(_runs(net, way, rounds))}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _runs(net: nn.Module, way: str, rounds: int) -> Iterator[Seconds]:
    """Fit with and without in turns; the first fit warms up."""
    given = WAYS[way]

    def bare() -> float:
        return fitted(copy.deepcopy(net), given.optimizer, STEPS, lambda _: [])["step"]

    bare()
    before = bare()
    for _ in range(rounds):
        found = fitted(copy.deepcopy(net), given.optimizer, STEPS, given.callbacks, given.event)
        after = bare()
        yield {**found, "bare": (before + after) / 2}
        before = after


def ratios(row: Row, figure: str = "step") -> list[float]:
    """A figure in steps of the bare fit, in each round; none where it is not known."""
    return [run[figure] / run["bare"] for run in row.get("runs", ()) if figure in run]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, and which aims are reached."""
    header = ["callback", "step, ratio", "in its hooks, %", "event, in steps", "before the first step, in steps", "aim"]
    said = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of = {row["way"]: row for row in rows if row["model"] == model}
        bare = [run["bare"] * 1e3 for row in of.values() for run in row.get("runs", ())]
        lines = [_line(way, of[way]) for way in WAYS if way in of]
        said.append(f"{model}, ms of a bare step {middle(bare, '.0f')}:\n\n{markdown(header, lines)}")
    return "\n\n".join([*said, _aims(rows)])


def _line(way: str, row: Row) -> list[str]:
    if "runs" not in row:
        return [way, row.get("skipped") or f"fails: {row['error']}", *[""] * 4]
    hooks = middle([100 * share for share in ratios(row, "hooks")])
    aim = WAYS[way].aim
    event = middle(ratios(row, "event"))
    return [way, middle(ratios(row), ".3f"), hooks, event, middle(ratios(row, "before")), f"{aim}" if aim else ""]


def _aims(rows: Sequence[Row]) -> str:
    aimed = [(row, aim) for row in rows if "runs" in row and (aim := WAYS[row["way"]].aim) is not None]
    missed = [
        f"{row['way']} on {row['model']} ({median(ratios(row)):.3f})" for row, aim in aimed if median(ratios(row)) > aim
    ]
    told = f"At most the aim in {len(aimed) - len(missed)} of {len(aimed)} rows that have one"
    return f"{told}; above it: {', '.join(missed)}." if missed else f"{told}."


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="model", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", metavar="NAME", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path, default=HERE / "overhead.jsonl")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if not given.table:
        done = {(row["model"], row["way"]) for row in noted(given.out) if "error" not in row}
        for model in given.models:
            torch.manual_seed(0)
            net = torchvision.models.get_model(model, weights=None)
            for way in given.ways:
                if (model, way) not in done:
                    row = {"model": model, "way": way, **measured(net, way, given.rounds)}
                    note(given.out, {**row, **circumstances()})
                    print(model, way, row.get("error", ""), flush=True)
    print(table(noted(given.out)))


if __name__ == "__main__":
    main()
