"""What random networks are made of: steps that print, parts that run, and the list of operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import gcd
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape: TypeAlias = tuple[int, ...]
T = TypeVar("T")

IMAGE, TOKENS, VECTOR = 4, 3, 2
"""Live tensors are told apart by their dimensions: (B, C, H, W), (B, N, C) and (B, C)."""


@dataclass(frozen=True, repr=False)
class Step:
    """One operation of a recipe.

    Attributes:
        op: Its name in `OPS`.
        at: Which of the live tensors that fit it works on, counted back from the newest.
        other: Which one is the second operand, where there is one.
        width: Channels that it makes, where it makes any.
        form: Which of its forms: a divisor, an activation, sizes hard-coded or derived.
    """

    op: str
    at: int = 0
    other: int = 0
    width: int = 8
    form: int = 0

    def __repr__(self) -> str:
        further = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return f"Step({', '.join([repr(self.op), *further])})"

    def pick(self, options: Sequence[T], each: int = 1) -> T:
        """Choose by the form, where `each` consecutive forms choose the same."""
        return options[self.form // each % len(options)]


class Part(nn.Module):
    """One step as a module: `run(part, *tensors)`, with layers, parameters, buffers and sizes as attributes."""

    def __init__(self, run: Callable[..., Any], **own: Any) -> None:
        super().__init__()
        self.run = run
        for name, value in own.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *tensors: Tensor) -> Any:
        return self.run(self, *tensors)


Make: TypeAlias = Callable[..., "Part | None"]


@dataclass(frozen=True)
class Op:
    """An operation that recipes may name.

    Attributes:
        make: Called with the step and the shapes of its sources; None says that they do not fit.
        kinds: The kinds of tensors that it works on.
        sources: How many.
        safe: Whether zeros in channels are passed on as zeros, and count for nothing where channels are mixed.
    """

    make: Make
    kinds: tuple[int, ...]
    sources: int = 1
    safe: bool = True


OPS: dict[str, Op] = {}


def op(name: str, *kinds: int, sources: int = 1, safe: bool = True) -> Callable[[Make], Make]:
    """Enter an operation into `OPS`."""

    def register(make: Make) -> Make:
        OPS[name] = Op(make, kinds or (IMAGE, TOKENS, VECTOR), sources, safe)
        return make

    return register


def axis(kind: int) -> int:
    """Return the dimension of the channels."""
    return 2 if kind == TOKENS else 1


def channels(shape: Shape) -> int:
    return shape[axis(len(shape))]


def divisor(step: Step, *sizes: int) -> int | None:
    """Choose a common divisor greater than 1 of all sizes, or None."""
    common = gcd(*sizes)
    found = [n for n in (2, 4, 3) if common % n == 0 and n < common]
    return step.pick(found, 2) if found else None


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


def over(x: Tensor, vector: Tensor) -> Tensor:
    """Give a vector of channels the dimensions that broadcast over x."""
    return vector[:, None, None] if x.dim() == IMAGE else vector


def last(x: Tensor) -> Tensor:
    """Move the channels of an image last."""
    return x.permute(0, 2, 3, 1) if x.dim() == IMAGE else x


def first(x: Tensor) -> Tensor:
    """Move the channels of an image back."""
    return x.permute(0, 3, 1, 2) if x.dim() == IMAGE else x


ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    F.gelu,
    torch.tanh,
    F.silu,
    lambda x: F.leaky_relu(x, 0.3),
    lambda x: torch.where(x > 0, x, 0.1 * x),
)


class Match(nn.Module):
    """Brings a tensor to another one's extent, and with a layer to its channels if those differ."""

    def __init__(self, have: Shape, want: Shape, *, project: bool = True) -> None:
        super().__init__()
        differs = project and channels(have) != channels(want)
        self.layer = nn.Linear(channels(have), channels(want)) if differs else nn.Identity()

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        x = first(self.layer(last(x)))
        if x.dim() == like.dim() == IMAGE:
            return x if x.shape[2:] == like.shape[2:] else F.adaptive_avg_pool2d(x, like.shape[2:])
        if x.dim() == like.dim() == TOKENS:
            return x if x.shape[1] == like.shape[1] else x.mean(1, keepdim=True)
        x = x.mean((2, 3)) if x.dim() == IMAGE else x.mean(1) if x.dim() == TOKENS else x
        return x[:, :, None, None] if like.dim() == IMAGE else x[:, None] if like.dim() == TOKENS else x
