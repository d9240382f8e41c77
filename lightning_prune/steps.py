"""What a run of a model leaves behind: its operations, with the labels of what they returned and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch._ops import OpOverload

from lightning_prune.labels import Labels


@dataclass(frozen=True, slots=True)
class Work:
    """What an operation costs, by a formula of `torch.utils.flop_counter`, which takes shapes.

    Attributes:
        formula: Takes the operation's arguments, with shapes for tensors, and the output's shape as `out_shape`.
        args: The arguments; for a tensor its shape and its labels.
        out: The shape and the labels of what it returns.
    """

    formula: Callable[..., int]
    args: tuple[Any, ...]
    out: tuple[tuple[int, ...], Labels]

    def flops(self, shape_of: Callable[[tuple[int, ...], Labels], tuple[int, ...]] | None = None) -> int:
        """Count floating point operations, for other shapes if these are given."""

        def shaped(value: Any) -> Any:
            if not isinstance(value, Sized):
                return value
            return value.shape if shape_of is None else shape_of(value.shape, value.labels)

        out = self.out[0] if shape_of is None else shape_of(*self.out)
        return int(self.formula(*map(shaped, self.args), out_shape=out))


class Sized(NamedTuple):
    """What is left of a tensor in a step's work."""

    shape: tuple[int, ...]
    labels: Labels


Origin: TypeAlias = str | int | None
"""Where a tensor comes from: the name of one of the model's, the number of one that a step returned, or outside."""


class Seen(NamedTuple):
    """What is left of a tensor among the arguments of a step."""

    origin: Origin
    dtype: torch.dtype = torch.float32
    strides: tuple[int, ...] = ()


class Step(NamedTuple):
    """One operation of a run.

    Attributes:
        name: The operation's name, as in `aten.add.Tensor`.
        op: The operation.
        args: Its positional arguments, with `Seen` for tensors; none where somebody looks on (see `Watcher`).
        kwargs: Its keyword arguments, likewise.
        results: The numbers of the tensors that it returned, as counted through the run; one that is written to gets
            a new number.
        inputs: The shapes of the tensors that it read.
        outputs: The shape and the labels of each tensor that it returned.
        fresh: The first label and the number of those that were made here, for each time that some were.
        decisions: What was decided here.
        work: What it costs, if that is more than nothing.
        by_value: Whether the size of the outputs depends on values, as in a search for the best boxes.
    """

    name: str
    op: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[tuple[int, ...], Labels], ...]
    fresh: tuple[tuple[int, int], ...] = ()
    decisions: tuple[tuple[int, ...], ...] = ()
    work: Work | None = None
    by_value: bool = False


@dataclass(frozen=True)
class Run:
    """What happened while a model ran.

    Attributes:
        steps: The operations in order.
        outputs: The shapes of the tensors that the model returned.
        returned: The numbers of these tensors.
        unread: The names of the tensors that no operation has read.
    """

    steps: list[Step]
    outputs: list[tuple[int, ...]]
    returned: set[Origin]
    unread: set[str]

    @property
    def macs(self) -> int:
        """The multiply-accumulates, for the whole batch."""
        return sum(step.work.flops() for step in self.steps if step.work) // 2


def seen_in(values: Iterable[Any]) -> list[Seen]:
    """List the tensors among the arguments of a step, those in lists included."""
    found: list[Seen] = []
    for value in values:
        if isinstance(value, Seen):
            found.append(value)
        elif isinstance(value, list):
            found.extend(seen_in(value))
    return found


def numbers_read(step: Step) -> list[int]:
    """List the numbers of the tensors that a step reads, of those that the run has made."""
    return [seen.origin for seen in seen_in((*step.args, *step.kwargs.values())) if isinstance(seen.origin, int)]
