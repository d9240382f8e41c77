"""Where a layer reads a shared trunk, a `ChannelSelect` before it lets it choose its own channels."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_prune.graph import Graph
from lightning_prune.handlers import Call
from lightning_prune.handlers.normalization import is_batch_norm
from lightning_prune.layers import ChannelSelect
from lightning_prune.steps import Run, Seen, Step, numbers_read, seen_in
from lightning_prune.tensors import named_modules

aten = torch.ops.aten

_MAKERS = (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.index_select)
"""Operations that make channels of their own for those who read them."""


def can_select(module: object) -> bool:
    """Tell whether a module is one that channels can be picked for: a BatchNorm, or a convolution in one group."""
    return isinstance(module, _BatchNorm) or _is_convolution(module)


def _is_convolution(module: object) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1


def trunk_readers(
    model: nn.Module, graph: Graph, ignored: Iterable[str] = (), *, convolutions: bool = False
) -> tuple[str, ...]:
    """Name the modules whose input somebody else reads too.

    BatchNorms are found in pre-activation networks and DenseNets. Convolutions are found where no such BatchNorm stands
    before them: at the head of a residual branch, and in a shortcut.

    Args:
        model: The model.
        graph: A reading of it.
        ignored: Tensors that are not to be touched.
        convolutions: Whether convolutions are named beside BatchNorms.
    """
    run: Run = next(iter(graph.runs.values()))
    modules, protected = named_modules(model), set(ignored)
    norms = [name for name, module in modules.items() if name and isinstance(module, _BatchNorm)]
    found = _shared(run, {f"{name}.weight" for name in norms} - protected)
    if convolutions:
        with_channels = {member.tensor for group in graph.groups for member in group.members if member.dim == 1}
        weights = {f"{name}.weight" for name, module in modules.items() if name and _is_convolution(module)}
        found += _shared(run, (weights & with_channels) - protected, found)
    return tuple(weight.rpartition(".")[0] for weight in found)


def _shared(run: Run, weights: Collection[str], parted: Collection[str] = ()) -> list[str]:
    """List those of some layers' weights that meet a shared trunk.

    Args:
        run: The run.
        weights: The weights.
        parted: Weights of layers that pick their channels: what they make is shared by nobody.
    """
    trunks = _Trunks(run, parted)
    found: dict[str, None] = {}
    for step in run.steps:
        if is_batch_norm(step.op) or step.op.overloadpacket is aten.convolution:
            call = Call(step.op, step.args, step.kwargs, None)
            weight, source = call["weight"], call["input"].origin
            name = weight.origin if isinstance(weight, Seen) else None
            if name in weights and isinstance(source, int) and trunks.is_shared(source):
                found[str(name)] = None
    return list(found)


class _Trunks:
    """Tells which tensors of a run somebody else reads too, themselves or what they were made from.

    Args:
        run: The run.
        parted: Names of weights that meet channels of their own.
    """

    def __init__(self, run: Run, parted: Collection[str] = ()) -> None:
        self._parted = set(parted)
        self._maker: dict[int, Step] = {}
        self._readers: dict[int, int] = {}
        for step in run.steps:
            self._maker.update(dict.fromkeys(step.results, step))
            for number in set(numbers_read(step)):
                self._readers[number] = self._readers.get(number, 0) + 1

    def is_shared(self, number: int) -> bool:
        """Tell whether a tensor is, or stems from, one that has several readers."""
        waiting, seen = [number], {number}
        while waiting:
            current = waiting.pop()
            if self._readers.get(current, 0) > 1:
                return True
            step = self._maker[current]
            before = () if self._makes(step) else numbers_read(step)
            waiting.extend(number for number in before if number not in seen)
            seen.update(before)
        return False

    def _makes(self, step: Step) -> bool:
        """Tell whether a step makes channels that are not those that it reads."""
        if step.op.overloadpacket in _MAKERS:
            return True
        return any(seen.origin in self._parted for seen in seen_in((*step.args, *step.kwargs.values())))


def insert(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Put a `ChannelSelect` before modules that can have one; return name -> the module that stood there."""
    before = {name: model.get_submodule(name) for name in names}
    for name, module in before.items():
        device = next((tensor.device for tensor in chain(module.parameters(), module.buffers())), "cpu")
        put(model, {name: nn.Sequential(_select(module).to(device), module).train(module.training)})
    return before


def _select(module: nn.Module) -> ChannelSelect:
    """Make a layer that picks all channels for a module; convolutions may read an example without a batch."""
    if isinstance(module, _BatchNorm):
        return ChannelSelect(module.num_features)
    assert isinstance(module, _ConvNd)
    return ChannelSelect(module.in_channels, -1 - len(module.kernel_size))


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in the places of others, by their names."""
    for name, module in modules.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._modules[leaf] = module


@contextmanager
def selected(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Put the layers in for a while."""
    before = insert(model, names)
    try:
        yield
    finally:
        put(model, before)
