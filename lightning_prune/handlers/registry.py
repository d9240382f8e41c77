"""The list of handlers, and the call that a handler explains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from lightning_prune.flow import Flow
from lightning_prune.inputs import flat_tensors


@cache
def _signature(op: OpOverload) -> tuple[dict[str, int], dict[str, Any]]:
    arguments = op._schema.arguments
    places = {argument.name: place for place, argument in enumerate(arguments)}
    return places, {argument.name: argument.default_value for argument in arguments}


@cache
def name_of(op: OpOverload) -> str:
    """Return an operation's name, as in `aten.add.Tensor`."""
    return str(op)


@dataclass(frozen=True)
class Call:
    """One ATen operation as it was called.

    Attributes:
        op: The overload.
        args: Positional arguments.
        kwargs: Keyword arguments.
        out: What it returned.
    """

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors that go in, those in lists included."""
        return flat_tensors((*self.args, *self.kwargs.values()))

    def __getitem__(self, name: str) -> Any:
        """Return the argument that the operation's schema calls `name`, defaults included."""
        if name in self.kwargs:
            return self.kwargs[name]
        places, defaults = _signature(self.op)
        place = places[name]
        return self.args[place] if place < len(self.args) else defaults[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument as `call[name]` does, or a default where the schema has none of that name."""
        return self[name] if name in _signature(self.op)[0] else default

    @property
    def name(self) -> str:
        """The operation's name, as in `aten.add.Tensor`."""
        return name_of(self.op)


Handler: TypeAlias = Callable[[Flow, Call], None]

_handlers: dict[OpOverloadPacket, Handler] = {}
_named: dict[str, Handler] = {}
_pointwise: list[Handler] = []


def handles(*ops: OpOverloadPacket) -> Callable[[Handler], Handler]:
    """Register a handler for all overloads of the operations and for their in-place twins."""

    def register(handler: Handler) -> Handler:
        _handlers.update(dict.fromkeys(ops, handler))
        handler_for.cache_clear()
        return handler

    return register


def handles_named(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for operations of other libraries, by their qualified names."""

    def register(handler: Handler) -> Handler:
        _named.update(dict.fromkeys(names, handler))
        handler_for.cache_clear()
        return handler

    return register


def handles_pointwise(handler: Handler) -> Handler:
    """Register the handler of every operation that torch tags as pointwise."""
    _pointwise.append(handler)
    handler_for.cache_clear()
    return handler


def packets(names: str) -> list[OpOverloadPacket]:
    """Look up ATen operations by name; those that this version of torch does not have are left out."""
    return [getattr(torch.ops.aten, name) for name in names.split() if hasattr(torch.ops.aten, name)]


@cache
def handler_for(op: OpOverload) -> Handler | None:
    """Find the handler of an operation, of its functional twin, or of all pointwise operations."""
    if torch.Tag.pointwise in op.tags:
        return _pointwise[0]
    if op._schema.name in _named:
        return _named[op._schema.name]
    name = op._schema.name.removeprefix("aten::")
    for packet in [op.overloadpacket, *packets(name.removesuffix("_"))]:
        if packet in _handlers:
            return _handlers[packet]
        if any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()):
            return _pointwise[0]
    return None
