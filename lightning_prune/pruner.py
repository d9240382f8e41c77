"""The pipeline on one page, without Lightning: read, score, allocate, remove, record."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lightning_prune import history
from lightning_prune.aiming import LatencyAim
from lightning_prune.allocation import Allocation, Limits, RoundTo, Uniform, allocate
from lightning_prune.baseline import RECORDED, Baseline, Reach
from lightning_prune.cost import Costs, count_params, per_example
from lightning_prune.criteria import Criterion, Gathered, Lasso, Magnitude, Watched, score_groups
from lightning_prune.cut import Cut, Offsets, cut_shapes, prepare
from lightning_prune.errors import NothingToPruneError, SurgeryError
from lightning_prune.graph import Graph, check_model, ignored_tensors, read
from lightning_prune.inputs import ExampleInputs
from lightning_prune.layers.gates import gates_of, ungated
from lightning_prune.lessons import Lessons, kinds_of
from lightning_prune.reconstruction import Reconstruction, Refit
from lightning_prune.rectangles import check_heads
from lightning_prune.restoring import Restoring, Sights, check_restorable
from lightning_prune.selection import selected, trunk_readers
from lightning_prune.tensors import attributes_of, named_tensors, unwrapped
from lightning_prune.types import (
    CONSTANTS,
    TRUNKS,
    UNITS,
    Attributes,
    Change,
    Constants,
    Heads,
    PruneRecord,
    PruningPlan,
    Trunks,
    Unit,
)
from lightning_prune.verification import Trial, verify

_SEARCH_STEPS = 14


@dataclass(frozen=True)
class Request:
    """What is asked of a prune event.

    Attributes:
        pruning_ratio: Fraction to be gone afterwards, counted against the dense model, in [0, 1).
        of: What it is a fraction of: "channels" (of all that can be pruned), "params", "macs", "memory" or "latency"
            (of the model; see `prune`).
        criterion: How channels are scored.
        allocation: How the ratio is shared out over the groups.
        ignore: Patterns of module names that are not to be touched.
        heads: How attention heads are cut: "whole", "inside" or "keep" (see `find_groups`).
        limits: What no plan goes beyond.
        constants: What becomes of what removed channels emit on average: "absorb" or "drop" (see `prune`); a
            reconstruction makes up for that as for all else.
        trunks: How a trunk that several layers read is cut: "whole", "selected" or "sampled" (see `prune`).
        reconstruction: How the layers that read what is left are refitted; None leaves them.

    Raises:
        ValueError: The ratio is outside [0, 1), or a name is unknown.
        TypeError: `ignore` is a single string, or `allocation` shares out weights only.
    """

    pruning_ratio: float
    of: Unit = "channels"
    criterion: Criterion = field(default_factory=Magnitude)
    allocation: Allocation = field(default_factory=Uniform)
    ignore: Sequence[str] = ()
    heads: Heads = "whole"
    limits: Limits = field(default_factory=Limits)
    constants: Constants = "absorb"
    trunks: Trunks = "whole"
    reconstruction: Reconstruction | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.pruning_ratio < 1:
            raise ValueError(
                f"`pruning_ratio` is the fraction of {self.of} to remove, in [0, 1); got {self.pruning_ratio}. "
                "For 40 % pass 0.4."
            )
        if self.of not in UNITS:
            raise ValueError(f"`of` is what the ratio counts, one of {', '.join(map(repr, UNITS))}; got {self.of!r}.")
        check_heads(self.heads)
        if not isinstance(self.allocation, Allocation):
            raise TypeError(
                f"`allocation` {self.allocation!r} shares weights out, not channels. Use Uniform() or Global(), or "
                'MagnitudePruneCallback(granularity="weights").'
            )
        for name, known in (("constants", CONSTANTS), ("trunks", TRUNKS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is one of {', '.join(map(repr, known))}; got {getattr(self, name)!r}.")
        if isinstance(self.ignore, str):
            raise TypeError(f"`ignore` is a sequence of patterns; got the string {self.ignore!r}: put it in a list.")
        object.__setattr__(self, "ignore", tuple(self.ignore))  # a list or a tuple: the same callback to a checkpoint


def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    pruning_ratio: float,
    of: Unit = "channels",
    criterion: Criterion | None = None,
    allocation: Allocation | None = None,
    ignore: Sequence[str] = (),
    heads: Heads = "whole",
    min_channels: int = 1,
    round_to: RoundTo = None,
    constants: Constants = "absorb",
    trunks: Trunks = "whole",
) -> PruneRecord:
    """Cut channels out of a model.

    Args:
        model: Any module; changed in place, its parameters stay the same objects. `DistributedDataParallel` must be
            wrapped around it anew afterwards: it keeps buckets of the old sizes.
        example_inputs: A tensor, a tuple of positional inputs, a dict of keyword inputs, or a whole batch.
        pruning_ratio: Fraction to be gone afterwards, counted against the dense model also when called again.
        of: What it is a fraction of: "channels" (of all that can be pruned), "params" or "macs" (of the model),
            "memory" (of the activations of a forward pass, none of them freed) or "latency" (of a forward pass in eval
            mode on the example inputs, measured on this machine).
        criterion: How channels are scored; `Magnitude()` if None.
        allocation: How the ratio is shared out over the groups; `Uniform()` if None.
        ignore: Patterns of module names that are not to be touched.
        heads: How attention heads are cut: "whole", "inside" or "keep" (see `find_groups`).
        min_channels: Channels that each group keeps at least.
        round_to: Widths are rounded to the nearest multiple of it; "auto" finds out which one this machine likes, from
            the times of convolutions at several widths (see `lightning_prune.cost.preferred_multiple`).
        constants: What becomes of what removed channels emit on average, as far as BatchNorm tells it: "absorb" puts
            it into the next layer's bias or running mean (see `lightning_prune.absorption`), "drop" loses it.
        trunks: How a trunk that several layers read is cut: "whole" with all that read it; "selected" puts a
            `ChannelSelect` before each BatchNorm that reads it, as in pre-activation networks and DenseNets, so that
            every reader picks its own channels and the trunk stays (Liu et al. 2017, section 3.3); "sampled" does so
            before convolutions too, as at the head of a residual branch (He, Zhang, Sun 2017, section 3.3).

    Returns:
        What was asked, what was reached, and what held it back. It is the last of `history_of(model)` too.

    Raises:
        ValueError: An argument is wrong, or no group can be pruned.
        PruningError: The model cannot be read, or its weights are not finite; it is unchanged.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> record = prune(net, torch.zeros(1, 4), pruning_ratio=0.5)
        >>> net[0].out_features, record.reached
        (5, 0.5)
    """
    check_model(model)
    model = unwrapped(model)
    limits = Limits(min_channels, round_to)
    request = Request(
        pruning_ratio, of, criterion or Magnitude(), allocation or Uniform(), ignore, heads, limits, constants, trunks
    )
    draft = draft_cut(model, example_inputs, request)
    history.commit(model, draft.cut, draft.record, draft.offsets)
    return draft.record


@dataclass(frozen=True)
class Draft:
    """A cut that was planned and verified but not done.

    Attributes:
        cut: What it does to tensors and attributes.
        record: What will stand in the history.
        offsets: What takes up what the removed channels emit.
        plan: What goes.
        restore: Works the offsets out for the weights of a model; not at hand where the draft is another rank's.
        refits: How well refitted layers reproduce their outputs, where there is a reconstruction.
        nbytes: The most memory that a reconstruction's moments have taken.
        kept: The most memory that it has kept from one pass over the examples to the next.
    """

    cut: Cut
    record: PruneRecord
    offsets: Offsets
    plan: PruningPlan
    restore: Callable[[nn.Module], Offsets] | None
    refits: tuple[Refit, ...] = ()
    nbytes: int = 0
    kept: int = 0

    def sent(self) -> Draft:
        """Return what other ranks need of it."""
        return replace(self, restore=None)

    def received(self, first: Draft) -> Draft:
        """Return the draft of the first rank, with what this one has kept of its own."""
        return replace(first, restore=self.restore)

    def digest(self) -> str:
        """Return a hash of what it does."""
        return hashlib.sha256(repr(self.record).encode()).hexdigest()

    def offsets_in(self, copy: nn.Module) -> Offsets:
        """Return the offsets in a copy of the model that has other weights."""
        with selected(copy, self.cut.selects):
            found = Offsets() if self.restore is None else self.restore(copy)
        return Offsets(found.added, {name: bias for name, bias in found.biases.items() if name in self.cut.biases})


def draft_cut(model: nn.Module, example_inputs: ExampleInputs, request: Request, sights: Sights | None = None) -> Draft:
    """Read, score, allocate, verify and reconstruct; the model is not changed.

    A group whose cut would not work is frozen with the reason, and the rest is planned anew.
    """
    if request.reconstruction is not None:
        check_restorable(model)
    with ungated(model):
        selects = _selects(model, example_inputs, request)
        with selected(model, selects):
            draft = _draft(model, example_inputs, request, sights or Sights())
    cut, record = replace(draft.cut, selects=selects), replace(draft.record, selects=selects)
    return replace(draft, cut=_with_gates(model, cut), record=record)


def _with_gates(model: nn.Module, cut: Cut) -> Cut:
    """Let the gates of the channels that go, go with them; no record tells of it, since gates do not last."""
    gates = gates_of(model)
    if gates is None:
        return cut
    gates.check_parted(cut.selects)
    kept = gates.kept(model, cut.kept)
    tensors = named_tensors(model)
    shapes = {name: tuple(tensors[name].shape) for name in kept}
    return replace(cut, kept={**cut.kept, **kept}, shapes={**cut.shapes, **shapes})


@contextmanager
def reading(model: nn.Module, example_inputs: ExampleInputs, request: Request) -> Iterator[Graph]:
    """Read a model as a cut would: for a while it is the one that was read, with trunks parted where asked for."""
    with ungated(model), selected(model, _selects(model, example_inputs, request)):
        yield read(model, example_inputs, request.ignore, request.heads)


def _selects(model: nn.Module, example_inputs: ExampleInputs, request: Request) -> tuple[str, ...]:
    """Name the layers that get one before them to pick channels with."""
    if request.trunks == "whole":
        return ()
    graph = read(model, example_inputs, request.ignore, request.heads)
    ignored = ignored_tensors(model, request.ignore)
    return trunk_readers(model, graph, ignored, convolutions=request.trunks == "sampled")


def _draft(model: nn.Module, example_inputs: ExampleInputs, request: Request, sights: Sights) -> Draft:
    graph = read(model, example_inputs, request.ignore, request.heads)
    scores = score_groups(_scorer(model, graph, request, sights), model, graph.groups)
    if not scores:
        frozen = "; ".join(f"{group.name}: {group.frozen}" for group in graph.groups if group.frozen)
        raise NothingToPruneError(
            f"{type(request.criterion).__name__} finds nothing to prune in {type(model).__name__}: "
            f"{frozen or 'no group that it can score'}. Choose another criterion, or loosen `ignore`."
        )
    baseline, costs = Baseline.of(model, graph, scores), Costs(model, graph)
    request = replace(request, allocation=request.allocation.knowing(costs))
    if request.limits.round_to == "auto":
        request = replace(request, limits=request.limits.knowing(costs.liked_multiple()))
    reach, lessons = Reach(model, graph, baseline, request.of, costs), Lessons()
    aim = LatencyAim(model, graph.inputs, request.pruning_ratio, reach.left) if request.of == "latency" else None
    while True:
        wanted = request if aim is None else replace(request, pruning_ratio=aim.target)
        plan = _plan(scores, wanted, baseline, lessons, reach)
        trial = verify(model, graph, plan, prepare(model, graph, plan), lessons.mended)
        if not trial.refused and aim is not None and not aim.is_met(trial.cut, reach(plan)):
            continue
        if not trial.refused:
            restoring = Restoring(graph, plan, trial.mended, request.constants, request.reconstruction, sights)
            offsets, rebuilt = restoring.first(model, request.criterion)
            if rebuilt is not None:
                plan, trial = _as_chosen(model, graph, rebuilt.plan, lessons.mended)
            cut = replace(
                trial.cut,
                before=attributes_of(model, trial.cut.attributes),
                biases={name: len(bias) for name, bias in offsets.biases.items()},
            )
            record = _record(model, graph, plan, replace(trial, cut=cut), request, baseline, lessons.refused)
            if request.of not in RECORDED:
                record = replace(record, reached=reach(plan) if aim is None else aim.reached)
            draft = Draft(cut, record, offsets, plan, restoring.again(plan) if gates_of(model) is None else None)
            return (
                draft
                if rebuilt is None
                else replace(draft, refits=rebuilt.refits, nbytes=rebuilt.nbytes, kept=rebuilt.kept)
            )
        lessons.learn(trial, plan, scores, kinds_of(model, graph.groups))


def _scorer(model: nn.Module, graph: Graph, request: Request, sights: Sights) -> Criterion:
    """Return the criterion, once it has seen what there is to see.

    Where the channels will be chosen when their group is reconstructed, and the widths are the same whatever the
    scores, lots stand in for them.
    """
    criterion = request.criterion
    if request.reconstruction is None or not isinstance(criterion, Gathered):
        return criterion
    if isinstance(criterion, Lasso) and not request.allocation.asks_scores:
        criterion.forget()
        criterion.begin(model, graph)
        return Watched(criterion)
    criterion.look_through(model, graph, sights.batches, sights.all_reduce)
    return criterion


def _as_chosen(model: nn.Module, graph: Graph, plan: PruningPlan, mended: Attributes) -> tuple[PruningPlan, Trial]:
    """Verify a plan whose widths are known to be right, with the channels that a reconstruction has chosen."""
    trial = verify(model, graph, plan, prepare(model, graph, plan), mended)
    if trial.refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in trial.refused.items())
        raise SurgeryError(f"The cut was refused, the model is unchanged. {reasons}. Put these groups in `ignore`.")
    return plan, trial


def _plan(
    scores: Mapping[str, Tensor], request: Request, baseline: Baseline, lessons: Lessons, reach: Reach
) -> PruningPlan:
    """Share the ratio out; for all units but channels, search for the ratio of channels that gives it."""
    free = {name: values for name, values in scores.items() if name not in lessons.refused}

    def plan_for(ratio: float) -> PruningPlan:
        plan = allocate(free, ratio, request.allocation, request.limits, baseline.channels)
        return lessons.apply(plan, scores, request.limits)

    if request.of == "channels" or request.pruning_ratio == 0:
        return plan_for(request.pruning_ratio)
    return _search(plan_for, reach, request.pruning_ratio)


def _search(
    plan_for: Callable[[float], PruningPlan], reached: Callable[[PruningPlan], float], asked: float
) -> PruningPlan:
    """Find by bisection the smallest plan that reaches what is asked, or the largest that there is."""
    low, high, best = 0.0, 1.0, plan_for(1.0)
    if reached(best) < asked:
        return best
    screen = Console(stderr=True)
    for _ in track(
        range(_SEARCH_STEPS), "Searching the ratio", console=screen, transient=True, disable=not screen.is_terminal
    ):
        middle = (low + high) / 2
        plan = plan_for(middle)
        if len(plan) == len(best):
            high = middle
        elif reached(plan) >= asked:
            high, best = middle, plan
        else:
            low = middle
    return best


def _record(
    model: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    trial: Trial,
    request: Request,
    baseline: Baseline,
    refused: Mapping[str, str],
) -> PruneRecord:
    past = history.history_of(model)
    known = past[0].channels if past else {}
    channels = {}
    for group in graph.groups:
        dense = known[group.name].dense if group.name in known else group.size
        channels[group.name] = Change(dense, group.size, group.size - len(plan.removed.get(group.name, ())))
    cut = trial.cut
    left = count_params(model, cut_shapes(named_tensors(model), cut.kept)) + sum(cut.biases.values())
    params = Change(baseline.params, count_params(model), left)
    macs = Change(baseline.macs, baseline.macs_now, per_example(trial.macs, graph.inputs))
    counted = [channels[name] for name in baseline.channels]
    total = Change(*(sum(getattr(change, part) for change in counted) for part in ("dense", "before", "after")))
    frozen = {group.name: f"frozen: {group.frozen}" for group in graph.groups if group.frozen}
    unscored = dict.fromkeys(
        (name for name in channels if name not in baseline.channels and name not in frozen),
        f"{type(request.criterion).__name__} has no score for it",
    )
    return PruneRecord(
        asked=request.pruning_ratio,
        of=request.of,
        reached={"params": params, "macs": macs}.get(request.of, total).removed,
        channels=channels,
        params=params,
        macs=macs,
        held_back={**frozen, **unscored, **plan.held_back, **refused},
        shapes=cut.shapes,
        kept={name: {dim: tuple(kept.tolist()) for dim, kept in dims.items()} for name, dims in cut.kept.items()},
        attributes=cut.attributes,
        before=cut.before,
        biases=cut.biases,
    )
