"""A picture of the channel groups: which layers share channels, and what is frozen. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import TYPE_CHECKING

from lightning_prune.types import ChannelGroup, Member

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = {"dimension 0": ("s", "#1f5fa8"), "another dimension": ("o", "#e08a1e")}
_FROZEN = "#b9bec6"


def draw(groups: Sequence[ChannelGroup]) -> Figure:
    """Draw the groups as rows and the layers as columns.

    A mark says that a tensor of the layer holds channels of the group: along dimension 0, as the layers that make
    them and the normalisations that follow them do, or along another one, as the layers that read them do. Rows of
    frozen groups are grey, with the reason.

    Args:
        groups: What `find_groups` returned.

    Returns:
        A matplotlib figure; `figure.savefig("groups.png")` writes it.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        way_out = "pip install 'lightning-prune[draw]'"
        raise ModuleNotFoundError(f"The picture is drawn with matplotlib: {way_out}.") from error
    layers = _in_order(groups)
    figure = Figure(figsize=(4.5 + 0.24 * len(layers), 1.6 + 0.26 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    for row, group in enumerate(groups):
        if group.frozen:
            axes.axhspan(row - 0.5, row + 0.5, color="#f1f2f4", zorder=0)
            axes.text(len(layers) - 0.4, row, f" {group.frozen}", va="center", fontsize=7, color="#6b7280")
        places = [layers.index(_layer(member)) for member in group.members]
        axes.plot([min(places), max(places)], [row, row], color="#d5d9df", linewidth=1, zorder=1)
        for (marker, colour), first in zip(_MARKS.values(), (True, False), strict=True):
            columns = [place for place, member in zip(places, group.members, strict=True) if (member.dim == 0) is first]
            shade = _FROZEN if group.frozen else colour
            axes.scatter(columns, [row] * len(columns), s=34, color=shade, marker=marker, zorder=2)
    axes.set_yticks(range(len(groups)), [f"{group.name}  ({group.size})" for group in groups], fontsize=7)
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.grid(axis="x", color="#eef0f3", zorder=0)
    for name, (marker, colour) in _MARKS.items():
        axes.scatter([], [], s=34, color=colour, marker=marker, label=f"channels along {name}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _in_order(groups: Sequence[ChannelGroup]) -> list[str]:
    """List the layers as the model lists them: each group does, and these lists have one order in common."""
    order: TopologicalSorter[str] = TopologicalSorter()
    for group in groups:
        layers = list(dict.fromkeys(map(_layer, group.members)))
        order.add(layers[0])
        for before, after in pairwise(layers):
            order.add(after, before)
    try:
        return list(order.static_order())
    except CycleError:  # a layer whose parameters come early and whose buffers, listed last, meet later groups
        return list(dict.fromkeys(_layer(member) for group in groups for member in group.members))


def _layer(member: Member) -> str:
    return member.tensor.rpartition(".")[0] or member.tensor
