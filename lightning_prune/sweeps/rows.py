"""The table of the page: a row for each configuration, and below it one for each of its seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_prune.sweeps.figures import costs, describe, fronts
from lightning_prune.sweeps.groups import SeedGroup, varying
from lightning_prune.sweeps.runs import Pair, Run
from lightning_prune.sweeps.wording import accuracy_spread, cost_heading, cost_name, cost_spread, short


@dataclass(frozen=True)
class Cell:
    """One cell: what is shown, a smaller addition, and what it is sorted by."""

    text: str
    more: str = ""
    sort: float | str = ""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Its heading.
        full: What it says in full.
        figure: Whether it holds numbers that were measured; a setting otherwise.
        rising: Whether the small values are the better ones, and come first.
    """

    name: str
    full: str
    figure: bool = False
    rising: bool = True


@dataclass(frozen=True)
class RunRow:
    """A run in the table."""

    id: str
    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class GroupRow:
    """A configuration in the table, over its seeds."""

    id: str
    label: str
    cells: tuple[Cell, ...]
    runs: tuple[RunRow, ...]
    settings: dict[str, str]
    search: str
    front: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """All of it; `facets` are settings with few values, to choose from."""

    columns: tuple[Column, ...]
    rows: tuple[GroupRow, ...]
    facets: dict[str, tuple[str, ...]]


_MOST_VALUES = 12


def table(groups: Sequence[SeedGroup]) -> Table:
    """Build the table of some groups, the most accurate first."""
    names, prices, front = varying(groups), costs(groups), fronts(groups)
    masked = any(run.sparsity is not None for group in groups for run in group.runs)
    twins = any(run.dense_accuracy is not None for group in groups for run in group.runs)
    columns = [
        *(Column(_heading(name, names), name) for name in names),
        Column("accuracy, %", "test accuracy, and its sample standard deviation over seeds", True, False),
        *([Column("against dense", "points of accuracy above the dense twin's", True, False)] if twins else []),
        *(Column(cost_heading(price), cost_name(price), True) for price in prices),
        *([Column("zeros", "share of zeros in masked weights", True, False)] if masked else []),
    ]
    rows = [_row(group, names, prices, (twins, masked), front[group.id]) for group in groups]
    place = len(names)
    rows.sort(key=lambda row: -float(row.cells[place].sort))
    return Table(tuple(columns), tuple(rows), _facets(groups, names))


def run_title(run: Run, names: Sequence[str]) -> str:
    """Name a run by what tells it from the others."""
    seed = "" if run.seed is None else f"seed {run.seed}"
    return ", ".join(filter(None, [describe(run.settings, names), seed])) or run.name


def _heading(name: str, names: Sequence[str]) -> str:
    """Return the last part of a setting's name where it is the only one to end so."""
    last = name.rpartition(".")[2]
    return last if [each.rpartition(".")[2] for each in names].count(last) == 1 else name


def _row(
    group: SeedGroup, names: Sequence[str], prices: Sequence[str], also: tuple[bool, bool], front: tuple[str, ...]
) -> GroupRow:
    settings = tuple(_setting(group.settings.get(name)) for name in names)
    runs = tuple(
        RunRow(
            run.id,
            run.name if run.seed is None else f"seed {run.seed}",
            (*settings, *_figures(SeedGroup((run,), group.settings), prices, also)),
        )
        for run in group.runs
    )
    given = [f"{name}={value}" for name, value in group.settings.items()]
    return GroupRow(
        group.id,
        _label(group),
        (*settings, *_figures(group, prices, also)),
        runs,
        {name: group.settings.get(name, "") for name in names},
        " ".join([*given, *(run.name for run in group.runs)]).lower(),
        front,
    )


def _label(group: SeedGroup) -> str:
    runs, seeds = len(group.runs), group.seeds
    if runs == seeds:
        return f"{seeds} seeds"
    return f"{runs} runs, {seeds} seed{'' if seeds == 1 else 's'}"


def _setting(value: str | None) -> Cell:
    return Cell("–", sort="") if value is None else Cell(short(value), sort=value)  # noqa: RUF001


def _figures(group: SeedGroup, prices: Sequence[str], also: tuple[bool, bool]) -> tuple[Cell, ...]:
    twins, masked = also
    return (
        _shares(group, lambda run: run.accuracy),
        *([_against(group)] if twins else []),
        *(_price(group, name) for name in prices),
        *([_shares(group, lambda run: run.sparsity)] if masked else []),
    )


def _shares(group: SeedGroup, figure: Callable[[Run], float | None]) -> Cell:
    found = group.spread(figure)
    return Cell("") if found is None else Cell(accuracy_spread(found).removesuffix(" %"), sort=found.mean)


def _against(group: SeedGroup) -> Cell:
    found = group.spread(lambda run: None if run.dense_accuracy is None else run.accuracy - run.dense_accuracy)
    if found is None:
        return Cell("")
    spread = "" if found.std is None else f" ± {100 * found.std:.2f}"
    return Cell(f"{100 * found.mean:+.2f}{spread}".replace("-", "−"), sort=found.mean)  # noqa: RUF001


def _price(group: SeedGroup, name: str) -> Cell:
    found = group.cost(name)
    if found is None:
        return Cell("")
    left = group.spread(lambda run: _left(run.costs.get(name)))
    return Cell(cost_spread(name, found), "" if left is None else f"{100 * left.mean:.0f} %", found.mean)


def _left(pair: Pair | None) -> float | None:
    return pair.pruned / pair.dense if pair is not None and pair.dense else None


def _facets(groups: Sequence[SeedGroup], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    values = {name: {group.settings.get(name, "") for group in groups} for name in names}
    return {name: tuple(sorted(found)) for name, found in values.items() if len(found) <= _MOST_VALUES}
