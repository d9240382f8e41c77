"""Finding the runs below some folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_prune.errors import ReportError
from lightning_prune.sweeps.runs import Broken, Run, Sweep
from lightning_prune.sweeps.summaries import read_run

_HOW = "Give the folder of a sweep, such as multirun/2026-01-31/12-00-00, or of a run, such as outputs/..."


def read_runs(folders: Iterable[str | Path]) -> Sweep:
    """Read all that runs have left in some folders and below them.

    A run that failed, was killed, or left a file that cannot be read is told among the broken and stops nothing.

    Args:
        folders: Of sweeps or of runs; a run that lies in two of them is read once.

    Raises:
        ReportError: A folder is none, or no run lies in any of them.
    """
    given = [Path(folder) for folder in folders]
    for folder in given:
        if not folder.is_dir():
            raise ReportError(f"{str(folder)!r} is no folder. {_HOW}")
    closed: list[Broken] = []
    found = sorted({path for folder in given for path in _below(folder.resolve(), closed)})
    if not found and not closed:
        where = ", ".join(repr(str(folder)) for folder in given) or "no folder"
        raise ReportError(f"No run has left anything in {where}: no summary.json, failure.json or .hydra/. {_HOW}")
    root = _common([folder.resolve() for folder in given])
    read = [read_run(path, _name(path, root)) for path in found]
    broken = [*closed, *(each for each in read if isinstance(each, Broken))]
    return Sweep(root, tuple(each for each in read if isinstance(each, Run)), tuple(broken))


def _below(folder: Path, closed: list[Broken]) -> list[Path]:
    """Return the folders of runs below a folder; those that may not be opened are told in `closed`."""

    def tell(error: OSError) -> None:
        closed.append(Broken(str(error.filename), "unreadable", f"{error.strerror}: make the folder readable."))

    runs = []
    for path, inner, files in os.walk(folder, onerror=tell):
        if "summary.json" in files or "failure.json" in files or (".hydra" in inner and _experiment(Path(path))):
            runs.append(Path(path))
        inner[:] = [name for name in inner if not name.startswith(".")]
    return runs


def _experiment(folder: Path) -> bool:
    """Whether Hydra ran an experiment here: a scan of sensitivity leaves no summary and misses none."""
    try:
        noted = (folder / ".hydra" / "hydra.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return True
    name = re.search(r"^\s+config_name: (\S+)$", noted, re.MULTILINE)
    return name is None or name[1] == "config"


def _common(folders: Sequence[Path]) -> Path:
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:  # on Windows, folders on several drives have nothing in common
        return Path()


def _name(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    return path.name if name == "." else name
