"""What a model costs while its channels go one by one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import fsum
from typing import TypeAlias

from lightning_prune.cost.price import ShapeOf
from lightning_prune.cost.shapes import Shapes
from lightning_prune.graph import Graph

Share: TypeAlias = Callable[[ShapeOf], float]
"""Says what a part of the model, an operation or a tensor, costs in the shapes that are left."""


@dataclass(slots=True, eq=False)
class _Part:
    """A part of the model whose cost depends on widths.

    Attributes:
        share: Says what it costs.
        now: What it costs now.
        after: Group -> what it would cost with one channel less of that group.
    """

    share: Share
    now: float
    after: dict[str, float] = field(default_factory=dict)


class PlannedCost:
    """What a model costs, and what each channel's removal saves, kept up to date while channels go.

    The channels of a group live in the same places, so that it does not matter which of them goes. A removal concerns
    only the parts of the model that share the group; only these are priced anew.

    Args:
        graph: A reading of the model.
        shares: What says the cost of each part; each asks for the same shapes however large they are.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune.cost.costs import Costs
        >>> from lightning_prune.graph import read
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> cost = Costs(net, read(net, torch.zeros(1, 4))).of("macs")
        >>> cost.total, cost.saving("0")
        (60.0, 6.0)
        >>> cost.remove("0")
        {'0'}
        >>> cost.total
        54.0
    """

    def __init__(self, graph: Graph, shares: Iterable[Share]) -> None:
        self._shapes = Shapes(graph)
        self._parts = [_Part(share, share(self._shapes.shape_of)) for share in shares]
        self._beside: dict[str, dict[str, list[_Part]]] = {group.name: {} for group in graph.groups if not group.frozen}
        for part in self._parts:
            self._note(part)
        for name, near in self._beside.items():
            self._look_ahead(name, near.get(name, ()))

    @property
    def widths(self) -> Mapping[str, int]:
        """Group name -> the channels that it has now, of all groups."""
        return self._shapes.widths

    @property
    def total(self) -> float:
        """What the model costs now."""
        return fsum(part.now for part in self._parts)

    def saving(self, group: str) -> float:
        """Return what the removal of one more channel of a group saves, 0 or more.

        The last channel saves nothing: without it there is no way through the model.

        Raises:
            ValueError: It is no group whose channels can go.
        """
        self._check(group)
        if self._shapes.widths[group] <= 1:
            return 0.0
        return max(0.0, fsum(part.now - part.after[group] for part in self._beside[group].get(group, ())))

    def remove(self, group: str) -> Collection[str]:
        """Take one channel of a group away.

        Returns:
            The groups whose savings may have changed.

        Raises:
            ValueError: It is the group's last one, or it is no group whose channels can go.
        """
        self._check(group)
        if self._shapes.widths[group] <= 1:
            raise ValueError(f"`group` {group!r} has one channel, which cannot go; leave the group as it is.")
        self._shapes.change(group, -1)
        for part in self._beside[group].get(group, ()):
            part.now = part.after[group]
        for other, parts in self._beside[group].items():
            self._look_ahead(other, parts)
        return {group, *self._beside[group]}

    def at(self, widths: Mapping[str, int]) -> float:
        """Return what the model would cost in other widths, wider ones too.

        From one channel to several it is a lower bound: a tensor of size 1 may be one that all channels share.

        Args:
            widths: Group name -> channels; groups that are not named stay as they are.

        Raises:
            ValueError: A name is no group's.
        """
        foreign = widths.keys() - self._shapes.widths.keys()
        if foreign:
            raise ValueError(
                f"`widths` names {min(foreign)!r}, which is no channel group of the model; groups are named as "
                "`find_groups` prints them."
            )
        before = dict(self._shapes.widths)
        self._set(widths)
        try:
            return fsum(part.share(self._shapes.shape_of) for part in self._parts)
        finally:
            self._set(before)

    def _set(self, widths: Mapping[str, int]) -> None:
        for name, width in widths.items():
            self._shapes.change(name, width - self._shapes.widths[name])

    def _check(self, group: str) -> None:
        if group not in self._beside:
            raise ValueError(
                f"`group` is a channel group that is not frozen, as `find_groups` prints it; got {group!r}. The model "
                f"has {', '.join(self._beside) or 'none'}."
            )

    def _note(self, part: _Part) -> None:
        """Note which groups a part's cost depends on: those of the shapes that it asks for."""
        met: set[str] = set()
        part.share(self._shapes.noting(met))
        for one in met & self._beside.keys():
            for other in met & self._beside.keys():
                self._beside[one].setdefault(other, []).append(part)

    def _look_ahead(self, group: str, parts: Iterable[_Part]) -> None:
        """Price parts for one channel less of a group."""
        if self._shapes.widths[group] <= 1:
            return
        self._shapes.change(group, -1)
        for part in parts:
            part.after[group] = part.share(self._shapes.shape_of)
        self._shapes.change(group, 1)
