"""`lightning-prune report`: what the runs of a sweep have left, as one page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_prune.errors import ReportError
from lightning_prune.sweeps import Sweep, write_report


def report(arguments: Sequence[str] | None = None) -> None:
    """Write the page about some sweeps, and say where it lies; what is wrong is told in words, with exit code 2.

    Args:
        arguments: Of the command line; None reads those of the process.
    """
    given = _parser().parse_args(arguments)
    try:
        written = write_report(given.folders, given.out or given.folders[0] / "report")
    except ReportError as error:
        sys.stderr.write(f"lightning-prune report: {error}\n")
        sys.exit(2)
    sys.stdout.write(f"{_found(written.sweep)}\n{written.page}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-prune report",
        description="Write one page about all runs in some folders, and its data as CSV and JSON. It needs no network.",
    )
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="a folder of sweeps or runs, to any depth")
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="where to write; by default report/ in the first DIR"
    )
    return parser


def _found(sweep: Sweep) -> str:
    runs = len(sweep.runs)
    words = [f"{runs} run{'' if runs == 1 else 's'} finished"]
    for state in ("failed", "unfinished", "unreadable"):
        if number := sum(each.state == state for each in sweep.broken):
            words.append(f"{number} {state}")
    return ", ".join(words)
