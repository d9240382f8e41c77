"""How a pruning ratio is shared out: how many channels each group gives and which ones, how many weights each layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor

import torch
from torch import Tensor

from lightning_prune.ranking import shares_of_lowest
from lightning_prune.types import PruningPlan


@dataclass(frozen=True)
class Limits:
    """What no plan goes beyond.

    Attributes:
        min_channels: Channels that each group keeps at least, >= 1.
        round_to: Widths are rounded to the nearest multiple of it, >= 1; None leaves them as they come.

    Raises:
        ValueError: A limit is below 1.
    """

    min_channels: int = 1
    round_to: int | None = None

    def __post_init__(self) -> None:
        if self.min_channels < 1:
            raise ValueError(
                f"`min_channels` is what each group keeps at least, 1 or more; got {self.min_channels}. "
                "To remove a whole layer, take it out of the model."
            )
        if self.round_to is not None and self.round_to < 1:
            raise ValueError(f"`round_to` is the multiple that widths are rounded to, 1 or more; got {self.round_to}.")

    def rounded(self, width: int, least: int, size: int) -> int:
        """Round a width to the nearest multiple that lies in [least, size], if there is one."""
        if self.round_to is None:
            return width
        nearest = max(floor(width / self.round_to + 0.5), ceil(least / self.round_to)) * self.round_to
        return min(nearest, size)

    def allow(self, width: int) -> bool:
        """Tell whether a group may have this width."""
        return width >= self.min_channels and width % (self.round_to or 1) == 0


class Allocation(ABC):
    """The rule that shares a ratio out over groups of channels.

    Args:
        cap: At most this fraction of a group's dense channels may go, in (0, 1].
        event_cap: At most this fraction of the channels that a group still has may go in one prune event, in (0, 1];
            Network Slimming's passes take 0.5.

    Raises:
        ValueError: A cap is outside (0, 1].
    """

    def __init__(self, cap: float = 1.0, event_cap: float = 1.0) -> None:
        for name, value in (("cap", cap), ("event_cap", event_cap)):
            if not 0 < value <= 1:
                raise ValueError(f"`{name}` is the fraction that a group may lose at most, in (0, 1]; got {value}.")
        self.cap = cap
        self.event_cap = event_cap

    def spared(self, dense: int, now: int) -> int:
        """Return how many channels the caps leave to a group that had `dense` and has `now`."""
        return max(ceil((1 - self.cap) * dense - 1e-9), ceil((1 - self.event_cap) * now - 1e-9))

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


class Uniform(Allocation, WeightAllocation):
    """Every group, or layer, gives the same fraction.

    >>> plan = allocate({"a": torch.tensor([3.0, 1.0, 2.0, 1.0])}, 0.5, Uniform())
    >>> plan.removed["a"].tolist()
    [1, 3]
    """

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

    >>> plan = allocate({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([9.0, 2.0])}, 0.5, Global())
    >>> {name: indices.tolist() for name, indices in plan.removed.items()}
    {'a': [1], 'b': [1]}
    """

    def widths(
        self, scores: Mapping[str, Tensor], dense: Mapping[str, int], ratio: float, least: Mapping[str, int]
    ) -> dict[str, int]:
        """Rank all channels that may go, and count those that do."""
        gone = sum(dense.values()) - sum(len(scores[name]) if name in scores else dense[name] for name in dense)
        count = floor(ratio * sum(dense.values()) + 0.5) - gone
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

    >>> allocate({"a": torch.tensor([1.0, 0.0, 1.0])}, 0.0, Zeros()).removed["a"].tolist()
    [1]
    """

    def widths(
        self, scores: Mapping[str, Tensor], dense: Mapping[str, int], ratio: float, least: Mapping[str, int]
    ) -> dict[str, int]:
        """Keep what is not 0."""
        return {name: max(int(values.count_nonzero()), least[name]) for name, values in scores.items()}


def allocate(
    scores: Mapping[str, Tensor],
    ratio: float,
    allocation: Allocation,
    limits: Limits | None = None,
    dense: Mapping[str, int] | None = None,
) -> PruningPlan:
    """Choose the channels that go: of each group the lowest scores, by a stable sort and a count.

    Args:
        scores: Group name -> scores of its channels, higher = keep.
        ratio: Fraction of the dense channels to be gone afterwards, in [0, 1).
        allocation: How the ratio is shared out.
        limits: What no plan goes beyond.
        dense: Group name -> channels of the dense model; None says that nothing has gone yet.

    Returns:
        The plan; what gives less than the allocation alone would take stands in its `held_back`.

    Raises:
        ValueError: The ratio would leave no channel in any group.
        TypeError: The allocation is one of weights only.
    """
    if not isinstance(allocation, Allocation):
        raise TypeError(
            f"`allocation` {allocation!r} shares weights out, not channels. Use Uniform() or Global() here, or prune "
            "weights with it."
        )
    if not scores:
        return PruningPlan({})
    limits = limits or Limits()
    dense = dense or {name: len(values) for name, values in scores.items()}
    nothing = dict.fromkeys(scores, 0)
    least = {
        name: min(len(values), max(limits.min_channels, allocation.spared(dense[name], len(values))))
        for name, values in scores.items()
    }
    wanted = allocation.widths(scores, dense, ratio, nothing)
    if ratio < 1 and scores.keys() == dense.keys() and not any(wanted.values()):
        raise ValueError(
            f"`pruning_ratio` {ratio} would leave no channel in any of the {len(scores)} groups (the largest has "
            f"{max(map(len, scores.values()))}); ask for less."
        )
    given = allocation.widths(scores, dense, ratio, least)
    removed, held_back = {}, {}
    for name, values in scores.items():
        width = given[name]
        if width < len(values):
            width = limits.rounded(width, least[name], len(values))
        if width < len(values):
            removed[name] = lowest(values, len(values) - width)
        if width > wanted[name] and dense[name] > 1:
            held_back[name] = _reason(limits, allocation, wanted[name], given[name], width)
    return PruningPlan(removed, held_back)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the lowest scores, ascending; of equal ones the first."""
    return scores.argsort(stable=True)[:count].sort().values


def _reason(limits: Limits, allocation: Allocation, wanted: int, given: int, width: int) -> str:
    causes = []
    if wanted < limits.min_channels:
        causes.append(f"min_channels={limits.min_channels}")
    if given > max(wanted, limits.min_channels):
        causes += [f"{name}={value}" for name in ("cap", "event_cap") if (value := getattr(allocation, name)) < 1]
    if width > given:
        causes.append(f"round_to={limits.round_to}")
    return f"keeps {width} channels in place of {wanted}: {', '.join(causes)}"
