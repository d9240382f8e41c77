"""The rule that shares a pruning ratio out over the weights of layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor

from torch import Tensor

from lightning_prune.ranking import shares_of_lowest


@dataclass(frozen=True)
class DenseLayer:
    """What is remembered of a layer's weight as it was before any pruning.

    Attributes:
        shape: Its shape.
        std: The standard deviation of its weights; None where nobody has kept it.
    """

    shape: tuple[int, ...]
    std: float | None = None


@dataclass(frozen=True, eq=False)
class MaskedLayer:
    """What an allocation of weights knows of a layer.

    Attributes:
        scores: One score for each unit of the mask that is there now, flat, higher = keep; -1 for what is pruned.
        weight: The weights.
        dense: The layer before any pruning.
        units: How many units it had then.
    """

    scores: Tensor
    weight: Tensor
    dense: DenseLayer
    units: int

    def least(self, cap: float = 1.0) -> int:
        """Return how many units stay in any case: all but `cap` of the dense ones, and one, of those not pruned yet."""
        alive = int((self.scores >= 0).count_nonzero())
        return min(alive, max(1, ceil((1 - cap) * self.units - 1e-9)))


class WeightAllocation(ABC):
    """The rule that shares a ratio out over the weights of layers. Every layer keeps at least one."""

    @abstractmethod
    def kept(self, layers: Mapping[str, MaskedLayer], ratio: float) -> dict[str, int]:
        """Return how many units each layer keeps.

        Args:
            layers: Name of the weight -> what is known of it.
            ratio: Fraction of the dense units to be gone afterwards, in [0, 1).
        """


def kept_of_all(
    layers: Mapping[str, MaskedLayer], scores: Mapping[str, Tensor], ratio: float, cap: float = 1.0
) -> dict[str, int]:
    """Return how many units each layer keeps when the lowest scores of all layers go.

    Args:
        layers: Name of the weight -> what is known of it.
        scores: Name of the weight -> scores that compare across layers.
        ratio: Fraction of the dense units to be gone afterwards, in [0, 1).
        cap: At most this fraction of a layer's dense units goes.
    """
    dense = sum(layer.units for layer in layers.values())
    there = {name: layer.scores.numel() for name, layer in layers.items()}
    count = floor(ratio * dense + 0.5) - (dense - sum(there.values()))
    most = [there[name] - layer.least(cap) for name, layer in layers.items()]
    losses = shares_of_lowest([scores[name] for name in layers], count, most)
    return {name: there[name] - loss for name, loss in zip(layers, losses, strict=True)}
