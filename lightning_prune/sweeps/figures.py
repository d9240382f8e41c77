"""The picture of a sweep: accuracy against cost, a point for each network, and the Pareto front as a line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_prune.sweeps.front import pareto_front
from lightning_prune.sweeps.groups import SeedGroup, Spread, varying
from lightning_prune.sweeps.runs import Run
from lightning_prune.sweeps.wording import accuracy, accuracy_spread, cost, cost_name, plain, short

Figure = dict[str, Any]
"""What Plotly draws: {"data": traces, "layout": ...}. Colours of text and grid are the page's, light or dark."""

COLOURS = ("#3f7fd0", "#d9772b", "#2f9e77", "#a467c9", "#d2505f", "#2b9db3", "#a08a1f", "#cf6aa1")
"""Readable on white and on black."""

_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "pentagon", "hexagon", "star-triangle-up")
_GREY = "#8b919c"


@dataclass(frozen=True)
class Point:
    """A mark in the picture.

    Attributes:
        id: Of the run or the group of seeds that it stands for.
        method: It has the colour of its method.
        cost: Of the pruned network.
        accuracy: Likewise, in [0, 1].
        words: What is told when the pointer is over it; runs chose some of them, so they are escaped.
        spread: Of accuracy and cost over seeds; None of one run.
    """

    id: str
    method: str
    cost: float
    accuracy: float
    words: str
    spread: tuple[float, float] | None = None


def datasets(groups: Iterable[SeedGroup]) -> dict[str, tuple[SeedGroup, ...]]:
    """Return the groups by data set: accuracies on two of them are not compared."""
    found: dict[str, list[SeedGroup]] = {}
    for group in groups:
        found.setdefault(group.settings.get("data", ""), []).append(group)
    return {name: tuple(alike) for name, alike in found.items()}


def costs(groups: Iterable[SeedGroup]) -> tuple[str, ...]:
    """Return all costs that a run tells: MACs and parameters, then latencies."""
    return tuple(dict.fromkeys(name for group in groups for run in group.runs for name in run.costs))


def front_figure(groups: Sequence[SeedGroup], name: str, means: bool) -> Figure:
    """Draw the networks of one data set.

    Args:
        groups: They lie on one data set.
        name: The cost, as in `Run.costs`.
        means: Whether a point is the mean of its seeds instead of one run.
    """
    differ = varying(groups)
    pruned = [point for group in groups for point in _points(group, name, means, differ)]
    chosen = pareto_front([point.cost for point in pruned], [point.accuracy for point in pruned])
    methods = sorted({point.method for point in pruned})
    traces = [_line([pruned[i] for i in chosen])]
    if dense := _dense(groups, name):
        traces.append(_dense_marks(dense))
    for number, method in enumerate(methods):
        traces.append(_marks([point for point in pruned if point.method == method], method, number))
    return {"data": traces, "layout": _layout(name)}


def fronts(groups: Sequence[SeedGroup]) -> dict[str, tuple[str, ...]]:
    """Return for each group, by its id, the costs on whose front its mean is; each data set has its own fronts."""
    found: dict[str, tuple[str, ...]] = {group.id: () for group in groups}
    for alike in datasets(groups).values():
        for name in costs(alike):
            points = [point for group in alike for point in _points(group, name, True, ())]
            for i in pareto_front([point.cost for point in points], [point.accuracy for point in points]):
                found[points[i].id] += (name,)
    return found


def describe(settings: dict[str, str], differ: Sequence[str]) -> str:
    """Name a configuration by what tells it from the others."""
    return ", ".join(f"{name}={short(settings[name])}" for name in differ if name in settings)


def _points(group: SeedGroup, name: str, means: bool, differ: Sequence[str]) -> list[Point]:
    runs, method = [run for run in group.runs if name in run.costs], group.settings.get("method", "pruned")
    if not means:
        return [
            Point(run.id, method, run.costs[name].pruned, run.accuracy, _run_words(run, group, name, differ))
            for run in runs
        ]
    price, share = group.cost(name), SeedGroup(tuple(runs), group.settings).spread(lambda run: run.accuracy)
    if price is None or share is None:
        return []
    width = (share.std or 0.0, price.std or 0.0) if share.n > 1 else None
    words = _mean_words(group, name, price, share, differ)
    return [Point(group.id, method, price.mean, share.mean, words, width)]


def _run_words(run: Run, group: SeedGroup, name: str, differ: Sequence[str]) -> str:
    pair = run.costs[name]
    seed = "" if run.seed is None else f"seed {run.seed}"
    left = f" ({pair.pruned / pair.dense:.0%} of dense)" if pair.dense else ""
    twin = "" if run.dense_accuracy is None else f"dense twin {accuracy(run.dense_accuracy)}"
    title = [describe(group.settings, differ), seed]
    return _lines(title, [f"{accuracy(run.accuracy)} accurate", twin], [f"{cost(name, pair.pruned)}{left}"])


def _mean_words(group: SeedGroup, name: str, price: Spread, share: Spread, differ: Sequence[str]) -> str:
    of = f"mean of {share.n} runs" if share.n > 1 else "one run"
    title = [describe(group.settings, differ), of]
    return _lines(title, [f"{accuracy_spread(share)} accurate"], [cost(name, price.mean)])


def _lines(title: Sequence[str], *others: Sequence[str]) -> str:
    """Join words to lines; Plotly reads tags, and what came from a run must not be one."""
    lines = [plain(", ".join(filter(None, line))) for line in (title, *others)]
    return "<br>".join([f"<b>{lines[0]}</b>", *lines[1:]])


def _dense(groups: Sequence[SeedGroup], name: str) -> list[Point]:
    """Return the dense twins; those that are equal, since only the pruning differed, once."""
    found: dict[tuple[float, float], Point] = {}
    for run in (run for group in groups for run in group.runs if name in run.costs):
        if run.dense_accuracy is None:
            continue
        model, seed = run.settings.get("model", ""), "" if run.seed is None else f"seed {run.seed}"
        price = run.costs[name].dense
        words = _lines(["dense twin", model, seed], [f"{accuracy(run.dense_accuracy)} accurate"], [cost(name, price)])
        found.setdefault((price, run.dense_accuracy), Point(run.id, "dense", price, run.dense_accuracy, words))
    return list(found.values())


def _line(front: Sequence[Point]) -> Figure:
    places = {"x": [point.cost for point in front], "y": [point.accuracy for point in front]}
    style = {"color": _GREY, "width": 1.5, "shape": "hv"}
    return {"type": "scatter", "mode": "lines", "name": "Pareto front", "line": style, "hoverinfo": "skip", **places}


def _dense_marks(points: Sequence[Point]) -> Figure:
    mark = {"symbol": "diamond-open", "size": 10, "color": _GREY, "line": {"width": 1.5, "color": _GREY}}
    return {**_scatter(points, "dense twin"), "marker": mark, "meta": "dense"}


def _marks(points: Sequence[Point], method: str, number: int) -> Figure:
    colour, symbol = COLOURS[number % len(COLOURS)], _SYMBOLS[number % len(_SYMBOLS)]
    trace = {**_scatter(points, method), "marker": {"color": colour, "symbol": symbol, "size": 9}}
    if any(point.spread for point in points):
        for axis, which in (("error_y", 0), ("error_x", 1)):
            widths = [point.spread[which] if point.spread else 0.0 for point in points]
            trace[axis] = {"type": "data", "array": widths, "thickness": 1, "width": 3, "color": colour}
    return trace


def _scatter(points: Sequence[Point], name: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(name),
        "x": [point.cost for point in points],
        "y": [point.accuracy for point in points],
        "customdata": [point.id for point in points],
        "hovertext": [point.words for point in points],
        "hoverinfo": "text",
    }


def _layout(name: str) -> Figure:
    latency = name not in ("macs", "params")
    return {
        "xaxis": {
            "title": {"text": plain(cost_name(name))},
            **({"ticksuffix": " ms"} if latency else {"tickformat": "~s"}),
        },
        "yaxis": {"title": {"text": "test accuracy"}, "tickformat": "~%"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "margin": {"l": 64, "r": 16, "t": 44, "b": 52},
        "hovermode": "closest",
    }
