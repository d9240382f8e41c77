"""The trial of a cut: the cut model must run as the dense one does, with the removed positions left out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from lightning_prune.collector import collector_held
from lightning_prune.cut import Cut, prepare, standins
from lightning_prune.fate import Fate
from lightning_prune.flow import Flow
from lightning_prune.graph import Graph
from lightning_prune.inputs import tensors_in
from lightning_prune.labels import LabelArray, Labels, LabelSpace
from lightning_prune.mending import Misfit, mendings, modules_of
from lightning_prune.shares import equal_shares
from lightning_prune.steps import Run, Step
from lightning_prune.tensors import named_tensors
from lightning_prune.trace import Watcher, run
from lightning_prune.types import Attributes, Kept, PruningPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """How a cut went when it was tried out.

    Attributes:
        cut: The cut, with all attributes that had to be set for it to work.
        mended: The attributes among them that no table knows, as far as the trial has come.
        refused: Group name -> in words why its cut would not work.
        in_step: Groups that must give the same fraction for the cut to go further.
        macs: The multiply-accumulates of the cut model, for the whole batch; 0 if it does not work.
    """

    cut: Cut
    mended: Attributes = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    in_step: set[str] = field(default_factory=set)
    macs: int = 0


@collector_held()
def verify(model: nn.Module, graph: Graph, plan: PruningPlan, cut: Cut, known: Attributes | None = None) -> Trial:
    """Run the cut model without changing the real one.

    The cut run must be the dense run with the removed positions left out: the same operations, each with the same
    positions in its outputs, in the same order. Where a size that an attribute holds no longer fits, another value
    is tried. Where a failure concerns no group in particular, it is the one without which the run gets further.

    Args:
        model: The model.
        graph: A reading of it.
        plan: What goes.
        cut: What that does to tensors and attributes.
        known: Attributes that an earlier trial has mended, to begin with.
    """
    trial, misfit = _try_out(model, graph, plan, cut, known or {})
    if misfit is None:
        return trial
    trial = replace(trial, in_step=_in_step(model, graph, plan, trial, misfit))
    if trial.in_step or not 1 < len(trial.refused) == len(plan.removed):
        return trial
    guilty = _guilty(model, graph, plan, trial, misfit) or _guilty_alone(model, graph, plan)
    return replace(trial, refused=dict.fromkeys(guilty, misfit.reason) or trial.refused)


def _in_step(model: nn.Module, graph: Graph, plan: PruningPlan, trial: Trial, misfit: Misfit) -> set[str]:
    """Find groups that must give the same fraction, for the run to get further.

    So it is where a model takes one width for another, as an attention does that merges its heads into the width of its
    input. Groups of which as much goes as of one of the two may have to be among them.
    """
    sizes = {group.name: group.size for group in graph.groups}
    gone = {name: len(plan.removed.get(name, ())) for name in sizes}
    near = misfit.around[:_NEAR]
    for one, other in ((one, other) for one in trial.refused if one in near for other in near if other != one):
        twins = [
            name for name in near if (sizes[name], gone[name]) in {(sizes[two], gone[two]) for two in (one, other)}
        ]
        for names in ([one, other], twins)[: len(twins) - 1]:
            shares = equal_shares({name: sizes[name] for name in names}, gone, least=1)
            if any(shares[name] != gone[name] for name in names) and any(shares.values()):
                removed = {**plan.removed, **{name: torch.arange(count) for name, count in shares.items()}}
                if _gets_further(model, graph, PruningPlan(removed), misfit, {}):
                    return set(names)
    return set()


def _gets_further(model: nn.Module, graph: Graph, plan: PruningPlan, misfit: Misfit, known: Attributes) -> bool:
    """Tell whether the cut model runs further with another plan."""
    _, other = _try_out(model, graph, plan, prepare(model, graph, plan), known, until=misfit.moment)
    return other is None or other.moment > misfit.moment


def _guilty(model: nn.Module, graph: Graph, plan: PruningPlan, trial: Trial, misfit: Misfit) -> list[str]:
    """Find, among the groups whose channels were around when it went wrong, one without which the run gets further."""
    for suspect in (name for name in misfit.around if name in plan.removed):
        rest = PruningPlan({name: indices for name, indices in plan.removed.items() if name != suspect})
        if _gets_further(model, graph, rest, misfit, trial.mended):
            return [suspect]
    return []


def _guilty_alone(model: nn.Module, graph: Graph, plan: PruningPlan) -> list[str]:
    """Try each group alone."""
    parts = {name: PruningPlan({name: indices}) for name, indices in plan.removed.items()}
    return [
        name for name, part in parts.items() if _try_out(model, graph, part, prepare(model, graph, part), {})[0].refused
    ]


def _try_out(
    model: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    cut: Cut,
    known: Attributes,
    until: tuple[int, int] | None = None,
) -> tuple[Trial, Misfit | None]:
    """Run the cut model, mending attributes as long as that brings the run further, or as far as is asked for."""
    fate = Fate(graph, plan)
    labels = _labels_left(graph, cut.kept)
    attributes: Attributes = {
        name: {**known.get(name, {}), **cut.attributes.get(name, {})} for name in (*known, *cut.attributes)
    }
    outcome = _rehearse(model, graph, fate, replace(cut, attributes=attributes), labels, until)
    while isinstance(outcome, Misfit):
        for mended in mendings(model, cut, attributes, outcome):
            next_outcome = _rehearse(model, graph, fate, replace(cut, attributes=mended), labels, until)
            if not isinstance(next_outcome, Misfit) or next_outcome.moment > outcome.moment:
                attributes, outcome = mended, next_outcome
                break
        else:
            refused = fate.refuse(outcome.involved, outcome.reason)
            return Trial(cut, _beside(attributes, cut.attributes), refused), outcome
    return Trial(replace(cut, attributes=attributes), _beside(attributes, cut.attributes), macs=outcome), None


def _beside(attributes: Attributes, known: Attributes) -> Attributes:
    """Leave out what is known already."""
    left = {
        name: {key: value for key, value in values.items() if key not in known.get(name, {})}
        for name, values in attributes.items()
    }
    return {name: values for name, values in left.items() if values}


def _rehearse(
    model: nn.Module,
    graph: Graph,
    fate: Fate,
    cut: Cut,
    labels: dict[str, Labels],
    until: tuple[int, int] | None,
) -> Misfit | int:
    """Run the cut model in all settings; return its multiply-accumulates in the first, or where it went wrong."""
    macs: list[int] = []
    for place, (setting, dense) in enumerate(graph.runs.items()):
        comparison = _Comparison(fate, dense, until[1] if until is not None and until[0] == place else None)
        flow = comparison.flow
        tensors = named_tensors(model)
        tensors |= standins(tensors, cut, real=setting.substrate != "meta")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="input's size at dim=.* does not match num_features")
                after = run(model, graph.inputs, setting, flow, tensors, labels, cut.attributes, comparison)
            comparison.close(after)
        except _FarEnoughError:
            return 0
        except _MovedError as moved:
            involved = [part for _, parts in moved.step.outputs for part in parts]
            reason = f"the cut would move its channels in {moved.step.name}"
            return comparison.misfit(place, involved, reason, modules_of(model, moved))
        except Exception as error:
            log.debug("the cut model fails", exc_info=error)
            operation, arguments = flow.current
            involved = [part for tensor in tensors_in(arguments) for part in flow.of(tensor)]
            reason = f"the cut model fails in {operation or 'its forward'}: {error}"
            return comparison.misfit(place, involved, reason, modules_of(model, error))
        macs.append(after.macs)
    return macs[0]


class _FarEnoughError(Exception):
    """The run has come as far as was asked for."""


class _MovedError(Exception):
    """A position is not where it should be after this step."""

    def __init__(self, step: Step) -> None:
        super().__init__(step.name)
        self.step = step


_NEAR = 6
"""So many of the groups around are looked at for two that go in step."""

_AROUND = 60
"""So many steps before it went wrong are looked at for the cause."""

_SAME_PLACE = {"aten.clone.default", "aten.alias.default", "aten.detach.default", "aten.contiguous.default"}


def _telling(steps: Iterable[Step]) -> list[Step]:
    """Leave out copies, which depend on strides."""
    return [step for step in steps if step.name not in _SAME_PLACE]


class _Comparison(Watcher):
    """Compares each step of the cut run with that of the dense run, up to one whose size depends on values.

    Args:
        fate: Who goes.
        dense: The dense run.
        until: The step after which no more is asked.
    """

    def __init__(self, fate: Fate, dense: Run, until: int | None) -> None:
        self._fate, self._dense, self._until = fate, dense, until
        self._steps = _telling(dense.steps)
        self._next = 0
        self._blind = False
        self._space = _Retold(fate)
        self.flow = Flow(self._space)

    def before(self, name: str) -> Step | None:
        """Tell the label space what the dense run made here."""
        step = None if name in _SAME_PLACE or self._blind else self._step()
        self._space.expect(step)
        return step

    def after(self, step: Step) -> None:
        """Compare."""
        self._blind = self._blind or step.by_value
        if step.name in _SAME_PLACE or self._blind:
            return
        dense = self._step()
        if dense is None or not self._fate.agrees(dense, step):
            raise _MovedError(dense or step)
        if self._next == self._until:
            raise _FarEnoughError
        self._next += 1

    def close(self, after: Run) -> None:
        """See that nothing is missing."""
        missing = None if self._blind else self._step()
        if missing is not None:
            raise _MovedError(missing)
        if after.outputs != self._dense.outputs and not self._blind:
            raise ValueError(f"it returns shapes {after.outputs} in place of {self._dense.outputs}")

    def misfit(
        self, setting: int, involved: list[LabelArray | None], reason: str, modules: dict[str, nn.Module]
    ) -> Misfit:
        """Tell where the run went wrong, and which sizes are new there."""
        before = self._steps[max(self._next - _AROUND, 0) : self._next + 1][::-1]
        sizes = [pair for step in before[:2] for pair in self._fate.sizes(step)]
        around = self._fate.owners(labels for step in before for _, parts in step.outputs for labels in parts)
        return Misfit((setting, self._next), involved, reason, modules, sizes, around)

    def _step(self) -> Step | None:
        return self._steps[self._next] if self._next < len(self._steps) else None


def _labels_left(graph: Graph, kept: Kept) -> dict[str, Labels]:
    """Return the labels of the positions that stay."""
    return {
        name: tuple(
            None if part is None else part[kept[name][dim].numpy()] if dim in kept.get(name, {}) else part
            for dim, part in enumerate(labels)
        )
        for name, labels in graph.labels.items()
    }


class _Retold(LabelSpace):
    """Makes the labels that the dense run made at the same place, without those that go.

    Args:
        fate: Who goes.
    """

    def __init__(self, fate: Fate) -> None:
        super().__init__(fate.count)
        self._fate = fate
        self._told: list[tuple[int, int]] = []
        self._decided: list[tuple[int, ...]] = []

    def expect(self, step: Step | None) -> None:
        """Hear which step of the dense run comes next."""
        self._told = list(step.fresh) if step else []
        self._decided = list(step.decisions) if step else []

    def fresh(self, count: int) -> LabelArray:
        """Make `count` labels: those of the dense run that stay, if they are as many."""
        if self._told:
            start, size = self._told.pop(0)
            left = self._fate.left(np.arange(start, start + size))
            if len(left) == count:
                return left
        return super().fresh(count)

    def decide(self, compute: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """Decide as the dense run did."""
        return self._decided.pop(0) if self._decided else super().decide(compute)
