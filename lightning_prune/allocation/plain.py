"""The allocations that look at scores alone: the same of each, the lowest of all, or all that are 0."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from lightning_prune.allocation.base import Allocation, to_go
from lightning_prune.allocation.weights import MaskedLayer, WeightAllocation, kept_of_all


class Uniform(Allocation, WeightAllocation):
    """Every group, or layer, gives the same fraction.

    >>> from lightning_prune.allocation import allocate
    >>> plan = allocate({"a": torch.tensor([3.0, 1.0, 2.0, 1.0])}, 0.5, Uniform())
    >>> plan.removed["a"].tolist()
    [1, 3]
    """

    asks_scores: ClassVar[bool] = False

    def widths(
        self, scores: Mapping[str, Tensor], dense: Mapping[str, int], ratio: float, least: Mapping[str, int]
    ) -> dict[str, int]:
        """Keep the same fraction of each group."""
        return {
            name: min(max(dense[name] - floor(ratio * dense[name] + 0.5), least[name]), len(values))
            for name, values in scores.items()
        }

    def kept(self, layers: Mapping[str, MaskedLayer], ratio: float) -> dict[str, int]:
        """Keep the same fraction of each layer."""
        return {
            name: min(max(layer.units - floor(ratio * layer.units + 0.5), layer.least(self.cap)), layer.scores.numel())
            for name, layer in layers.items()
        }


class Global(Allocation, WeightAllocation):
    """The lowest scores of the whole model go, wherever they are.

    Exactly the asked number goes, also when scores tie: ties are broken by the order of the groups, or layers.

    >>> from lightning_prune.allocation import allocate
    >>> plan = allocate({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([9.0, 2.0])}, 0.5, Global())
    >>> {name: indices.tolist() for name, indices in plan.removed.items()}
    {'a': [1], 'b': [1]}
    """

    def widths(
        self, scores: Mapping[str, Tensor], dense: Mapping[str, int], ratio: float, least: Mapping[str, int]
    ) -> dict[str, int]:
        """Rank all channels that may go, and count those that do."""
        count = to_go(scores, dense, ratio)
        expendable = {
            name: values.sort(stable=True).values[: len(values) - least[name]] for name, values in scores.items()
        }
        owner = torch.cat([torch.full((len(part),), place) for place, part in enumerate(expendable.values())])
        order = torch.cat(list(expendable.values())).argsort(stable=True)
        losses = owner[order[: max(count, 0)]].bincount(minlength=len(scores)).tolist()
        return {name: len(values) - loss for (name, values), loss in zip(scores.items(), losses, strict=True)}

    def kept(self, layers: Mapping[str, MaskedLayer], ratio: float) -> dict[str, int]:
        """Rank the weights of all layers, without sorting them, and count those that do not go."""
        return kept_of_all(layers, {name: layer.scores for name, layer in layers.items()}, ratio, self.cap)


class Zeros(Allocation):
    """All channels whose score is 0 go, and no others; the ratio is not asked.

    Args:
        and_lowest: Where these are too few for the ratio, the lowest scores of the whole model go as well.

    >>> from lightning_prune.allocation import allocate
    >>> allocate({"a": torch.tensor([1.0, 0.0, 1.0])}, 0.0, Zeros()).removed["a"].tolist()
    [1]
    """

    def __init__(self, *, and_lowest: bool = False) -> None:
        super().__init__()
        self.and_lowest = and_lowest

    def widths(
        self, scores: Mapping[str, Tensor], dense: Mapping[str, int], ratio: float, least: Mapping[str, int]
    ) -> dict[str, int]:
        """Keep what is not 0."""
        kept = {name: max(int(values.count_nonzero()), least[name]) for name, values in scores.items()}
        if not self.and_lowest:
            return kept
        return {name: min(kept[name], width) for name, width in Global().widths(scores, dense, ratio, least).items()}
