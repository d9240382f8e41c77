"""Every classifier of torchvision, and the smallest of each timm family: proven, cut, and timed beside the peers.

    python benchmarks/zoo.py [--only torchvision] [--match 'vit*'] [--workers 2] [--peers] [--out zoo.json] [--resume]

Each model runs in a process of its own, and each of its results is written as it comes: a crash, a time-out or a lack
of memory costs one figure of one model. What is measured stands in zoo_one.py, the models stand in zoo.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path
from statistics import median

import zoo_one
from apart import sent
from rich.console import Console
from rich.table import Table
from zoo_models import Choice, choices
from zoo_one import Result

PRELOADED = ["torch", "torchvision", "timm", "torch_pruning", "lightning_prune"]
"""Imported once, in the server that the processes of the models are forked from."""

BIG = 150
"""Models with more millions of parameters run one at a time."""

LEAST_MACS, MOST_WANTING = 0.25, 0.1


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("torchvision", "timm"))
    parser.add_argument("--match", default="*", help="a pattern of names or families of models")
    parser.add_argument("--workers", type=int, default=2, help="models at a time, each on one core")
    parser.add_argument("--peers", action="store_true", help="time Torch-Pruning and torch-kirigami too")
    parser.add_argument("--seconds", type=float, default=1800, help="of wall-clock time that a model may take")
    parser.add_argument("--memory", type=float, default=20, help="GiB that a model may take")
    parser.add_argument("--out", type=Path, default=Path("zoo.json"))
    parser.add_argument("--resume", action="store_true", help="keep what stands in --out and run the rest")
    given = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the server, which imports torch
    results: dict[str, Result] = json.loads(given.out.read_text()) if given.resume and given.out.exists() else {}
    todo = [
        choice
        for choice in choices()
        if choice.library == (given.only or choice.library)
        and (fnmatch(choice.name, given.match) or fnmatch(choice.family, given.match))
        and str(choice) not in results
    ]
    console = Console(width=None if sys.stdout.isatty() else 200)
    for choice, result in run_all(todo, given.workers, (given.memory, given.peers), given.seconds):
        results[str(choice)] = result
        given.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
        console.print(f"{len(results):4} {choice!s:45} {'; '.join(failures(result)) or 'passes'}", soft_wrap=True)
    console.print(table(results), summary(results), soft_wrap=True)


def run_all(
    todo: Sequence[Choice], workers: int, limits: tuple[float, bool], seconds: float
) -> Iterator[tuple[Choice, Result]]:
    """Yield results as they come: small models side by side, big ones one at a time."""
    big = [choice for choice in todo if choice.millions > BIG]
    for several, part in ((workers, [choice for choice in todo if choice not in big]), (1, big)):
        with ThreadPoolExecutor(several) as pool:
            running = {pool.submit(run_one, choice, limits, seconds): choice for choice in part}
            yield from ((running[done], done.result()) for done in as_completed(running))


def run_one(choice: Choice, limits: tuple[float, bool], seconds: float) -> Result:
    """Measure one model in a process of its own, and keep what came before it broke off."""
    found, stopped = sent(zoo_one.work, (choice, *limits), seconds, PRELOADED)
    return {**vars(choice), **found, "stopped": stopped}


def failures(result: Result) -> list[str]:
    """Tell in words where a model falls short of what this library promises."""
    proof, cut, frozen = (result.get(piece, {}) for piece in ("proof", "cut", "frozen"))
    wanting = "; ".join(f"{share:.0%} {reason}" for reason, share in frozen.get("reasons", {}).items())
    checks = [
        ("groups", proof, lambda: not proof["finite"], "the proof says nothing: its outputs are not finite"),
        ("groups", proof, lambda: proof["spread"] < zoo_one.TOLERANCE, "the proof says nothing: a constant output"),
        ("groups", proof, lambda: not proof["sensitive"], "the proof says nothing: it feels no sabotage"),
        ("groups", proof, lambda: not proof["error"] <= zoo_one.TOLERANCE, f"WRONG: error {proof.get('error')}"),
        ("macs", cut, lambda: cut["macs"] < LEAST_MACS, f"only {cut.get('macs', 0):.1%} of the MACs removed"),
        ("wanting", frozen, lambda: frozen["wanting"] > MOST_WANTING, f"handlers are wanting: {wanting}"),
    ]
    found = [
        f"{piece}: {result[piece]['failed']}"
        for piece in ("frozen", "proof", "cut")
        if "failed" in result.get(piece, {})
    ]
    found += [text for key, piece, wrong, text in checks if key in piece and wrong()]
    return found + ([result["stopped"]] if result["stopped"] else [])


COLUMNS: dict[str, Callable[[Result], str]] = {
    "model": lambda one: f"{one['library']}/{one['name']}",
    "M": lambda one: f"{one['millions']:.1f}",
    "px": lambda one: str(one["pixels"]),
    "error": lambda one: f"{one['proof']['error']:.0e}",
    "felt": lambda one: f"{one['proof']['sensitive']:.0%}",
    "-MACs": lambda one: f"{one['cut']['macs']:.0%}",
    "-params": lambda one: f"{one['cut']['params']:.0%}",
    "wanting": lambda one: f"{one['frozen']['wanting']:.0%}",
    "MiB": lambda one: f"{one['memory']['mebibytes']:.0f}",
    "find": lambda one: f"{one['time']['find']:.2f}",
    "plan": lambda one: f"{one['time']['plan']:.2f}",
    "cut": lambda one: f"{one['time']['cut']:.2f}",
    "prune": lambda one: f"{one['time']['prune']:.2f}",
    "TP": lambda one: f"{one['torch_pruning']['sum']:.2f}{'' if one['torch_pruning']['runs'] else ' broken'}",
    "ratio": lambda one: f"{ratio(one, 'torch_pruning'):.2f}",
    "kirigami": lambda one: f"{one['kirigami']['sum']:.1f}{'' if one['kirigami']['runs'] else ' broken'}",
}


def ratio(result: Result, peer: str) -> float:
    """Return our seconds for reading, planning and cutting, over those of a peer."""
    return float(result["time"]["sum"] / result[peer]["sum"])


def table(results: Mapping[str, Result]) -> Table:
    """Lay out all figures, one model a row; a figure that could not be had is an X."""
    found = Table(caption="find, plan, cut, prune, TP (Torch-Pruning) and kirigami in seconds of one core")
    for column in COLUMNS:
        found.add_column(column, no_wrap=True, justify="left" if column == "model" else "right")
    for result in results.values():
        found.add_row(*(cell(column, result) for column in COLUMNS.values()))
    return found


def cell(column: Callable[[Result], str], result: Result) -> str:
    """Return a figure; X where the measurement failed, nothing where it was not made."""
    try:
        return column(result)
    except KeyError as missing:
        return "" if missing.args[0] in ("torch_pruning", "kirigami") else "X"


def summary(results: Mapping[str, Result]) -> str:
    """Tell the shares that pass, the ratios to the peers, and every failure by name."""
    lines = []
    for library in ("torchvision", "timm"):
        own = [result for result in results.values() if result["library"] == library]
        if own:
            lines += [f"\n{library}: {len(own)} models", *shares(own)]
    for peer in ("torch_pruning", "kirigami"):
        compared = [result for result in results.values() if peer in result]
        lines += against(peer, compared) if compared else ()
    lines.append("\nFailures")
    lines += [f"  {name}: {reason}" for name, result in results.items() for reason in failures(result)] or ["  none"]
    return "\n".join(lines)


def shares(results: Sequence[Result]) -> Iterator[str]:
    """Yield the share of models that keep each promise."""
    promises: dict[str, Callable[[Result], bool]] = {
        f"proven to {zoo_one.TOLERANCE:.0e}": lambda one: one["proof"]["error"] <= zoo_one.TOLERANCE,
        "cut, and trained on": lambda one: "macs" in one["cut"],
        f"at least {LEAST_MACS:.0%} of the MACs removed": lambda one: one["cut"]["macs"] >= LEAST_MACS,
        f"at most {MOST_WANTING:.0%} frozen for want of a handler": lambda one: (
            one["frozen"]["wanting"] <= MOST_WANTING
        ),
        "all of it": lambda one: not failures(one),
    }
    for promise, kept in promises.items():
        count = sum(holds(kept, result) for result in results)
        yield f"  {promise:45} {count / len(results):7.1%}  ({count} of {len(results)})"


def holds(kept: Callable[[Result], bool], result: Result) -> bool:
    """Tell whether a promise is kept; a figure that is missing keeps none."""
    try:
        return kept(result)
    except KeyError:
        return False


def against(peer: str, results: Sequence[Result]) -> Iterator[str]:
    """Yield how we compare with a peer, and on what it fails."""
    ratios = {
        f"{one['library']}/{one['name']}": ratio(one, peer)
        for one in results
        if "sum" in one[peer] and "sum" in one.get("time", {})
    }
    yield f"\n{peer}: ours over theirs, in seconds of one core ({len(ratios)} of {len(results)} models compare)"
    if ratios:
        worst = max(ratios, key=ratios.__getitem__)
        above = sum(one > 1 for one in ratios.values())
        yield f"  median {median(ratios.values()):.2f}, most {ratios[worst]:.2f} ({worst}), above 1: {above}"
    for one in results:
        if "failed" in one[peer] or not one[peer]["runs"]:
            reason = one[peer].get("failed", "what it has cut does not run, or returns other shapes")
            yield f"  fails on {one['library']}/{one['name']}: {reason}"


if __name__ == "__main__":
    main()
