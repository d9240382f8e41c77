"""Which layers read the channels of a group: where a channel is heard, and could be turned off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.criteria.summing import keeps_places, summed_up
from lightning_prune.graph import Graph
from lightning_prune.steps import Run, seen_in
from lightning_prune.tensors import named_modules, named_tensors
from lightning_prune.types import Member


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels of a group.

    Attributes:
        module: The layer's name.
        positions: Integer tensor of shape (size, k): where each channel lies along `channel_dim` of the layer's input.
    """

    module: str
    positions: Tensor


def channel_dim(module: nn.Module) -> int:
    """Return the dimension of a layer's input along which the channels lie: 1 for convolutions, else the last."""
    return 1 if isinstance(module, _ConvNd) else -1


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight with which a layer reads its input."""
    weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
    assert isinstance(weight, Tensor)
    return weight


def along_input(module: nn.Module, values: Tensor) -> Tensor:
    """Sum values of a weight's shape over all that reads the same channel of the layer's input: (channels,)."""
    if isinstance(module, _ConvTransposeNd):
        return values.flatten(1).sum(1)
    if isinstance(module, _ConvNd):
        parts: Tensor = values.flatten(2).sum(2).unflatten(0, (module.groups, -1))
        return parts.sum(1).flatten()
    return values.sum(0)


def readers_of(model: nn.Module, graph: Graph) -> dict[str, tuple[Reader, ...]]:
    """Find the layers that read each group, where all of them are modules whose input can be watched.

    To set to 0 what they read of a channel is to remove it: each way out of a group leads through exactly one reader,
    whatever residual sums and depthwise layers lie before it. Watched are linear and convolutional layers, and
    `MultiheadAttention`. Frozen groups are left out, those whose weights take part in something else (a functional
    call, a recurrent layer, the projection inside of `MultiheadAttention`), and those that are summed up without a
    weight, as by a mean over channels or a product of two activations.

    Returns:
        Group name -> its readers.
    """
    places = _Places(model, graph)
    summed = summed_up(graph)
    found = {
        group.name: places.readers(group.members)
        for group in graph.groups
        if not group.frozen and group.name not in summed
    }
    return {name: readers for name, readers in found.items() if readers}


class _Places:
    """Where a model holds its tensors, and which of them are weights of a product."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._tensors = named_tensors(model)
        self._modules = named_modules(model)
        self._weights = set[str]().union(*map(_weights, graph.runs.values()))
        self._holders: dict[int, list[tuple[str, str]]] = {}
        for name, module in self._modules.items():
            for key, parameter in module._parameters.items():
                self._holders.setdefault(id(parameter), []).append((name, key))

    def readers(self, members: tuple[Member, ...]) -> tuple[Reader, ...]:
        """Return the readers among a group's members; none where one of them cannot be told or watched."""
        found: list[Reader] = []
        for member in members:
            tensor = self._tensors[member.tensor]
            if tensor.dim() < 2 or member.tensor not in self._weights:
                continue
            for name, key in self._holders.get(id(tensor), [(member.tensor, "")]):
                positions = self._read(name, key, member)
                if positions is None:
                    return ()
                if len(positions):
                    found.append(Reader(_computing(name), positions))
        return tuple(found)

    def _read(self, name: str, key: str, member: Member) -> Tensor | None:
        """Return the positions that a layer reads with one of its weights, none if it makes them; None: not known."""
        module, outer = self._modules.get(_computing(name)), self._modules.get(name.rpartition(".")[0])
        if isinstance(module, nn.MultiheadAttention):
            return member.positions if (key, member.dim) == ("in_proj_weight", 1) else _made(member.dim == 0)
        if isinstance(outer, nn.MultiheadAttention):  # it does not call its projection
            return _made(member.dim == 0)
        if not isinstance(module, (nn.Linear, _ConvNd)):
            return None
        transposed = isinstance(module, _ConvTransposeNd)
        if isinstance(module, _ConvTransposeNd) and module.groups == module.in_channels > 1:
            return _made(True)
        if member.dim != (0 if transposed else 1):
            return _made(member.dim == (1 if transposed else 0))
        return member.positions if transposed else _in_all_parts(member.positions, module)


_NOTHING = torch.empty(0, 0, dtype=torch.int64)


def _made(known: bool) -> Tensor | None:
    return _NOTHING if known else None


def _computing(name: str) -> str:
    """Return the module whose weight is computed by a parametrization, for a module inside of it."""
    owner, found, _ = name.rpartition(".parametrizations.")
    return owner if found else name.removesuffix("parametrizations.weight").removesuffix(".")


def _in_all_parts(positions: Tensor, module: nn.Module) -> Tensor:
    """Return what convolution groups read: position i of a kernel is the i-th of each of them."""
    groups = module.groups if isinstance(module, _ConvNd) else 1
    if groups == 1:
        return positions
    assert isinstance(module, _ConvNd)
    each = module.in_channels // groups
    return torch.cat([positions + part * each for part in range(groups)], 1)


def _weights(run: Run) -> set[str]:
    """Name the tensors that, by themselves or with other tensors of the model, make a factor of a product."""
    made: dict[int, frozenset[str]] = {}
    found: set[str] = set()
    for step in run.steps:
        origins = [seen.origin for seen in seen_in((*step.args, *step.kwargs.values()))]
        own = [frozenset([o]) if isinstance(o, str) else made.get(o) for o in origins if o is not None]
        known = [names for names in own if names is not None]
        names = frozenset[str]().union(*known)
        if known and len(known) == len(origins):
            made.update(dict.fromkeys(step.results, names))
        elif not keeps_places(step.op):
            found |= names
    return found
