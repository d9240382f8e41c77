"""Where a BatchNorm reads a shared trunk, a `ChannelSelect` before it lets it choose its own channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.graph import Graph
from lightning_prune.handlers import Call
from lightning_prune.handlers.normalization import is_batch_norm
from lightning_prune.layers import ChannelSelect
from lightning_prune.steps import Run, Seen, Step, numbers_read
from lightning_prune.tensors import named_modules

aten = torch.ops.aten

_MAKERS = (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.index_select)
"""Operations that make channels of their own for those who read them."""


def trunk_norms(model: nn.Module, graph: Graph, ignored: Iterable[str] = ()) -> tuple[str, ...]:
    """Name the BatchNorm modules whose input somebody else reads too: in pre-activation networks and DenseNets.

    Args:
        model: The model.
        graph: A reading of it.
        ignored: Tensors that are not to be touched.
    """
    run: Run = next(iter(graph.runs.values()))
    trunks = _Trunks(run)
    protected = set(ignored)
    modules = named_modules(model)
    names: list[str] = []
    for step in run.steps:
        weight, source = _norm(step)
        name = str(weight).rpartition(".")[0]
        alone = isinstance(modules.get(name), _BatchNorm) and name and weight not in protected
        if alone and source is not None and trunks.is_shared(source) and name not in names:
            names.append(name)
    return tuple(names)


def _norm(step: Step) -> tuple[object, int | None]:
    """Return the name of a batch normalisation's weight and the number of its input."""
    if not is_batch_norm(step.op):
        return None, None
    call = Call(step.op, step.args, step.kwargs, None)
    weight, source = call["weight"], call["input"].origin
    return (weight.origin if isinstance(weight, Seen) else None), (source if isinstance(source, int) else None)


class _Trunks:
    """Tells which tensors of a run somebody else reads too, themselves or what they were made from."""

    def __init__(self, run: Run) -> None:
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
            before = () if step.op.overloadpacket in _MAKERS else numbers_read(step)
            waiting.extend(number for number in before if number not in seen)
            seen.update(before)
        return False


def insert(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Put a `ChannelSelect` before BatchNorm modules; return name -> the module that stood there."""
    before = {name: model.get_submodule(name) for name in names}
    for name, norm in before.items():
        assert isinstance(norm, _BatchNorm)
        select = ChannelSelect(norm.num_features).to(
            norm.running_mean.device if norm.running_mean is not None else "cpu"
        )
        put(model, {name: nn.Sequential(select, norm).train(norm.training)})
    return before


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
