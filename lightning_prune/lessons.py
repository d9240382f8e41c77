"""What failed trials of a cut teach: which groups stay whole, keep a second channel, or give in step with another."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_prune.allocation import Limits, lowest
from lightning_prune.shares import equal_shares
from lightning_prune.tensors import named_modules, named_tensors
from lightning_prune.types import Attributes, ChannelGroup, PruningPlan
from lightning_prune.verification import Trial

_ENOUGH = 2
"""After so many groups of a kind have taught the same, it is taken to hold for the others of that kind."""


@dataclass
class Lessons:
    """What the trials of a model's cut have taught so far.

    Attributes:
        refused: Group name -> in words why nothing of it can go.
        mended: Attributes that the last trial has mended, for the next one to begin with.
    """

    refused: dict[str, str] = field(default_factory=dict)
    mended: Attributes = field(default_factory=dict)
    _spared: set[str] = field(default_factory=set)
    _in_step: list[set[str]] = field(default_factory=list)

    def learn(
        self, trial: Trial, plan: PruningPlan, scores: Mapping[str, Tensor], kinds: Mapping[str, Hashable]
    ) -> None:
        """Learn from a trial that was refused.

        Groups that could give in step with another are not refused, nor are those that keep a single channel.

        Args:
            trial: How it went.
            plan: What was tried.
            scores: Group name -> scores of its channels.
            kinds: Group name -> what it is like; see `kinds_of`.
        """
        if trial.in_step and not any(trial.in_step <= names for names in self._in_step):
            touched = [names for names in self._in_step if names & trial.in_step]
            others = [names for names in self._in_step if not names & trial.in_step]
            self._in_step, self.mended = [*others, trial.in_step.union(*touched)], {}
            return
        single = {name for name in trial.refused if len(scores[name]) - len(plan.removed[name]) == 1} - self._spared
        self._spared |= single
        self._spared |= _like(self._spared, kinds)
        self.refused.update({name: reason for name, reason in trial.refused.items() if name not in single})
        for name in sorted(_like(self.refused, kinds) & scores.keys()):
            self.refused.setdefault(name, f"is like others whose cut was refused: {next(iter(trial.refused.values()))}")
        self.mended = trial.mended

    def apply(self, plan: PruningPlan, scores: Mapping[str, Tensor], limits: Limits) -> PruningPlan:
        """Return the plan with what has been learnt.

        Args:
            plan: What the allocation gave.
            scores: Group name -> scores of its channels, of the refused groups too.
            limits: What no plan goes beyond.
        """
        sizes = {name: len(values) for name, values in scores.items()}
        gone = {name: len(plan.removed.get(name, ())) for name in scores}
        held_back = dict(plan.held_back)
        given = dict(gone)
        for name in self._spared:
            if sizes[name] - gone[name] == 1:
                given[name] -= 1
                held_back[name] = "keeps 2 channels in place of 1: a single one cannot be verified"
        for names in self._in_step:
            for name, count in self._shared_out(names, sizes, given, limits).items():
                if name in scores and count != given[name]:
                    given[name] = count
                    held_back[name] = _in_words(sizes[name] - count, sizes[name] - gone[name], names - {name})
        removed = {
            name: plan.removed[name] if count == gone[name] else lowest(scores[name], count)
            for name, count in given.items()
            if count
        }
        return PruningPlan(removed, held_back)

    def _shared_out(
        self, names: set[str], sizes: Mapping[str, int], gone: Mapping[str, int], limits: Limits
    ) -> dict[str, int]:
        """Return how many channels each of some groups gives; nothing where one of them cannot."""
        if not names <= sizes.keys() - self.refused.keys():
            return dict.fromkeys(names, 0)
        least = {name: 2 if name in self._spared else 1 for name in names}
        return equal_shares(
            {name: sizes[name] for name in sorted(names)},
            gone,
            lambda name, left: left >= least[name] and limits.allow(left),
        )


def _in_words(left: int, planned: int, others: set[str]) -> str:
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f"keeps {left} channels in place of {planned}, in step with {min(others)}{more}"


def _like(names: Iterable[str], kinds: Mapping[str, Hashable]) -> set[str]:
    """Return the groups of a kind of which enough are named."""
    known = [kinds[name] for name in names if name in kinds]
    return {name for name, kind in kinds.items() if known.count(kind) >= _ENOUGH}


def kinds_of(model: nn.Module, groups: Iterable[ChannelGroup]) -> dict[str, Hashable]:
    """Tell which groups are alike: as many channels, in tensors of the same shape, in modules of one class."""
    modules, tensors = named_modules(model), named_tensors(model)
    kinds: dict[str, Hashable] = {}
    for group in groups:
        members = []
        for member in group.members:
            owner, _, leaf = member.tensor.rpartition(".")
            shape = tuple(tensors[member.tensor].shape)
            members.append((type(modules[owner]), leaf, member.dim, shape))
        kinds[group.name] = (group.size, frozenset(members))
    return kinds
