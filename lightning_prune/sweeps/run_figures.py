"""The pictures of one run: its widths, its scales over the epochs, and its curves with the cuts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lightning_prune.sweeps.curves import thin
from lightning_prune.sweeps.figures import COLOURS, Figure
from lightning_prune.sweeps.runs import Cut, Moment, Run, Scales
from lightning_prune.sweeps.wording import percent, plain

_PALE, _CUT = "rgba(128, 136, 150, 0.28)", "#d2505f"
_MANY_CUTS, _MOST_CUTS = 15, 60
"""The lines of many cuts are faint; of even more cuts only some have a line, evenly spread."""

MANY_LAYERS = 30
"""The bars of so many layers stand upright, side by side over the whole page."""


def run_figures(run: Run) -> dict[str, Figure]:
    """Draw all that a run has left: "widths", "scales" and "curves", those that there are."""
    figures = {}
    if run.widths:
        figures["widths"] = widths_figure(run)
    if run.scales is not None and run.scales.epochs:
        figures["scales"] = scales_figure(run.scales, run.cuts)
    if run.curves:
        figures["curves"] = curves_figure(run)
    return figures


def widths_figure(run: Run) -> Figure:
    """Draw a bar for each layer: its dense width pale, what is left of it full."""
    names, pairs = [_label(name) for name in run.widths], list(run.widths.values())
    upright = len(names) > MANY_LAYERS
    told = [f"{name}: {pair.pruned:g} of {pair.dense:g} channels" for name, pair in zip(names, pairs, strict=True)]
    dense = {"name": "dense", "marker": {"color": _PALE}, "hoverinfo": "skip"}
    pruned = {"name": "pruned", "marker": {"color": COLOURS[0]}, "hovertext": told, "hoverinfo": "text"}
    channels = {"title": {"text": "channels"}, "rangemode": "tozero"}
    layers = _layers_axis(names, upright)
    return {
        "data": [
            {**dense, **_bars([pair.dense for pair in pairs], upright)},
            {**pruned, **_bars([pair.pruned for pair in pairs], upright)},
        ],
        "layout": {
            "barmode": "overlay",
            "height": 420 if upright else max(260, 90 + 17 * len(names)),
            "xaxis": layers if upright else channels,
            "yaxis": channels if upright else layers,
            "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
            "margin": {"l": 60 if upright else 16, "r": 16, "t": 30, "b": 48},
        },
    }


def _bars(lengths: list[float], upright: bool) -> Figure:
    rows = list(range(len(lengths)))
    places = {"x": rows, "y": lengths} if upright else {"x": lengths, "y": rows}
    return {"type": "bar", "orientation": "v" if upright else "h", "width": 0.72, **places}


def _layers_axis(names: list[str], upright: bool) -> Figure:
    """Number the layers, since two long names may be shortened to the same."""
    shown = list(range(0, len(names), 1 + len(names) // 80))
    ticks = {"tickvals": shown, "ticktext": [names[i] for i in shown], "automargin": True}
    last = len(names) - 0.4
    return {**ticks, "range": [-0.6, last], "tickangle": -90} if upright else {**ticks, "range": [last, -0.6]}


def scales_figure(scales: Scales, cuts: Sequence[Cut]) -> Figure:
    """Draw a histogram of the BatchNorm scales for each epoch as a column of tiles.

    The colour is the square root of the count: the few scales that are far from all others are to be seen.
    """
    middles = [(low + high) / 2 for low, high in pairwise(scales.edges)]
    counts = [list(column) for column in zip(*scales.counts, strict=True)]
    tiles = {
        "type": "heatmap",
        "x": list(scales.epochs),
        "y": middles,
        "z": [[max(value, 0) ** 0.5 for value in row] for row in counts],
        "customdata": counts,
        "hovertemplate": "epoch %{x}: %{customdata} scales near %{y:.3f}<extra></extra>",
        "colorscale": [[0, "rgba(63, 127, 208, 0)"], [0.3, "rgba(63, 127, 208, 0.6)"], [1, "rgb(63, 127, 208)"]],
        "showscale": False,
    }
    epochs = sorted({cut.epoch for cut in cuts if cut.epoch is not None})
    layout = {
        "xaxis": {"title": {"text": "epoch"}, "showgrid": False, "zeroline": False},
        "yaxis": {"title": {"text": "|scale| of BatchNorm"}, "showgrid": False, "zeroline": False},
        "shapes": _lines([epoch - 0.5 for epoch in epochs]),
        "margin": {"l": 60, "r": 16, "t": 16, "b": 48},
    }
    return {"data": [tiles], "layout": layout}


def curves_figure(run: Run) -> Figure:
    """Draw accuracy above and loss below, over the steps, and a line for each cut."""
    traces = [_curve(figure, moments) for figure, moments in run.curves.items()]
    for i, trace in enumerate(traces):
        trace["showlegend"] = trace["name"] not in [earlier["name"] for earlier in traces[:i]]
    kinds = {figure.rpartition("/")[2] for figure in run.curves}
    both = kinds == {"acc", "loss"}
    cuts = [cut for cut in run.cuts if cut.step is not None]
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "step"}, "anchor": "y2" if "loss" in kinds else "y"},
        "shapes": _lines([cut.step for cut in cuts if cut.step is not None]),
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "margin": {"l": 60, "r": 16, "t": 40, "b": 48},
        "height": 400 if both else 300,
    }
    if "acc" in kinds:
        low = 0.44 if both else 0.0
        layout["yaxis"] = {"title": {"text": "accuracy"}, "tickformat": "~%", "domain": [low, 1]}
    if "loss" in kinds:
        layout["yaxis2"] = {"title": {"text": "loss"}, "domain": [0, 0.38 if both else 1]}
    if cuts:
        traces.append(_cut_marks(cuts, traces[0]))
    return {"data": traces, "layout": layout}


def _curve(figure: str, moments: Sequence[Moment]) -> Figure:
    part, _, kind = figure.partition("/")
    values = [f"{percent(moment.value)}" if kind == "acc" else f"{moment.value:.4g}" for moment in moments]
    line = {"color": COLOURS[0 if part == "val" else 1], "width": 2 if part == "val" else 1.3}
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(moments) < 30 else "lines",
        "name": {"val": "validation", "train": "training"}[part],
        "legendgroup": part,
        "x": [moment.step for moment in moments],
        "y": [moment.value for moment in moments],
        "yaxis": "y" if kind == "acc" else "y2",
        "hovertext": [
            f"{figure}: {value}<br>epoch {moment.epoch}, step {moment.step}"
            for moment, value in zip(moments, values, strict=True)
        ],
        "hoverinfo": "text",
        "line": line,
        "marker": {"size": 4},
    }


def _cut_marks(cuts: Sequence[Cut], curve: Figure) -> Figure:
    """Say with a mark above a curve what was cut."""
    told = [f"cut to {percent(cut.reached)} of {plain(cut.of)}<br>step {cut.step}" for cut in cuts]
    low, high = min(curve["y"]), max(curve["y"])
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "cut",
        "x": [cut.step for cut in cuts],
        "y": [high + 0.08 * (high - low)] * len(cuts),
        "yaxis": curve["yaxis"],
        "hovertext": told,
        "hoverinfo": "text",
        "marker": {"symbol": "triangle-down", "size": 9 if len(cuts) <= _MANY_CUTS else 5, "color": _CUT},
    }


def _lines(places: Sequence[float]) -> list[Figure]:
    faint = 1 if len(places) <= _MANY_CUTS else 0.3
    line = {"color": _CUT, "width": 1, "dash": "dot"}
    shape = {"type": "line", "y0": 0, "y1": 1, "yref": "paper", "line": line, "opacity": faint}
    return [{**shape, "x0": place, "x1": place} for place in thin(places, _MOST_CUTS)]


def _label(name: str) -> str:
    """Return a name that Plotly shows as it is; of a long one the end, which tells layers apart."""
    return plain(name if len(name) <= 34 else f"...{name[-31:]}")
