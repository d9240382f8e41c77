"""Writing the report of a sweep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning_prune.errors import ReportError
from lightning_prune.sweeps.finding import read_runs
from lightning_prune.sweeps.groups import seed_groups
from lightning_prune.sweeps.page import render
from lightning_prune.sweeps.runs import Sweep
from lightning_prune.sweeps.tables import to_csv, to_json


@dataclass(frozen=True)
class Report:
    """What was written, and on what.

    Attributes:
        page: One file that needs no network.
        csv: A row for each run.
        json: Everything.
        sweep: What was read.
    """

    page: Path
    csv: Path
    json: Path
    sweep: Sweep


def write_report(folders: Iterable[str | Path], out: str | Path) -> Report:
    """Read what runs have left and write a page about it, with its data beside it.

    Args:
        folders: Of sweeps or runs; they are searched to any depth.
        out: The folder of the report. It is made; a report that lies there is replaced.

    Returns:
        Where index.html, runs.csv and runs.json lie, and what they tell of.

    Raises:
        ReportError: There is no run in the folders, plotly or jinja2 is not installed, or `out` cannot be written.
    """
    sweep, folder = read_runs(folders), Path(out)
    groups = seed_groups(sweep.runs)
    texts = {
        "index.html": render(sweep, groups),
        "runs.csv": to_csv(sweep),
        "runs.json": to_json(sweep, groups),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    except OSError as error:
        reason = error.strerror
        raise ReportError(
            f"The report cannot be written to {str(folder)!r} ({reason}). Name another folder."
        ) from error
    return Report(folder / "index.html", folder / "runs.csv", folder / "runs.json", sweep)
