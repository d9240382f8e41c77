"""What a sensitivity scan found: how a metric falls as each layer alone is pruned, and how much each layer bears."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from io import StringIO
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lightning_prune.errors import PruningError
from lightning_prune.records import each_in, number_in, of_type
from lightning_prune.report import count
from lightning_prune.sensitivity.heatmap import heat_map
from lightning_prune.sensitivity.measures import Better

Scanned: TypeAlias = Literal["weights", "channels"]
"""What a scan prunes: the weights of a layer, or the channels of a group."""

Value: TypeAlias = float | None
"""A measured number; None where none was measured, or it was not finite."""


@dataclass(frozen=True)
class Row:
    """What a scan measured of one layer, or group.

    Attributes:
        layer: Its name; "" is the model itself.
        size: Its weights, or channels.
        values: Name of a metric -> its value at each ratio.
    """

    layer: str
    size: int
    values: Mapping[str, tuple[Value, ...]]


@dataclass(frozen=True)
class Sensitivity:
    """How a metric falls as each layer alone is pruned, without retraining.

    Attributes:
        of: What was pruned: the "weights" of layers, or the "channels" of groups.
        ratios: The fractions that were pruned, rising, between 0 and 1.
        dense: Name of a metric -> its value for the model as it was; the first one is the main one.
        better: Name of a metric -> whether "higher" or "lower" is better.
        rows: What was measured of each layer, in the order of the model.
        held_back: Layer -> in words why nothing of it, or less, was pruned.

    Raises:
        ValueError: The parts do not fit each other.
    """

    of: Scanned
    ratios: tuple[float, ...]
    dense: Mapping[str, float]
    better: Mapping[str, Better]
    rows: tuple[Row, ...]
    held_back: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_scanned(self.of)
        grid_of(self.ratios)
        if not self.dense or self.dense.keys() != self.better.keys() or not set(self.better.values()) <= _WAYS:
            raise ValueError(f"`better` says of each of {list(self.dense)} its way; got {dict(self.better)}.")
        for row in self.rows:
            if row.values.keys() != self.dense.keys() or {*map(len, row.values.values())} != {len(self.ratios)}:
                raise ValueError(f"The row {row.layer!r} has not a value of each metric at each of {self.ratios}.")

    def thresholds(self, drop: float = 0.01, metric: str | None = None) -> dict[str, float]:
        """Choose for each layer the largest ratio up to which a metric stays within a drop.

        Between two ratios of the grid the metric is taken to fall evenly, and from the dense model to the first ratio
        too; the last ratio is the most that is chosen. Han et al. 2015 ("Learning both Weights and Connections",
        section 4.1) chose theirs from such a scan: the smallest for the most sensitive layer.

        Args:
            drop: How much worse than the dense model the metric may be, in its own units, 0 or more.
            metric: Its name; None takes the main one.

        Returns:
            Pattern that matches the layer alone -> ratio in [0, 1), which `PerLayer` takes where weights were pruned. A
            layer of which nothing was measured is not in it.

        Raises:
            ValueError: `drop` is negative, or the metric was not measured.

        Example:
            >>> row = Row("fc1", 100, {"accuracy": (0.9, 0.88, 0.5)})
            >>> scan = Sensitivity("weights", (0.2, 0.4, 0.6), {"accuracy": 0.9}, {"accuracy": "higher"}, (row,))
            >>> scan.thresholds(drop=0.01)
            {'fc1': 0.3}
        """
        if not (isfinite(drop) and drop >= 0):
            raise ValueError(f"`drop` is how much worse the metric may get, 0 or more; got {drop}.")
        return {_pattern(row.layer): self._borne(row, drop, self._chosen(metric)) for row in self.rows}

    def table(self, drop: float = 0.01, metric: str | None = None) -> Table:
        """Tell a metric, a line for each layer: its value at each ratio, and the ratio that stays within a drop."""
        name = self._chosen(metric)
        table = Table(title=self._title(name), caption_justify="left", box=SIMPLE, padding=0)
        table.add_column("layer", overflow="fold")
        for column in ("size", *map(_percent, self.ratios), f"within\n{drop:g}"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            borne = f"{self._borne(row, drop, name):.1%}"
            table.add_row(row.layer or "(model)", count(row.size), *map(_short, row.values[name]), borne)
        table.caption = "\n".join(f"{layer}: {reason}" for layer, reason in self.held_back.items()) or None
        return table

    def picture(self, metric: str | None = None) -> Image.Image:
        """Draw a metric as a heat map, layers by ratios, from white (as dense, or better) to dark red (worst of all).

        Returns:
            An RGB picture; `picture().save("sensitivity.png")` writes it.
        """
        name = self._chosen(metric)
        drops = [self._drops(row, name) for row in self.rows]
        worst = max((drop for line in drops for drop in line if drop is not None and drop > 0), default=1.0)
        return heat_map(
            self._title(name),
            [row.layer or "(model)" for row in self.rows],
            [_percent(ratio) for ratio in self.ratios],
            [[_short(value) for value in row.values[name]] for row in self.rows],
            [[None if drop is None else drop / worst for drop in line] for line in drops],
            ("as dense, or better", f"worse by {_short(worst)}"),
        )

    def to_json(self) -> str:
        """Return all of it as JSON, which `from_json` reads."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """Read what `to_json` has made; every part is looked at.

        Raises:
            PruningError: It is something else.
        """
        try:
            return _read(json.loads(text, object_pairs_hook=_once_each))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise PruningError(
                f"This is no sensitivity scan ({type(error).__name__}: {str(error)[:200]}). Read what "
                "`Sensitivity.save` has written, or scan again."
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; the file appears whole or not at all.

        Args:
            path: Where to; `load` reads it.
        """
        target = Path(path)
        unfinished = target.with_name(f"{target.name}.unfinished")
        try:
            unfinished.write_text(self.to_json(), encoding="utf-8")
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read what `save` has written.

        Raises:
            PruningError: It is something else.
        """
        try:
            return cls.from_json(Path(path).read_bytes().decode("utf-8"))
        except (PruningError, UnicodeDecodeError) as error:
            raise PruningError(f"{path}: {error}") from error

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=max(100, 30 + 8 * len(self.ratios)))
        with console.capture() as shown:
            console.print(self.table())
        return shown.get()

    def _chosen(self, metric: str | None) -> str:
        name = next(iter(self.dense)) if metric is None else metric
        if name not in self.dense:
            raise ValueError(f"`metric` is one that was measured, {', '.join(self.dense)}; got {metric!r}.")
        return name

    def _title(self, metric: str) -> str:
        return f"{metric} as one layer alone loses {self.of}; dense {_short(self.dense[metric])}"

    def _drops(self, row: Row, metric: str) -> list[Value]:
        """Return how much worse than dense a metric is at each ratio."""
        sign = 1 if self.better[metric] == "higher" else -1
        return [None if value is None else sign * (self.dense[metric] - value) for value in row.values[metric]]

    def _borne(self, row: Row, drop: float, metric: str) -> float:
        """Return the ratio at which a metric first leaves what is allowed."""
        points = [(0.0, 0.0), *zip(self.ratios, self._drops(row, metric), strict=True)]
        for (low, before), (high, after) in pairwise(points):
            if after is None:
                return low
            if after > drop:
                assert before is not None
                return low + (high - low) * (drop - before) / (after - before)
        return self.ratios[-1]


_WAYS = {*get_args(Better)}


def check_scanned(of: object) -> None:
    """See that it can be scanned.

    Raises:
        ValueError: It is neither "weights" nor "channels".
    """
    if of not in get_args(Scanned):
        raise ValueError(f'`of` is what is pruned, "weights" or "channels"; got {of!r}.')


def grid_of(ratios: object) -> tuple[float, ...]:
    """See that ratios make a grid.

    Raises:
        ValueError: There are none, one is no number between 0 and 1, or they do not rise.
    """
    found = tuple(ratios) if isinstance(ratios, Iterable) else ()
    inside = all(isinstance(ratio, (int, float)) and 0 < ratio < 1 for ratio in found)
    if not found or not inside or any(low >= high for low, high in pairwise(found)):
        raise ValueError(
            "`ratios` are the fractions to prune, one or more, rising, above 0 (the dense model is measured anyway) "
            f"and below 1; got {ratios!r}. Try (0.3, 0.5, 0.7, 0.9)."
        )
    return tuple(map(float, found))


def _pattern(layer: str) -> str:
    """Return the `fnmatch` pattern that matches a name alone."""
    return re.sub(r"([*?[])", r"[\1]", layer)


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.3g}%"


def _short(value: Value) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) >= 1 else f"{value:.3f}"


def _read(plain: Any) -> Sensitivity:
    names = {"of", "ratios", "dense", "better", "rows", "held_back"}
    if of_type(dict, plain).keys() != names:
        raise KeyError(f"{sorted(plain.keys() ^ names)} missing or foreign")
    rows = tuple(_row(row) for row in of_type(list, plain["rows"]))
    if len({row.layer for row in rows}) != len(rows):
        raise ValueError("a layer stands there twice")
    return Sensitivity(
        plain["of"],
        tuple(number_in(ratio) for ratio in of_type(list, plain["ratios"])),
        each_in(plain["dense"], number_in),
        each_in(plain["better"], lambda way: of_type(str, way)),  # type: ignore[arg-type]
        rows,
        each_in(plain["held_back"], lambda reason: of_type(str, reason)),
    )


def _row(plain: Any) -> Row:
    if of_type(dict, plain).keys() != {"layer", "size", "values"} or of_type(int, plain["size"]) < 1:
        raise ValueError(f"a row with {sorted(plain)}, or of no size")
    values = each_in(
        plain["values"],
        lambda line: tuple(None if value is None else number_in(value) for value in of_type(list, line)),
    )
    return Row(of_type(str, plain["layer"]), plain["size"], values)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)
