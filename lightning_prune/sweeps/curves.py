"""How a run's figures went while it trained, from the metrics.csv of Lightning's CSVLogger."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from lightning_prune.sweeps.runs import Moment

FIGURES = ("train/acc", "val/acc", "train/loss", "val/loss")
"""What the page draws."""

_MOST = 300
"""So many points of a curve are kept; a page holds hundreds of curves."""

Point = TypeVar("Point")


def read_curves(path: Path) -> dict[str, tuple[Moment, ...]]:
    """Read the curves of a run; without the file there are none, and what is no number in it is left out."""
    curves: dict[str, list[Moment]] = defaultdict(list)
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                for figure, moment in _moments(row):
                    curves[figure].append(moment)
    except (OSError, ValueError, csv.Error):
        return {}
    return {figure: tuple(thin(curves[figure])) for figure in FIGURES if curves[figure]}


def thin(points: Sequence[Point], most: int = _MOST) -> list[Point]:
    """Return at most so many points, evenly spread, the first and the last among them.

    >>> len(thin(range(10_000))), thin(range(10_000))[-1]
    (300, 9999)
    """
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _moments(row: dict[str, str]) -> list[tuple[str, Moment]]:
    values = {name: _number(row.get(name)) for name in ("step", "epoch", *FIGURES)}
    step, epoch = values.pop("step"), values.pop("epoch")
    if step is None or epoch is None:
        return []
    return [(name, Moment(int(step), int(epoch), value)) for name, value in values.items() if value is not None]


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
