"""What a plan costs in milliseconds: the sum of what its operations take, from a table of timings."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import nn

from lightning_prune.cost.clock import batch_of
from lightning_prune.cost.grid import corners
from lightning_prune.cost.operations import Operation
from lightning_prune.cost.price import ShapeOf
from lightning_prune.cost.replay import Origins, Replay, Width
from lightning_prune.cost.stopwatch import Bench, Stopwatch
from lightning_prune.cost.timings import LatencyTable, Machine
from lightning_prune.fate import Fate
from lightning_prune.flow import Flow
from lightning_prune.graph import Graph
from lightning_prune.inputs import tensors_in
from lightning_prune.labels import LabelSpace
from lightning_prune.steps import Step
from lightning_prune.tensors import named_tensors, unwrapped
from lightning_prune.trace import Setting, run
from lightning_prune.types import PruningPlan

log = logging.getLogger(__name__)

Point: TypeAlias = tuple[float, Mapping[Width, int]]
"""Widths of a step at which its operation is timed, and their share in its price."""

Place: TypeAlias = tuple[int, tuple[int, ...]]
"""A step, and its widths."""


class LatencyPrice:
    """Milliseconds of the steps of a model's forward pass in eval mode, at any widths.

    Every operation is timed alone, at the widths of a grid (`lightning_prune.cost.grid`); between them the time is
    interpolated. Times are measured when they are first asked for, and remembered on disk. Views are free. What cannot
    be done alone counts as nothing and is named once in the log.

    Args:
        graph: A reading of the model.
        model: The model that was read; it tells the device, and the shapes at another batch size.
        batch_size: How many examples a forward pass takes, >= 1; those of the graph's inputs if None.
        table: What has been measured; what this machine's cache holds if None.
        stopwatch: Measures; `Bench` on the model's device if None.

    Raises:
        ValueError: `batch_size` is less than 1, or the model does other operations with it.
        LatencyTableError: `table` holds timings of another machine.

    Example:
        >>> from lightning_prune.graph import read
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> here = LatencyTable(Machine.here(torch.device("cpu")))
        >>> graph = read(net, torch.zeros(1, 4))
        >>> price = LatencyPrice(graph, net, table=here, stopwatch=lambda operations: [0.5] * len(operations))
        >>> predicted_latency(graph, PruningPlan({}), price)
        1.5
    """

    def __init__(
        self,
        graph: Graph,
        model: nn.Module,
        *,
        batch_size: int | None = None,
        table: LatencyTable | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` counts the examples of a forward pass, >= 1; got {batch_size}. Pass 1.")
        model = unwrapped(model)
        device = next((tensor.device for tensor in named_tensors(model).values()), torch.device("cpu"))
        self.graph = graph
        self.table = LatencyTable.cached(Machine.here(device)) if table is None else table
        self.table.check(Machine.here(device))
        self._stopwatch = Bench(device) if stopwatch is None else stopwatch
        self._steps = _steps(graph)
        twins = _twins(model, graph, batch_size)
        origins = Origins.of(graph, self._steps)
        self._replays = {
            id(step): Replay(step, twin, origins, graph.roots) for step, twin in zip(self._steps, twins, strict=True)
        }
        self._prices: dict[Place, float] = {}
        self._times: dict[Place, float] = {}
        self._impossible: set[str] = set()
        self._named: set[str] = set()

    @property
    def replays(self) -> list[Replay]:
        """The steps in order, as they can be done again."""
        return list(self._replays.values())

    def __call__(self, step: Step, shape_of: ShapeOf) -> float:
        """Return the milliseconds of a step of the graph's run.

        Args:
            step: The step.
            shape_of: Returns what is left of a shape, told by its labels, as `Fate.shape_left` does.

        Raises:
            ValueError: The step is from another reading.
        """
        if id(step) not in self._replays:
            raise ValueError(f"`step` {step.name} is of another reading of the model; make a LatencyPrice of that one.")
        replay = self._replays[id(step)]
        if replay.free:
            return 0.0
        sizes = replay.sizes(shape_of)
        place = (id(step), tuple(now for _, now in sizes.values()))
        if place not in self._prices:
            known = self._known(replay, self._points(replay, sizes))
            self._prices[place] = sum(share * self._times[point] for share, point in known)
        return self._prices[place]

    def _known(self, replay: Replay, points: Sequence[Point]) -> Iterator[tuple[float, Place]]:
        """Yield shares and places of which the times are known; operations are looked at once."""
        places = [(share, (id(replay), tuple(point.values())), point) for share, point in points]
        unknown = {place: replay.at(point) for _, place, point in places if place not in self._times}
        self.measure(list(unknown.values()))
        self._times.update({place: self.time(operation) for place, operation in unknown.items()})
        yield from ((share, place) for share, place, _ in places)

    def prepare(self, shape_of: ShapeOf) -> None:
        """Time all that is missing for the price of all steps, in turns."""
        points: list[Operation] = []
        for replay in self.replays:
            found = self._points(replay, replay.sizes(shape_of))
            points += [replay.at(point) for _, point in found]
        self.measure(points)

    def measure(self, operations: Sequence[Operation]) -> None:
        """Time those of some operations that have no time yet, and save the table."""
        missing = list({operation.key: operation for operation in operations if self._is_missing(operation)}.values())
        if not missing:
            return
        log.info("timing %d operations", len(missing))
        for operation, time in zip(missing, self._stopwatch(missing), strict=True):
            if time is None:
                self._impossible.add(operation.key)
                self._name(str(operation.op))
            else:
                self.table.timings[operation.key] = time
        self.table.save()

    def time(self, operation: Operation) -> float:
        """Return the milliseconds of an operation that has been measured; 0 if that was not possible."""
        return self.table.timings.get(operation.key, 0.0)

    def _points(self, replay: Replay, sizes: Mapping[Width, tuple[int, int]]) -> list[Point]:
        """Return the widths that a step's time is interpolated from, with their shares."""
        if replay.by_value:
            self._name(replay.name)
            return []
        if replay.tied:
            return [(1.0, {width: now for width, (_, now) in sizes.items()})]
        return [] if replay.free else list(corners(sizes))

    def _is_missing(self, operation: Operation) -> bool:
        return operation.key not in self.table.timings and operation.key not in self._impossible

    def _name(self, operation: str) -> None:
        """Say once that an operation counts nothing."""
        if operation not in self._named:
            self._named.add(operation)
            log.warning("%s cannot be timed alone: it counts as 0 ms in the predicted latency", operation)


def predicted_latency(graph: Graph, plan: PruningPlan, price: LatencyPrice) -> float:
    """Return the milliseconds of a forward pass in eval mode after a plan.

    Args:
        graph: The reading of the model that the price was made with.
        plan: What goes.
        price: What steps take.
    """
    fate = Fate(graph, plan)
    price.prepare(fate.shape_left)
    return sum(price(step, fate.shape_left) for step in _steps(graph))


def _steps(graph: Graph) -> list[Step]:
    """Return the steps of the forward pass in eval mode."""
    return next(iter(graph.runs.values())).steps


def _twins(model: nn.Module, graph: Graph, batch_size: int | None) -> list[Step]:
    """Return the steps at a batch size, with tensors that lie in memory as they will.

    Raises:
        ValueError: The model does other operations then.
    """
    inputs = graph.inputs if batch_size is None else batch_of(graph.inputs, batch_size)
    tensors, setting = named_tensors(model), next(iter(graph.runs))
    if not all(tensor.is_contiguous() for tensor in (*tensors.values(), *tensors_in((inputs.args, inputs.kwargs)))):
        setting = Setting("real")  # tensors without memory do not tell which format a convolution returns
    elif batch_size is None:
        return _steps(graph)
    steps = run(model, inputs, setting, Flow(LabelSpace()), tensors, {}).steps
    if [(step.op, len(step.inputs)) for step in steps] != [(step.op, len(step.inputs)) for step in _steps(graph)]:
        raise ValueError(
            f"`batch_size` {batch_size}: {type(model).__name__} does other operations than for the inputs that it was "
            "read with. Read it with example inputs of that batch size, and leave `batch_size` out."
        )
    return steps
