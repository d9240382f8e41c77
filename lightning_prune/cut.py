"""What a plan does to the tensors and the attributes of a model, worked out without touching it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.graph import Graph
from lightning_prune.sizes import Size, stale_sizes
from lightning_prune.tensors import named_modules, named_tensors, swapped
from lightning_prune.types import Attributes, ChannelGroup, Kept, PruningPlan


@dataclass(frozen=True)
class Cut:
    """What a plan does to the tensors and attributes of a model.

    Attributes:
        shapes: The shapes before the cut of every tensor that changes.
        kept: What stays of these tensors.
        attributes: The module attributes that hold sizes, with their new values.
        before: The values that these attributes had.
        biases: Name of a linear or convolutional module -> the width of the bias that it gets, having had none.
        selects: Names of the modules that get a `ChannelSelect` before them, before all else; other names are those
            after that.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)
    attributes: Attributes = field(default_factory=dict)
    before: Attributes = field(default_factory=dict)
    biases: Mapping[str, int] = field(default_factory=dict)
    selects: Sequence[str] = ()

    def renamed(self, name: str) -> str:
        """Return a tensor's name after the cut: its module stands second, behind the `ChannelSelect` that it got."""
        return renamed(name, self.selects)


def renamed(name: str, selects: Sequence[str]) -> str:
    """Return the name that a tensor has once some modules stand behind a `ChannelSelect`."""
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.1.{leaf}" if owner in selects else name


@dataclass(frozen=True)
class Offsets:
    """What is added to a model's tensors in a cut, so that what its channels emitted is not lost.

    Attributes:
        added: Tensor name -> what is added to it, of its shape before the cut.
        biases: Module name -> the values of the bias that it gets, of its width after the cut.
    """

    added: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)


def prepare(model: nn.Module, graph: Graph, plan: PruningPlan) -> Cut:
    """Work out what a plan does to tensors and attributes, without touching the model."""
    tensors = named_tensors(model)
    kept = _kept(tensors, graph.groups, plan)
    weightless = _weightless(tensors) if _has_computed_weights(model) else {}
    with torch.no_grad(), swapped(model, weightless) if weightless else nullcontext():
        before = stale_sizes(model)
    with torch.no_grad(), swapped(model, {**weightless, **cut_shapes(tensors, kept)}):
        after = stale_sizes(model)
    attributes = {name: _without(values, before.get(name, ())) for name, values in after.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name in kept}
    return Cut(shapes, kept, attributes)


def _has_computed_weights(model: nn.Module) -> bool:
    """Tell whether to read some weight is to compute it."""
    return any("parametrizations" in module._modules for module in named_modules(model).values())


def _weightless(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }


def _without(values: Mapping[str, Size], known: Iterable[str]) -> dict[str, Size]:
    """Leave out attributes that said something of their own before the cut."""
    return {attribute: value for attribute, value in values.items() if attribute not in set(known)}


def _kept(tensors: Mapping[str, Tensor], groups: Iterable[ChannelGroup], plan: PruningPlan) -> Kept:
    stays: dict[tuple[str, int], NDArray[np.bool_]] = {}
    for group in groups:
        if group.name in plan.removed:
            gone = plan.removed[group.name].numpy()
            for member in group.members:
                place = (member.tensor, member.dim)
                size = tensors[member.tensor].shape[member.dim]
                mask = stays.setdefault(place, np.ones(size, dtype=bool))
                mask[member.positions.numpy()[gone]] = False
    kept: dict[str, dict[int, Tensor]] = {}
    for (name, dim), mask in stays.items():
        kept.setdefault(name, {})[dim] = torch.from_numpy(np.flatnonzero(mask))
    return kept


_LARGE = 2**22
"""Tensors of more elements are cut in pieces: one between the steps would be as large as they are."""

_PIECE = 2**18
"""So many elements are cut at a time."""


def cut_tensor(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Return a new, smaller tensor in the memory format of the old one."""
    places = {dim: kept[dim].to(tensor.device) for dim in sorted(kept)}  # rows first: each piece is of its own rows
    large = 0 in places and len(places) > 1 and tensor.numel() > _LARGE
    return _in_format_of(tensor, (_cut_in_pieces if large else _cut_whole)(tensor.detach(), places))


def _cut_whole(tensor: Tensor, places: Mapping[int, Tensor]) -> Tensor:
    """Select positions along one dimension after the other."""
    for dim, positions in places.items():
        tensor = tensor.index_select(dim, positions)
    return tensor


def _cut_in_pieces(tensor: Tensor, places: Mapping[int, Tensor]) -> Tensor:
    """Select positions row by row: what comes between takes no memory that has to be asked for."""
    shape = [len(places[dim]) if dim in places else size for dim, size in enumerate(tensor.shape)]
    whole, rows = tensor.new_empty(shape), max(_PIECE // tensor[0].numel(), 1)
    for piece, positions in zip(whole.split(rows), places[0].split(rows), strict=True):
        piece.copy_(_cut_whole(tensor, {**places, 0: positions}))
    return whole


def uncut_tensor(tensor: Tensor, kept: Mapping[int, Tensor], shape: Sequence[int]) -> Tensor:
    """Return a tensor of the shape before a cut, with zeros for what had gone, in the memory format of the cut one."""
    whole = tensor.detach().new_zeros(tuple(shape))
    places = [
        kept.get(dim, torch.arange(size)).to(tensor.device).view([-1 if at == dim else 1 for at in range(len(shape))])
        for dim, size in enumerate(shape)
    ]
    whole[tuple(places)] = tensor.detach()
    return _in_format_of(tensor, whole)


def _in_format_of(model: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor in the memory format of another one."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(model.dim())
    if last is None or model.is_contiguous() or not model.is_contiguous(memory_format=last):
        return tensor
    return tensor.contiguous(memory_format=last)


def cut_shapes(tensors: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Return tensors without memory in the shapes after a cut, for those that change."""
    shapes = {name: list(tensors[name].shape) for name in kept}
    for name, dims in kept.items():
        for dim, positions in dims.items():
            shapes[name][dim] = len(positions)
    return {name: torch.empty(shape, dtype=tensors[name].dtype, device="meta") for name, shape in shapes.items()}


def standins(tensors: Mapping[str, Tensor], cut: Cut, *, real: bool) -> dict[str, Tensor]:
    """Return tensors in the shapes after a cut, with the values that stay or without memory."""
    if not real:
        return cut_shapes(tensors, cut.kept)
    return {name: cut_tensor(tensors[name], dims) for name, dims in cut.kept.items()}
