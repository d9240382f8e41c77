"""Only channels of groups that look alike compete with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from copy import copy

from torch import Tensor, nn

from lightning_prune.allocation.base import Allocation
from lightning_prune.allocation.plain import Global
from lightning_prune.cost import Costs
from lightning_prune.tensors import named_modules
from lightning_prune.types import ChannelGroup


class Isomorphic(Allocation):
    """The lowest scores of each kind of group go, the same fraction of every kind.

    Fang et al. 2024, "Isomorphic Pruning for Vision Models" (ECCV, arXiv 2407.04616), section 3.3: scores compare only
    between structures of the same topology, such as the hidden layers of all MLPs, or all trunks of one depth. Two
    groups are of a kind if as many tensors belong to each, the same parts of modules of the same classes, along the
    same dimensions; sizes may differ.

    Example:
        >>> import torch
        >>> from lightning_prune import prune
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prune(net, torch.zeros(1, 4), pruning_ratio=0.5, allocation=Isomorphic()).reached
        0.5
    """

    def __init__(self, cap: float = 1.0, event_cap: float = 1.0) -> None:
        super().__init__(cap, event_cap)
        self._kinds: Mapping[str, Hashable] = {}

    def knowing(self, costs: Costs) -> Isomorphic:
        """Return the rule for a model whose groups are known."""
        informed = copy(self)
        informed._kinds = kinds_of(costs.model, costs.graph.groups)
        return informed

    def widths(
        self, scores: Mapping[str, Tensor], dense: Mapping[str, int], ratio: float, least: Mapping[str, int]
    ) -> dict[str, int]:
        """Let the groups of each kind compete.

        Raises:
            ValueError: It is not known which groups are alike (see `knowing`).
        """
        if not scores.keys() <= self._kinds.keys():
            raise ValueError(
                "Isomorphic does not know which groups are alike. Say `allocation.knowing(Costs(model, graph))`, or "
                "let `prune` or a callback do so."
            )
        found: dict[str, int] = {}
        for kind in dict.fromkeys(self._kinds[name] for name in scores):
            alike = {name: values for name, values in scores.items() if self._kinds[name] == kind}
            found |= Global().widths(alike, {name: dense[name] for name in alike}, ratio, least)
        return {name: found[name] for name in scores}


def kinds_of(model: nn.Module, groups: Iterable[ChannelGroup]) -> dict[str, Hashable]:
    """Tell which groups are alike: the same parts of modules of the same classes belong to them."""
    modules = named_modules(model)
    kinds: dict[str, Hashable] = {}
    for group in groups:
        places = [(member.tensor.rpartition("."), member.dim) for member in group.members]
        parts = Counter((type(modules[owner]), leaf, dim) for (owner, _, leaf), dim in places)
        kinds[group.name] = frozenset(parts.items())
    return kinds
