"""A step of a run at other widths: which of its sizes vary together, and the operation that it becomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch

from lightning_prune.cost.operations import Operation, Placed, order_of
from lightning_prune.cost.price import ShapeOf
from lightning_prune.graph import Graph
from lightning_prune.labels import LabelArray, Labels
from lightning_prune.steps import Origin, Seen, Step, seen_in

Width: TypeAlias = bytes
"""A size that can vary, named by the channels that it counts: what counts the same channels has one name."""

Shapes: TypeAlias = list[tuple[int, ...]]

_VIEWS = {"aten._unsafe_view", "aten._reshape_alias", "aten.reshape", "aten.empty"}
"""What moves no data, beside the operations that torch knows as views."""


@dataclass(frozen=True)
class Sized:
    """A tensor that an operation reads, or returns.

    Attributes:
        dense: Its shape in the graph's run.
        labels: The labels of its dimensions there.
        shape: Its shape at the batch size that is priced.
        widths: The names of its dimensions that can vary, or None.
    """

    dense: tuple[int, ...]
    labels: Labels
    shape: tuple[int, ...]
    widths: tuple[Width | None, ...]

    def sizes(self, shape_of: ShapeOf) -> Iterator[tuple[Width, int, int]]:
        """Yield for each dimension that can vary its name, its dense size and its size now, in the graph's run."""
        left = shape_of(self.dense, self.labels)
        for width, dense, now in zip(self.widths, self.dense, left, strict=True):
            if width is not None:
                yield width, dense, now

    def at(self, sizes: Mapping[Width, int]) -> tuple[int, ...]:
        """Return its shape at some widths."""
        return tuple(
            size if width is None or width not in sizes else sizes[width] * size // dense
            for width, dense, size in zip(self.widths, self.dense, self.shape, strict=True)
        )


class Replay:
    """A step of a graph's run that can be done again with tensors of other widths.

    Args:
        step: The step.
        twin: The same step of a run with another batch size, or the step itself.
        origins: What is known of the tensors that the step reads.
        roots: For every label the smallest label that it is tied to.
    """

    def __init__(self, step: Step, twin: Step, origins: Origins, roots: LabelArray) -> None:
        def sized(dense: Sequence[int], labels: Labels | None, shape: Sequence[int]) -> Sized:
            known = labels or (None,) * len(dense)
            widths = tuple(
                roots[part].tobytes() if part is not None and part.size == size else None
                for part, size in zip(known, dense, strict=True)
            )
            return Sized(tuple(dense), known, tuple(shape), widths)

        seen = seen_in((*step.args, *step.kwargs.values()))
        shapes = zip(seen, step.inputs, twin.inputs, strict=True)
        self._read = [sized(dense, origins.labels_of(one), shape) for one, dense, shape in shapes]
        self._made = [
            sized(dense, labels, shape) for (dense, labels), (shape, _) in zip(step.outputs, twin.outputs, strict=True)
        ]
        self._twin, self._held = twin, origins.held
        self.by_value = step.by_value
        self.free = is_free(step)

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution."""
        return self.name.startswith("aten.convolution")

    @property
    def name(self) -> str:
        """The operation's name."""
        return self._twin.name

    def sizes(self, shape_of: ShapeOf) -> dict[Width, tuple[int, int]]:
        """Return for each width its dense size and its size now."""
        tensors = self._read or self._made
        return {width: (dense, now) for one in tensors for width, dense, now in one.sizes(shape_of)}

    @cached_property
    def tied(self) -> bool:
        """Whether its widths hang together in a way that forbids to change one alone: those of convolution groups."""
        groups = self._argument("groups", 1)
        return bool(groups > 1 and self._read[1].shape[1] > 1)

    def at(self, sizes: Mapping[Width, int]) -> Operation:
        """Return the operation at some widths."""
        read = [one.at(sizes) for one in self._read]
        made = [one.at(sizes) for one in self._made]
        shapes = iter(read)

        def placed(value: Any) -> Any:
            if isinstance(value, Seen):
                shape = next(shapes)
                return Placed(shape, value.dtype, order_of(shape, value.strides), value.origin in self._held)
            return [placed(item) for item in value] if isinstance(value, (list, tuple)) else value

        named = {name: placed(value) for name, value in self._arguments()}
        named.update(_sizes_in(named, read, made, [one.shape for one in self._made]))
        return Operation(self._twin.op, tuple(named.items()))

    def _arguments(self) -> Iterator[tuple[str, Any]]:
        """Yield the arguments with their names, in the order in which tensors were counted; none that name a device."""
        names = [argument.name for argument in self._twin.op._schema.arguments]
        yield from zip(names, self._twin.args, strict=False)
        for name, value in self._twin.kwargs.items():
            if name not in ("device", "pin_memory"):
                yield name, value

    def _argument(self, name: str, default: Any) -> Any:
        return dict(self._arguments()).get(name, default)


def is_free(step: Step) -> bool:
    """Tell whether a step moves no data and computes nothing."""
    viewing = bool(step.op.is_view) or torch.Tag.inplace_view in step.op.tags
    return viewing or step.name.rpartition(".")[0] in _VIEWS


def _sizes_in(named: Mapping[str, Any], read: Shapes, made: Shapes, dense: Shapes) -> dict[str, Any]:
    """Return the arguments that hold sizes of the tensors, at the sizes that the tensors have now."""
    found: dict[str, Any] = {}
    if named.get("groups", 1) > 1:
        found["groups"] = _groups(named, read)
    if "normalized_shape" in named:
        found["normalized_shape"] = list(read[0][-len(named["normalized_shape"]) :])
    if {"N", "C", "HxW"} <= named.keys():
        batch, channels, *spatial = read[0]
        found.update(N=batch, C=channels, HxW=torch.Size(spatial).numel())
    if tuple(named.get("size") or ()) == dense[0] != ():
        found["size"] = list(made[0])
    return found


def _groups(named: Mapping[str, Any], read: Shapes) -> int:
    """Return how many groups a convolution has: as many as its weight's inputs go into those of the image."""
    entering, weight = read[0][1], read[1]
    if not named["transposed"]:
        return entering // weight[1]
    return entering if weight[1] == 1 else int(named["groups"])


@dataclass(frozen=True)
class Origins:
    """What is known of the tensors that the steps of a run read.

    Attributes:
        held: The labels of those that the model holds, and that are views of such.
        made: The labels of those that steps made.
    """

    held: Mapping[Origin, Labels]
    made: Mapping[Origin, Labels]

    @classmethod
    def of(cls, graph: Graph, steps: Sequence[Step]) -> Origins:
        """Follow the steps of a run of the graph."""
        held: dict[Origin, Labels] = dict(graph.labels.items())
        made: dict[Origin, Labels] = {}
        for step in steps:
            read = seen_in((*step.args, *step.kwargs.values()))
            views = step.op.is_view and read and read[0].origin in held
            for number, (_, labels) in zip(step.results, step.outputs, strict=True):
                (held if views else made)[number] = labels
        return cls(held, made)

    def labels_of(self, seen: Seen) -> Labels | None:
        """Return the labels of a tensor; those from outside have none."""
        return self.held.get(seen.origin) or self.made.get(seen.origin)
