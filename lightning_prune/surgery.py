"""The cut as a transaction: tried out and verified first, then done at once or not at all."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.errors import SurgeryError
from lightning_prune.graph import Graph
from lightning_prune.handlers import tensors_in
from lightning_prune.labels import Flow, LabelArray, Labels, LabelSpace
from lightning_prune.sizes import stale_sizes
from lightning_prune.tensors import named_tensors, swapped
from lightning_prune.trace import run
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
    dense model's, and the labels of what stayed flow as they did before, so that nothing has shifted. Then all new
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
    with torch.no_grad(), swapped(model, cut_shapes(model, kept)):
        attributes = stale_sizes(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items() if name in kept}
    return Cut(shapes, kept, attributes)


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
    """Run the cut model without changing the real one, and return the groups that it refuses, with reasons."""
    cast = _Cast(model, graph.groups)
    for setting, shapes in graph.runs.items():
        flow = Flow(LabelSpace(len(cast.owner)))
        tensors = {**named_tensors(model), **_smaller(model, cut, real=setting.substrate != "meta")}
        try:
            found, _ = run(model, graph.inputs, setting, flow, tensors, cast.labels(cut.kept), cut.attributes)
        except Exception as error:
            log.debug("the cut model fails", exc_info=error)
            operation, arguments = flow.current
            involved = np.concatenate([cast.nobody, *_labels_of(flow, arguments)])
            reason = f"the cut model fails in {operation or 'its forward'}: {error}"
            return cast.refuse(involved, plan, reason)
        apart = cast.torn(flow)
        if len(apart):
            return cast.refuse(apart, plan, "its channels would meet others than before the cut")
        if found != shapes:
            return cast.refuse(cast.nobody, plan, f"the cut model returns shapes {found} in place of {shapes}")
    return {}


def _smaller(model: nn.Module, cut: Cut, *, real: bool) -> dict[str, Tensor]:
    if not real:
        return cut_shapes(model, cut.kept)
    tensors = named_tensors(model)
    return {name: cut_tensor(tensors[name], dims) for name, dims in cut.kept.items()}


def _labels_of(flow: Flow, arguments: object) -> list[LabelArray]:
    return [labels for tensor in tensors_in(arguments) for labels in flow.of(tensor) if labels is not None]


class _Cast:
    """One label for each channel that may go; label 0 is everything that stays.

    Args:
        model: The model before the cut.
        groups: Its channel groups.
    """

    def __init__(self, model: nn.Module, groups: Iterable[ChannelGroup]) -> None:
        tensors = named_tensors(model)
        self._places: dict[str, list[LabelArray]] = {
            name: [np.zeros(size, dtype=np.int64) for size in tensor.shape] for name, tensor in tensors.items()
        }
        self.owner = [""]
        self.nobody: LabelArray = np.zeros(0, dtype=np.int64)
        for group in groups:
            if not group.frozen:
                channels = np.arange(len(self.owner), len(self.owner) + group.size)
                self.owner.extend([group.name] * group.size)
                for member in group.members:
                    self._places[member.tensor][member.dim][member.positions.numpy()] = channels[:, None]

    def labels(self, kept: Kept) -> dict[str, Labels]:
        """Return the labels that stay on each tensor."""
        return {
            name: tuple(
                place[kept[name][dim].numpy()] if dim in kept.get(name, {}) else place
                for dim, place in enumerate(places)
            )
            for name, places in self._places.items()
        }

    def torn(self, flow: Flow) -> LabelArray:
        """Return the channels that were tied to others, or frozen, though they were free before."""
        count = len(self.owner)
        roots = flow.space.roots()[:count]
        moved = np.flatnonzero(roots != np.arange(count))
        frozen = np.flatnonzero(flow.space.reasons()[0][1:count] >= 0) + 1
        return np.concatenate([moved, roots[moved], frozen])

    def refuse(self, labels: LabelArray, plan: PruningPlan, reason: str) -> dict[str, str]:
        """Return the planned groups that the labels belong to, or all of the plan where that tells nothing."""
        names = dict.fromkeys(self.owner[label] for label in labels.tolist() if label < len(self.owner))
        suspects = [name for name in names if name in plan.removed]
        return dict.fromkeys(suspects or plan.removed, reason)


def apply(model: nn.Module, cut: Cut) -> None:
    """Make all new tensors, then put them in their places; if anything fails, everything is what it was."""
    tensors = named_tensors(model)
    smaller = {name: cut_tensor(tensors[name], dims) for name, dims in cut.kept.items()}
    gradients = {
        name: cut_tensor(gradient, cut.kept[name]) for name in cut.kept if (gradient := tensors[name].grad) is not None
    }
    modules = dict(model.named_modules())
    before = {name: (tensors[name].data, tensors[name].grad) for name in smaller}
    sizes = {name: {key: getattr(modules[name], key) for key in values} for name, values in cut.attributes.items()}
    try:
        for name, data in smaller.items():
            _exchange(tensors[name], data, gradients.get(name))
        for name, values in cut.attributes.items():
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
