"""The rule that shares a pruning ratio out over groups of channels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import ceil, floor
from typing import ClassVar

from torch import Tensor

from lightning_prune.cost import Costs


class Allocation(ABC):
    """The rule that shares a ratio out over groups of channels.

    Args:
        cap: At most this fraction of a group's dense channels may go, in (0, 1].
        event_cap: At most this fraction of the channels that a group still has may go in one prune event, in (0, 1];
            Network Slimming's passes take 0.5.

    Raises:
        ValueError: A cap is outside (0, 1].
    """

    asks_scores: ClassVar[bool] = True
    """Whether the widths that it gives depend on the scores."""

    def __init__(self, cap: float = 1.0, event_cap: float = 1.0) -> None:
        for name, value in (("cap", cap), ("event_cap", event_cap)):
            if not 0 < value <= 1:
                raise ValueError(f"`{name}` is the fraction that a group may lose at most, in (0, 1]; got {value}.")
        self.cap = cap
        self.event_cap = event_cap

    def spared(self, dense: int, now: int) -> int:
        """Return how many channels the caps leave to a group that had `dense` and has `now`."""
        return max(ceil((1 - self.cap) * dense - 1e-9), ceil((1 - self.event_cap) * now - 1e-9))

    def knowing(self, costs: Costs) -> Allocation:
        """Return the rule for a model whose costs are known; itself, where it does not ask what channels cost."""
        return self

    def __repr__(self) -> str:
        caps = {"cap": self.cap, "event_cap": self.event_cap}
        return f"{type(self).__name__}({', '.join(f'{name}={cap}' for name, cap in caps.items() if cap < 1)})"

    @abstractmethod
    def widths(
        self, scores: Mapping[str, Tensor], dense: Mapping[str, int], ratio: float, least: Mapping[str, int]
    ) -> dict[str, int]:
        """Return how many channels each scored group keeps.

        Args:
            scores: Group name -> scores of the channels that are there now.
            dense: Group name -> channels of the dense model, of all groups that count (also unscored ones).
            ratio: Fraction of the dense channels to be gone afterwards, in [0, 1).
            least: Group name -> channels that it keeps in any case.
        """


def to_go(scores: Mapping[str, Tensor], dense: Mapping[str, int], ratio: float) -> int:
    """Return how many of the channels that are there now go for a ratio; less than 0 where too many have gone.

    Args:
        scores: Group name -> scores of the channels that are there now.
        dense: Group name -> channels of the dense model, of all groups that count.
        ratio: Fraction of the dense channels to be gone afterwards, in [0, 1).
    """
    gone = sum(dense.values()) - sum(len(scores[name]) if name in scores else dense[name] for name in dense)
    return floor(ratio * sum(dense.values()) + 0.5) - gone
