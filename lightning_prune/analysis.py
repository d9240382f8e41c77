"""Looking before cutting: what a model's channel groups are, what each costs, and what a ratio would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import nn

from lightning_prune.cost import Costs, count_params
from lightning_prune.graph import check_model
from lightning_prune.inputs import ExampleInputs, examples_in
from lightning_prune.layers.gates import ungated
from lightning_prune.pruner import Request, draft_cut, reading
from lightning_prune.report import count, record_table
from lightning_prune.tensors import unwrapped
from lightning_prune.types import ChannelGroup, ChannelGroups, PruneRecord

_FEW = 3
"""So many of the layers that share a group are named in the table; analysis.json names all."""


@dataclass(frozen=True)
class GroupCost:
    """What the channels of a group cost.

    Attributes:
        params: Parameters that one channel less saves.
        macs: MACs per example that one channel less saves.
        params_share: Share of the model's parameters that goes when all channels but one go, in [0, 1].
        macs_share: The same of the MACs.
    """

    params: float
    macs: float
    params_share: float
    macs_share: float


@dataclass(frozen=True)
class Analysis:
    """What there is to know of a model before it is cut.

    Attributes:
        groups: All channel groups, frozen ones too.
        costs: Group name -> what its channels cost; of the groups that are not frozen.
        params: Parameters of the model.
        macs: MACs of a forward pass, per example.
        plan: What a cut would do; it has been planned and verified, and not done. None where no ratio was asked for.
    """

    groups: ChannelGroups
    costs: Mapping[str, GroupCost]
    params: int
    macs: float
    plan: PruneRecord | None = None

    def table(self) -> Table:
        """Tell the groups, a line each. Layers lie between two groups, so that shares add up to more than the whole."""
        table = Table(
            title=f"{len(self.groups)} channel groups, {count(self.params)} parameters, {count(self.macs)} MACs",
            caption="at most: what goes of the model when all channels of the group but one go",
            caption_justify="left",
        )
        table.add_column("group", overflow="fold")
        for column in ("channels", "params\na channel", "MACs\na channel", "at most\nparams", "at most\nMACs"):
            table.add_column(column, justify="right")
        table.add_column("shared by, or why it is frozen", overflow="fold", ratio=1)
        for group in self.groups:
            table.add_row(group.name, str(group.size), *self._cells(group), group.frozen or _shared_by(group))
        return table

    def plain(self) -> dict[str, Any]:
        """Return all of it as plain data, as it stands in analysis.json."""
        groups = [
            {
                "name": group.name,
                "channels": group.size,
                "frozen": group.frozen,
                "layers": _layers(group),
                **(vars(self.costs[group.name]) if group.name in self.costs else {}),
            }
            for group in self.groups
        ]
        found: dict[str, Any] = {"params": self.params, "macs": self.macs, "groups": groups}
        if self.plan is not None:
            found["plan"] = {
                "of": self.plan.of,
                "asked": self.plan.asked,
                "reached": self.plan.reached,
                "params": self.plan.params.after,
                "macs": self.plan.macs.after,
                "widths": {name: change.after for name, change in self.plan.channels.items()},
                "held_back": dict(self.plan.held_back),
            }
        return found

    def __rich__(self) -> Group:
        return Group(self.table(), *([] if self.plan is None else [record_table(self.plan, "A cut would give")]))

    def _cells(self, group: ChannelGroup) -> tuple[str, ...]:
        cost = self.costs.get(group.name)
        if cost is None:
            return ("",) * 4
        return count(cost.params), count(cost.macs), f"{cost.params_share:.1%}", f"{cost.macs_share:.1%}"


def analyze(model: nn.Module, example_inputs: ExampleInputs, request: Request | None = None) -> Analysis:
    """Read a model, price its groups, and plan a cut without doing it; the model is not changed.

    Args:
        model: Any module.
        example_inputs: A tensor, a tuple of positional inputs, a dict of keyword inputs, or a whole batch.
        request: What would be asked of a cut; None only reads.

    Raises:
        PruningError: The model cannot be read, or a cut of it cannot be planned.
        ValueError: Nothing can be pruned.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> found = analyze(net, torch.zeros(1, 4), Request(0.5))
        >>> found.costs["0"].params, found.plan.params.after, net[0].out_features
        (7.0, 37, 10)
    """
    check_model(model)
    model = unwrapped(model)
    ignore, heads = ((), "whole") if request is None else (request.ignore, request.heads)
    with ungated(model), reading(model, example_inputs, request or Request(0.0, ignore=ignore, heads=heads)) as graph:
        params, macs = (Costs(model, graph).of(unit) for unit in ("params", "macs"))
        batch = examples_in(graph.inputs)
        costs = {
            group.name: GroupCost(
                params.saving(group.name),
                macs.saving(group.name) / batch,
                1 - params.at({group.name: 1}) / params.total,
                1 - macs.at({group.name: 1}) / macs.total,
            )
            for group in graph.groups
            if not group.frozen
        }
        found = Analysis(ChannelGroups(graph.groups), costs, count_params(model), macs.total / batch)
    if request is None or not request.pruning_ratio:
        return found
    return Analysis(found.groups, costs, found.params, found.macs, draft_cut(model, example_inputs, request).record)


def _shared_by(group: ChannelGroup) -> str:
    """Name a few of the layers, beside the one that names the group."""
    others = [layer for layer in _layers(group) if layer != group.name]
    more = f" and {len(others) - _FEW} more" if len(others) > _FEW else ""
    return ", ".join(others[:_FEW]) + more


def _layers(group: ChannelGroup) -> list[str]:
    return list(dict.fromkeys(member.tensor.rpartition(".")[0] or member.tensor for member in group.members))
