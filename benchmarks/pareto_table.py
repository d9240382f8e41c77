"""The tables of the Pareto benchmark, and what they come to: us against the best of each peer, cell by cell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot, sqrt
from statistics import mean, stdev

from layout import markdown
from pareto_ways import WAYS

Row = Mapping[str, object]
CLOSE = 0.02
"""So far from the fraction asked for, at most."""
FIGURES = ("accuracy", "removed", "params", "ms, batch 1", "ms, batch 64", "seconds", "MiB")


@dataclass
class Cell:
    """What one method came to at one task and target.

    Attributes:
        runs: The rows that were measured, by seed.
        said: What the others say: why they were skipped, how they failed.
    """

    runs: dict[int, Row] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def values(self, figure: str) -> list[float]:
        """A figure of all seeds."""
        return [float(str(run[figure])) for run in self.runs.values()]

    @property
    def mean(self) -> float:
        """The mean accuracy."""
        return mean(self.values("accuracy"))

    @property
    def error(self) -> float:
        """The standard error of the mean accuracy; nan from one seed."""
        values = self.values("accuracy")
        return stdev(values) / sqrt(len(values)) if len(values) > 1 else float("nan")


Cells = dict[tuple[str, float], dict[str, Cell]]


def cells_of(rows: Iterable[Row]) -> Cells:
    """All cells, task and target first; a later row of the same run replaces an earlier one."""
    last: dict[tuple[str, float, str, int], Row] = {}
    for row in rows:
        last[str(row["task"]), float(str(row["target"])), str(row["way"]), int(str(row["seed"]))] = row
    found: Cells = defaultdict(lambda: defaultdict(Cell))
    for (task, target, way, seed), row in last.items():
        cell = found[task, target][way]
        if said := row.get("failed") or row.get("skipped"):
            cell.said.append(f"seed {seed}: {said}" if "failed" in row else str(said))
        else:
            cell.runs[seed] = row
    return found


def table(rows: Sequence[Row]) -> str:
    """One table for each task, then what they come to."""
    cells = cells_of(rows)
    tasks = dict.fromkeys(task for task, _ in cells)
    seeds = sorted({seed for ways in cells.values() for cell in ways.values() for seed in cell.runs})
    parts = [
        _task(task, {target: ways for (name, target), ways in cells.items() if name == task}, seeds) for task in tasks
    ]
    minutes = sum(sum(cell.values("seconds")) for ways in cells.values() for cell in ways.values()) / 60
    return "\n\n".join([*parts, verdict(cells), f"All fits together took {minutes:.0f} CPU minutes."])


def _task(task: str, by_target: Mapping[float, Mapping[str, Cell]], seeds: Sequence[int]) -> str:
    header = ["method", "accuracy, %", "MACs gone, %", "k params", "ms, batch 1", "ms, batch 64", "CPU seconds", "MiB"]
    lines = [f"### {task}"]
    for target in sorted(by_target):
        ways = by_target[target]
        rows = [_line(way, ways[way], seeds) for way in ("dense", *WAYS) if way in ways]
        title = f"asked for {target:.0%} fewer MACs" if target else "before"
        lines += [f"**{title}**", markdown(header, rows)]
    return "\n\n".join(lines)


def _line(way: str, cell: Cell, seeds: Sequence[int]) -> list[str]:
    missing = [str(seed) for seed in seeds if seed not in cell.runs]
    if not cell.runs:
        return [way, "; ".join(dict.fromkeys(cell.said)), *[""] * 6]
    name = f"{way} (without seed {', '.join(missing)}: {'; '.join(cell.said) or 'not run'})" if missing else way
    scale: dict[str, Callable[[float], str]] = {
        "accuracy": "{:.2f}".format,
        "removed": lambda value: f"{100 * value:.1f}",
        "params": lambda value: f"{value / 1e3:.1f}",
        "ms, batch 1": "{:.2f}".format,
        "ms, batch 64": "{:.1f}".format,
        "seconds": "{:.1f}".format,
        "MiB": "{:.0f}".format,
    }
    figures = {figure: form(mean(cell.values(figure))) for figure, form in scale.items()}
    if len(cell.runs) > 1:
        figures["accuracy"] += f" ± {stdev(cell.values('accuracy')):.2f}"
    return [name, *figures.values()]


def verdict(cells: Cells) -> str:
    """Our best beside the best of each peer, and our default beside theirs, at each task and target."""
    best, defaults = [], []
    won = lost = compared = worse = beside = 0
    for (task, target), ways in sorted(cells.items()):
        if not target:
            continue
        libraries: dict[str, dict[str, Cell]] = defaultdict(dict)
        for way, cell in ways.items():
            if cell.runs and WAYS[way].cuts and way != "random":
                libraries[WAYS[way].library][way] = cell
        own = libraries.pop("ours", {})
        for theirs in libraries.values() if own else ():
            (name, one), (rival, other) = _best(own), _best(theirs)
            ahead, error = one.mean - other.mean, hypot(one.error, other.error)
            compared, won, lost = compared + 1, won + (ahead > error), lost + (ahead < -error)
            best.append([f"{task}, {target:.0%}", name, _told(one), rival, _told(other), f"{ahead:+.2f} ± {error:.2f}"])
            for usual, cell in own.items():
                for rivals, peer in theirs.items():
                    if WAYS[usual].default and WAYS[rivals].default:
                        ahead, error = cell.mean - peer.mean, hypot(cell.error, peer.error)
                        beside, worse = beside + 1, worse + (ahead < -error)
                        pair = [usual, _told(cell), rivals, _told(peer), f"{ahead:+.2f} ± {error:.2f}"]
                        defaults.append([f"{task}, {target:.0%}", *pair])
    header = ["task, fewer MACs", "ours", "accuracy", "peer", "accuracy", "ahead by"]
    told = [
        "### Our best beside each peer's best",
        "Means over the seeds, ± the standard error; the difference with the standard error of both.",
        markdown(header, best),
        f"Of {compared} comparisons, better by more than a standard error in {won}, worse by more than one in {lost}.",
        "### Defaults beside defaults",
        markdown(header, defaults),
        f"Of {beside} comparisons, worse by more than a standard error in {worse}.",
        "### MACs asked for and gone",
        _met(cells),
    ]
    return "\n\n".join(told)


def _met(cells: Cells) -> str:
    """How closely those that know what channels cost meet what is asked for; in means over the seeds."""
    beyond = {
        f"{way} on {task} at {target:.0%} ({100 * ahead:+.1f})": abs(ahead) > CLOSE
        for (task, target), ways in sorted(cells.items())
        for way, cell in ways.items()
        if target and cell.runs and WAYS[way].by_cost
        for ahead in [mean(cell.values("removed")) - target]
    }
    far = [told for told, is_far in beyond.items() if is_far]
    told = (
        f"Those that know what channels cost are within {100 * CLOSE:.0f} points of it in {len(beyond) - len(far)} of"
    )
    return f"{told} {len(beyond)} cells" + (f"; not {', '.join(far)}." if far else ".")


def _best(ways: Mapping[str, Cell]) -> tuple[str, Cell]:
    name = max(ways, key=lambda way: ways[way].mean)
    return name, ways[name]


def _told(cell: Cell) -> str:
    return f"{cell.mean:.2f} ± {cell.error:.2f}"
