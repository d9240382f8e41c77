"""The cut as a transaction: tried out and verified first, then done at once or not at all."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.errors import SurgeryError
from lightning_prune.graph import Graph
from lightning_prune.inputs import tensors_in
from lightning_prune.labels import Flow, LabelArray, Labels, LabelSpace
from lightning_prune.sizes import Size, stale_sizes
from lightning_prune.tensors import named_tensors, swapped
from lightning_prune.trace import Step, run
from lightning_prune.types import Attributes, ChannelGroup, Kept, PruningPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cut:
    """What a plan does to the tensors and attributes of a model.

    Attributes:
        shapes: The shapes before the cut of every tensor that changes.
        kept: What stays of these tensors.
        attributes: The module attributes that hold sizes, with their new values.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)
    attributes: Attributes = field(default_factory=dict)


def remove(model: nn.Module, graph: Graph, plan: PruningPlan) -> Cut:
    """Cut the planned channels out of the model.

    The cut is tried out on tensors without memory first: the cut model runs, its outputs have the shapes of the
    dense model's, and every position that stays goes where it went before, operation by operation. Then all new
    tensors are made, and last they take their places together. Parameters stay the same objects.

    Args:
        model: The model, changed in place.
        graph: A reading of it, by `lightning_prune.graph.read`.
        plan: What goes.

    Returns:
        What was done, for the optimizer and the history.

    Raises:
        SurgeryError: The cut model would not work; `refused` names the groups and the reasons. The model is
            what it was before.
    """
    cut = prepare(model, graph, plan)
    refused = verify(model, graph, plan, cut)
    if refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise SurgeryError(f"The cut was refused, the model is unchanged. {reasons}. Put these groups in `ignore`.")
    apply(model, cut)
    return cut


def prepare(model: nn.Module, graph: Graph, plan: PruningPlan) -> Cut:
    """Work out what a plan does to tensors and attributes, without touching the model."""
    kept = _kept(model, graph.groups, plan)
    before = stale_sizes(model)
    standins = {name: torch.empty_like(tensor, device="meta") for name, tensor in named_tensors(model).items()}
    with torch.no_grad(), swapped(model, {**standins, **cut_shapes(model, kept)}):
        after = stale_sizes(model)
    attributes = {name: _without(values, before.get(name, ())) for name, values in after.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items() if name in kept}
    return Cut(shapes, kept, attributes)


def _without(values: Mapping[str, Size], known: Iterable[str]) -> dict[str, Size]:
    """Leave out attributes that said something of their own before the cut."""
    return {attribute: value for attribute, value in values.items() if attribute not in set(known)}


def _kept(model: nn.Module, groups: Iterable[ChannelGroup], plan: PruningPlan) -> Kept:
    tensors = named_tensors(model)
    stays: dict[tuple[str, int], Tensor] = {}
    for group in groups:
        if group.name in plan.removed:
            for member in group.members:
                place = (member.tensor, member.dim)
                size = tensors[member.tensor].shape[member.dim]
                mask = stays.setdefault(place, torch.ones(size, dtype=torch.bool))
                mask[member.positions[plan.removed[group.name]].reshape(-1)] = False
    kept: dict[str, dict[int, Tensor]] = {}
    for (name, dim), mask in stays.items():
        kept.setdefault(name, {})[dim] = mask.nonzero().squeeze(1)
    return kept


def cut_tensor(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Return a new, smaller tensor in the memory format of the old one."""
    smaller = tensor.detach()
    for dim, positions in kept.items():
        smaller = smaller.index_select(dim, positions.to(tensor.device))
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last):
        return smaller
    return smaller.contiguous(memory_format=last)


def cut_shapes(model: nn.Module, kept: Kept) -> dict[str, Tensor]:
    """Return tensors without memory in the shapes after a cut, for those that change."""
    tensors = named_tensors(model)
    shapes = {name: list(tensors[name].shape) for name in kept}
    for name, dims in kept.items():
        for dim, positions in dims.items():
            shapes[name][dim] = len(positions)
    return {name: torch.empty(shape, dtype=tensors[name].dtype, device="meta") for name, shape in shapes.items()}


def verify(model: nn.Module, graph: Graph, plan: PruningPlan, cut: Cut) -> dict[str, str]:
    """Run the cut model without changing the real one, and return the groups that it refuses, with reasons.

    The cut run must be the dense run with the removed positions left out: the same operations, each with the same
    positions in its outputs, in the same order. Where a failure concerns no group in particular, each is tried alone.
    """
    refused = _try_out(model, graph, plan, cut)
    if not 1 < len(refused) == len(plan.removed):
        return refused
    alone: dict[str, str] = {}
    for name, indices in plan.removed.items():
        part = PruningPlan({name: indices})
        alone |= _try_out(model, graph, part, prepare(model, graph, part))
    return alone or refused


def _try_out(model: nn.Module, graph: Graph, plan: PruningPlan, cut: Cut) -> dict[str, str]:
    """Run the cut model and compare; return the groups that failures concern, or all where that is not known."""
    fate = _Fate(graph, plan)
    for setting, dense in graph.runs.items():
        flow = Flow(LabelSpace(fate.count))
        tensors = {**named_tensors(model), **_smaller(model, cut, real=setting.substrate != "meta")}
        try:
            after = run(model, graph.inputs, setting, flow, tensors, _labels_left(graph, cut.kept), cut.attributes)
        except Exception as error:
            log.debug("the cut model fails", exc_info=error)
            operation, arguments = flow.current
            involved = [labels for tensor in tensors_in(arguments) for labels in flow.of(tensor)]
            return fate.refuse(involved, f"the cut model fails in {operation or 'its forward'}: {error}")
        for old, new in zip_longest(_telling(dense.steps), _telling(after.steps)):
            if old is None or new is None or not fate.agrees(old, new):
                at = old or new
                assert at is not None
                involved = [labels for _, parts in at.outputs for labels in parts]
                return fate.refuse(involved, f"the cut would move its channels in {at.name}")
        if after.outputs != dense.outputs:
            return fate.refuse([], f"the cut model returns shapes {after.outputs} in place of {dense.outputs}")
    return {}


_SAME_PLACE = ("aten.clone.default", "aten.alias.default", "aten.detach.default", "aten.contiguous.default")
_VIEWS = ("aten._unsafe_view.default", "aten._reshape_alias.default", "aten.reshape.default", "aten.view.default")


def _telling(steps: Iterable[Step]) -> Iterator[Step]:
    """Leave out copies, which depend on strides, and call all views the same."""
    for step in steps:
        if step.name in _VIEWS:
            yield replace(step, name="aten.view.default")
        elif step.name not in _SAME_PLACE:
            yield step


def _labels_left(graph: Graph, kept: Kept) -> dict[str, Labels]:
    """Return the labels of the positions that stay."""
    return {
        name: tuple(
            None if part is None else part[kept[name][dim].numpy()] if dim in kept.get(name, {}) else part
            for dim, part in enumerate(labels)
        )
        for name, labels in graph.labels.items()
    }


class _Fate:
    """Who goes and who stays, told by label.

    Args:
        graph: A reading of the model.
        plan: What goes.
    """

    def __init__(self, graph: Graph, plan: PruningPlan) -> None:
        self.count = sum(len(part) for labels in graph.labels.values() for part in labels if part is not None)
        self._plan = plan
        self._owner: dict[int, str] = {}
        goes = np.zeros(len(graph.roots), dtype=bool)
        for group in graph.groups:
            if group.name in plan.removed:
                first = group.members[0]
                place = graph.labels[first.tensor][first.dim]
                assert place is not None
                roots = graph.roots[place[first.positions[:, 0].numpy()]]
                goes[roots[plan.removed[group.name].numpy()]] = True
                self._owner.update(dict.fromkeys(roots.tolist(), group.name))
        self._roots = graph.roots
        self._goes = goes[graph.roots]

    def agrees(self, old: Step, new: Step) -> bool:
        """Tell whether a step after the cut is the old one with the removed positions left out."""
        return (
            old.name == new.name
            and len(old.outputs) == len(new.outputs)
            and all(
                len(shape) == len(shape_now) and all(map(self._same, shape, labels, shape_now, labels_now))
                for (shape, labels), (shape_now, labels_now) in zip(old.outputs, new.outputs, strict=True)
            )
        )

    def _same(self, size: int, labels: LabelArray | None, size_now: int, labels_now: LabelArray | None) -> bool:
        """Compare one dimension; labels that were made on the way have no number to go by, only a count."""
        if labels is None:
            return size == size_now
        expected = labels[~self._goes[labels]]
        if len(expected) != size_now:
            return False
        if labels_now is None:
            return True
        known = (expected < self.count) & (labels_now < self.count)
        return bool((expected[known] == labels_now[known]).all())

    def refuse(self, involved: Iterable[LabelArray | None], reason: str) -> dict[str, str]:
        """Return the planned groups that labels belong to, or all of the plan where those tell nothing."""
        known = [labels[labels < self.count] for labels in involved if labels is not None]
        roots = np.unique(np.concatenate([self._roots[labels] for labels in known])).tolist() if known else []
        names = dict.fromkeys(self._owner[root] for root in roots if root in self._owner)
        return dict.fromkeys(names or self._plan.removed, reason)


def _smaller(model: nn.Module, cut: Cut, *, real: bool) -> dict[str, Tensor]:
    if not real:
        return cut_shapes(model, cut.kept)
    tensors = named_tensors(model)
    return {name: cut_tensor(tensors[name], dims) for name, dims in cut.kept.items()}


def apply(model: nn.Module, cut: Cut) -> None:
    """Make all new tensors, then put them in their places; if anything fails, everything is what it was."""
    tensors = {name: tensor for name, tensor in named_tensors(model).items() if name in cut.kept}
    with torch.inference_mode(False), torch.no_grad():
        smaller = {name: cut_tensor(tensor, cut.kept[name]) for name, tensor in tensors.items()}
        gradients = {
            name: cut_tensor(tensor.grad, cut.kept[name]) for name, tensor in tensors.items() if tensor.grad is not None
        }
        _put_in_place(model, tensors, smaller, gradients, cut.attributes)


def _put_in_place(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    smaller: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    attributes: Attributes,
) -> None:
    modules = dict(model.named_modules())
    before = {name: (tensor.data, tensor.grad) for name, tensor in tensors.items()}
    sizes = {name: {key: getattr(modules[name], key) for key in values} for name, values in attributes.items()}
    try:
        for name, data in smaller.items():
            _exchange(tensors[name], data, gradients.get(name))
        for name, values in attributes.items():
            modules[name].__dict__.update(values)
    except BaseException:
        for name, (data, gradient) in before.items():
            _exchange(tensors[name], data, gradient)
        for name, values in sizes.items():
            modules[name].__dict__.update(values)
        raise


def _exchange(tensor: Tensor, data: Tensor, gradient: Tensor | None) -> None:
    """Give a tensor other data and keep its identity.

    A gradient accumulator that is still alive expects the old shape. It is dropped only when type or device
    change (torch/csrc/autograd/variable.cpp, VariableHooks::set_data), hence the detour through another dtype.
    """
    tensor.grad = None
    if tensor.requires_grad:
        other = torch.float32 if tensor.dtype is torch.float16 else torch.float16
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
    tensor.grad = gradient
