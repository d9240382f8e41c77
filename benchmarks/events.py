"""What a prune event costs in the middle of a fit: score, plan, cut and optimizer, beside Torch-Pruning's.

    python benchmarks/events.py [model ...] [--repeats 5] [--limit 120] [--out events.jsonl] [--table]

Half of the channels of every layer but the last goes in two events, 25 % each, by magnitude, on one thread. Ours is all
that `MagnitudePruneCallback` does at an event of a fit with SGD and momentum: it reads the model anew, scores, plans,
verifies, absorbs, cuts, and slices the optimizer's state. Torch-Pruning's first event builds its dependency graph,
steps and makes a new optimizer, whose state is lost; its following event, with the same pruner, steps and makes
another one. What it is told of a model's attention heads and sizes is what its examples tell it. What our callback does
once before the first step, the rehearsal, is timed too, and not counted.

All ways run in turns in one process, on copies of one model. Seconds are the least of the repeats, ratios the median of
those within a repeat. A child process tries Torch-Pruning out first: where it fails, or has not ended after `--limit`
seconds, the row says so. Models that the file has already are not measured again. `--table` prints what the file has.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from apart import ChildError, printed
from circumstances import circumstances, installed, note, noted
from events_one import EVENTS
from layout import markdown

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "events_one.py"
MODELS = (
    *("resnet18", "resnet50", "vgg16_bn", "densenet121", "mobilenet_v2"),
    *("convnext_tiny", "vit_b_16", "swin_t"),
)
TARGET = 0.5
"""At most this part of Torch-Pruning's time, in the median over the models."""

Row = dict[str, Any]


def measured(name: str, repeats: int, limit: float) -> Row:
    """Measure one model; what goes wrong stands in its row."""
    row: Row = {"model": name}
    ways = ["ours", "drop"]
    if installed("torch-pruning") is None:
        row["skipped"] = "torch-pruning is not installed"
    else:
        try:
            printed(SCRIPT, [name, "--repeats", "1", "--ways", "peer"], limit)
            ways.append("peer")
        except ChildError as error:
            row["peer"] = str(error)
    try:
        row["runs"] = printed(SCRIPT, [name, "--repeats", str(repeats), "--ways", *ways])
    except ChildError as error:
        row["error"] = str(error)
    return row


def least(runs: Iterable[Mapping[str, float]], events: Iterable[str], without: str = "") -> float:
    """Return the least seconds of some events together; without those of one of their parts, if that is named."""
    return min(_sum(run, events, without) for run in runs)


def ratio(row: Row, way: str, events: Iterable[str], without: str = "") -> float | None:
    """Return the median over the repeats of what a way takes in parts of Torch-Pruning; None where one has failed."""
    pairs = zip(row.get("runs", {}).get(way, ()), row.get("runs", {}).get("peer", ()), strict=False)
    found = [_sum(own, events, without) / _sum(other, events) for own, other in pairs]
    return median(found) if found else None


def _sum(run: Mapping[str, float], events: Iterable[str], without: str = "") -> float:
    return sum(run[event] - (run[f"{event}, {without}"] if without else 0.0) for event in events)


def _line(row: Row) -> list[str]:
    """Return the cells of a model."""
    if "error" in row:
        return [row["model"], f"fails: {row['error']}", *[""] * 8]
    runs = row["runs"]
    said = row.get("skipped") or row.get("peer", "")
    cells = [row["model"]]
    for event in EVENTS:
        theirs = f"{least(runs['peer'], [event]) * 1e3:.0f}" if "peer" in runs else said
        cells += [f"{least(runs['ours'], [event]) * 1e3:.0f}", theirs, _told(ratio(row, "ours", [event]))]
    cells += [
        _told(ratio(row, "ours", EVENTS)),
        _told(ratio(row, "ours", EVENTS, "verification")),
        _told(ratio(row, "drop", EVENTS)),
    ]
    return cells


def _told(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown, and the medians against what is aimed at."""
    header = [
        *("model", "first event, ms", "Torch-Pruning", "ratio", "following event, ms", "Torch-Pruning", "ratio"),
        *("both, ratio", "without verification", "constants dropped"),
    ]
    said = [markdown(header, [_line(row) for row in rows])]
    for what, events in {**{f"the {event} event": [event] for event in EVENTS}, "both": list(EVENTS)}.items():
        ratios = [found for row in rows if (found := ratio(row, "ours", events)) is not None]
        if ratios:
            met = "met" if median(ratios) <= TARGET else "missed"
            said.append(
                f"{what}: median ratio {median(ratios):.2f} over {len(ratios)} models, largest {max(ratios):.2f}; at "
                f"most {TARGET} is aimed at: {met}"
            )
    failures = [f"Torch-Pruning, {row['model']}: {row['peer']}" for row in rows if "peer" in row]
    return "\n\n".join([*said, *failures])


def main() -> None:
    """Measure what is missing, row by row, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=120)
    parser.add_argument("--out", type=Path, default=HERE / "events.jsonl")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.table:
        measure(given)
    print(table(noted(given.out)))


def measure(given: argparse.Namespace) -> None:
    """Measure the models that the file does not have yet."""
    known = {row["model"] for row in noted(given.out)}
    for name in given.models:
        if name not in known:
            row = measured(name, given.repeats, given.limit)
            note(given.out, {**row, **circumstances()})
            print(*_line(row), flush=True)


if __name__ == "__main__":
    main()
