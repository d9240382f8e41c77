"""What can be pruned alone: the weights of one layer by magnitude, or the channels of one group by a criterion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import floor
from typing import TypeAlias

from torch import nn

from lightning_prune import surgery
from lightning_prune.absorption import absorb
from lightning_prune.allocation import Limits, lowest
from lightning_prune.criteria import Criterion, score_groups
from lightning_prune.cut import Cut, prepare
from lightning_prune.errors import NothingToPruneError
from lightning_prune.graph import read
from lightning_prune.inputs import Inputs
from lightning_prune.lessons import Lessons
from lightning_prune.masks.held import apply
from lightning_prune.masks.magnitude import magnitude_masks
from lightning_prune.masks.maskable import maskable
from lightning_prune.types import PruningPlan
from lightning_prune.verification import verify

Prune: TypeAlias = Callable[[nn.Module], object]
"""Prunes a model in place."""


class Candidates(ABC):
    """What can be pruned alone.

    Attributes:
        sizes: Name of each candidate -> how much there is of it.
        held_back: Name -> in words why nothing of it, or less, can go.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.held_back: dict[str, str] = {}

    @abstractmethod
    def pruned(self, ratio: float) -> Iterator[tuple[str, Prune | None]]:
        """Yield for each candidate what prunes this fraction of it alone, or None where that cannot be done."""


class Layers(Candidates):
    """Layers with weights to mask; those with the smallest magnitude go, as `magnitude_masks` says.

    Args:
        model: The model.
        ignore: Patterns of module names that are not to be touched.

    Raises:
        PruningError: There is no such layer.
        ValueError: A pattern matches no module.
    """

    def __init__(self, model: nn.Module, ignore: Sequence[str]) -> None:
        super().__init__()
        self._model = model
        self._ignore = ignore
        self._weights: dict[str, list[str]] = {}
        for name, weight in maskable(model, ignore).items():
            layer = name.rpartition(".")[0]
            self._weights.setdefault(layer, []).append(name)
            self.sizes[layer] = self.sizes.get(layer, 0) + weight.numel()

    def pruned(self, ratio: float) -> Iterator[tuple[str, Prune | None]]:
        """Yield what masks the weights of a layer."""
        masks = magnitude_masks(self._model, ratio, ignore=self._ignore)
        for layer, names in self._weights.items():
            yield layer, partial(apply, {name: masks[name] for name in names})


class Groups(Candidates):
    """Channel groups that are not frozen; those channels go that score lowest, and what they emit is absorbed.

    Args:
        model: The model.
        example: What its forward is called with.
        criterion: How channels are scored.
        ignore: Patterns of module names that are not to be touched.

    Raises:
        NothingToPruneError: There is no group that the criterion can score.
        ValueError: A pattern matches no module.
    """

    def __init__(self, model: nn.Module, example: Inputs, criterion: Criterion, ignore: Sequence[str]) -> None:
        super().__init__()
        self._model = model
        self._graph = read(model, example, ignore)
        self._scores = score_groups(criterion, model, self._graph.groups)
        self._lessons = {name: Lessons() for name in self._scores}
        self._in_step = {name: {name} for name in self._scores}
        rule = type(criterion).__name__
        for group in self._graph.groups:
            if group.name in self._scores:
                self.sizes[group.name] = group.size
            else:
                self.held_back[group.name] = (
                    f"frozen: {group.frozen}" if group.frozen else f"{rule} has no score for it"
                )
        if not self._scores:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.held_back.items()) or "no groups"
            raise NothingToPruneError(
                f"{type(model).__name__} has no channels to prune: {reasons}. Choose another criterion, or loosen "
                "`ignore`."
            )

    def pruned(self, ratio: float) -> Iterator[tuple[str, Prune | None]]:
        """Yield what cuts the channels of a group."""
        for name in self._scores:
            yield name, self._cut(name, ratio)

    def _cut(self, name: str, ratio: float) -> Prune | None:
        """Plan and verify a cut; where a group can only go in step with others, these are cut too."""
        lessons, partners = self._lessons[name], self._in_step[name]
        while name not in lessons.refused:
            asked = {partner: self._count(partner, ratio) for partner in partners}
            if not asked[name]:
                return _nothing
            lots = {partner: lowest(self._scores[partner], count) for partner, count in asked.items() if count}
            plan = lessons.apply(PruningPlan(lots), self._scores, Limits())
            self.held_back.update({group: reason for group, reason in plan.held_back.items() if group == name})
            if name not in plan.removed:
                return None if partners & lessons.refused.keys() else _nothing
            trial = verify(self._model, self._graph, plan, prepare(self._model, self._graph, plan), lessons.mended)
            if not trial.refused:
                return self._absorbing(plan, trial.cut)
            partners |= trial.in_step & self._scores.keys()
            lessons.learn(trial, plan, self._scores, {})
        self.held_back[name] = f"the cut was refused: {lessons.refused[name]}"
        return None

    def _count(self, name: str, ratio: float) -> int:
        """Return how many channels a ratio takes; one always stays."""
        return min(floor(ratio * self.sizes[name] + 0.5), self.sizes[name] - 1)

    def _absorbing(self, plan: PruningPlan, cut: Cut) -> Prune:
        offsets = absorb(self._model, self._graph, plan)
        whole = replace(cut, biases={name: len(bias) for name, bias in offsets.biases.items()})
        return partial(surgery.apply, cut=whole, offsets=offsets)


def _nothing(model: nn.Module) -> None:
    """Prune nothing."""
