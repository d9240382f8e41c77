"""An operation as it is timed: its name, the shapes of its tensors and its other arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload


class Placed(NamedTuple):
    """What of a tensor decides how long an operation takes.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        order: Its dimensions as they lie in memory, outermost first.
        held: Whether the model holds it, so that it was last read a whole forward pass ago.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    held: bool

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return torch.Size(self.shape).numel()

    def strides(self) -> tuple[int, ...]:
        """Return the strides of a dense tensor of this order."""
        strides, step = [0] * len(self.shape), 1
        for dim in reversed(self.order):
            strides[dim], step = step, step * max(self.shape[dim], 1)
        return tuple(strides)

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        order = "" if self.order == tuple(range(len(self.shape))) else " in " + "".join(map(str, self.order))
        return f"{'held ' if self.held else ''}{str(self.dtype).removeprefix('torch.')}[{sizes}{order}]"


@dataclass(frozen=True)
class Operation:
    """One operation, ready to be timed.

    Attributes:
        op: What is called.
        args: Its arguments with the names of the schema, with `Placed` for tensors; none that name a device.
    """

    op: OpOverload
    args: tuple[tuple[str, Any], ...]

    @cached_property
    def key(self) -> str:
        """What a table of timings calls it."""
        return f"{self.op}({', '.join(f'{name}={_text(value)}' for name, value in self.args)})"

    @property
    def tensors(self) -> list[Placed]:
        """Its tensors in order."""
        return list(_placed_in([value for _, value in self.args]))

    def bound(self, make: Callable[[Placed], Tensor], device: torch.device) -> Callable[[], Any]:
        """Return a call of the operation.

        Args:
            make: Makes each of its tensors.
            device: Where an operation that makes tensors of nothing makes them.
        """

        def real(value: Any) -> Any:
            if isinstance(value, Placed):
                return make(value)
            return [real(item) for item in value] if isinstance(value, list) else value

        arguments = self.op._schema.arguments
        named = {name: real(value) for name, value in self.args}
        if any(argument.name == "device" for argument in arguments):
            named["device"] = device
        places = takewhile(lambda argument: not argument.kwarg_only and argument.name in named, arguments)
        given = [named.pop(argument.name) for argument in places]
        op = self.op
        return lambda: op(*given, **named)


def order_of(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Return the dimensions of a tensor as they lie in memory, outermost first; those of size 1 can lie anywhere."""
    long = [dim for dim, size in enumerate(shape) if size > 1 and strides]
    order = sorted(long, key=lambda dim: -strides[dim])
    dims = range(len(shape))
    return tuple(dims if order == long else sorted(dims, key=lambda dim: -strides[dim]))


def _text(value: Any) -> str:
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else str(value)


def _placed_in(values: list[Any]) -> Iterator[Placed]:
    for value in values:
        if isinstance(value, Placed):
            yield value
        elif isinstance(value, list):
            yield from _placed_in(value)
