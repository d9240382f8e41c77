"""Times operations alone, in turns, with activations in the cache and weights out of it, as in a forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from statistics import quantiles
from time import perf_counter
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_prune.chance import random_state_kept
from lightning_prune.cost.operations import Operation, Placed

log = logging.getLogger(__name__)

Stopwatch: TypeAlias = Callable[[Sequence[Operation]], list[float | None]]
"""Returns the milliseconds of operations, and None for those that cannot be done alone."""

Clock: TypeAlias = Callable[[], float]
"""Tells seconds."""

_ROUNDS = 40
_LEAST_ROUNDS = 10
_SECONDS = 0.1
_WEIGHTS = 16 * 2**20
_SWEPT = 2**18
_LINE = 64


class Bench:
    """Times operations in turns, each once a round, so that a disturbance meets a few rounds of all of them.

    Before each call a megabyte is swept through the cache, as other operations would have done, and then the
    activations are written, as the operation before would have done. Weights lie at a new place in a large buffer each
    time, so that they come from where they come from in a forward pass: not from the nearest cache. The lower quartile
    counts, of 40 rounds, or of those that take a tenth of a second, of 10 at least.

    Args:
        device: Where the operations are done.
        clock: Tells seconds; one that counts a thread's own, as `time.thread_time`, leaves out what other programs
            take, where torch has one thread.
    """

    def __init__(self, device: torch.device, clock: Clock = perf_counter) -> None:
        self._device, self._clock = device, clock

    def __call__(self, operations: Sequence[Operation]) -> list[float | None]:
        """Return the milliseconds of operations; None for those that fail."""
        with torch.inference_mode(), random_state_kept(of_devices=self._device.type == "cuda"):
            arena = _Arena(operations, self._device)
            times: list[list[float]] = [[] for _ in operations]
            waiting = [number for number, operation in enumerate(operations) if self._warm(operation, arena)]
            for done in range(_ROUNDS):
                for number in waiting:
                    times[number].append(self._time(operations[number], arena))
                if done + 1 >= _LEAST_ROUNDS:
                    waiting = [number for number in waiting if sum(times[number]) < _SECONDS]
        return [quantiles(found)[0] * 1e3 if found else None for found in times]

    def can(self, operations: Sequence[Operation]) -> list[bool]:
        """Tell of operations whether they can be done alone."""
        with torch.inference_mode(), random_state_kept(of_devices=self._device.type == "cuda"):
            arena = _Arena(operations, self._device)
            return [self._warm(operation, arena) for operation in operations]

    def _warm(self, operation: Operation, arena: _Arena) -> bool:
        """Do the operation once; tell whether that works."""
        arena.turn()
        try:
            operation.bound(arena.take, self._device)()
        except Exception as error:
            log.debug("%s cannot be done alone", operation.key, exc_info=error)
            return False
        return True

    def _time(self, operation: Operation, arena: _Arena) -> float:
        """Return the seconds that the operation takes."""
        arena.turn()
        call = operation.bound(arena.take, self._device)
        arena.sweep()
        arena.write()
        self._wait()
        start = self._clock()
        call()
        self._wait()
        return self._clock() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Arena:
    """The memory that tensors lie in: activations at its start, always the same, and weights further on each time.

    Args:
        operations: What needs them.
        device: Where it lies.
    """

    def __init__(self, operations: Sequence[Operation], device: torch.device) -> None:
        self._device = device
        self._size = {held: max(_need(operation, held) for operation in operations) for held in (True, False)}
        self._size[True] = max(self._size[True], _WEIGHTS)
        self._memory: dict[tuple[bool, torch.dtype], Tensor] = {}
        self._place = {True: 0, False: 0}
        self._written: list[Tensor] = []
        self._swept = torch.ones(_SWEPT, device=device)

    def turn(self) -> None:
        """Begin with the activations of the next operation."""
        self._place[False] = 0
        self._written.clear()

    def take(self, placed: Placed) -> Tensor:
        """Return a tensor: floats are 1/2, whole numbers 0, so that they are an index into whatever there is."""
        if not placed.dtype.is_floating_point:
            return torch.zeros(placed.shape, dtype=placed.dtype, device=self._device)
        memory = self._memory_of(placed)
        start = self._place[placed.held]
        if start + placed.numel > memory.numel():
            start = 0
        self._place[placed.held] = start + _rounded(placed.numel)
        tensor = memory.as_strided(placed.shape, placed.strides(), start)
        if not placed.held:
            self._written.append(tensor)
        return tensor

    def sweep(self) -> None:
        """Use the cache for something else."""
        self._swept.neg_()

    def write(self) -> None:
        """Write the activations."""
        for tensor in self._written:
            tensor.fill_(0.5)

    def _memory_of(self, placed: Placed) -> Tensor:
        kind = (placed.held, placed.dtype)
        if kind not in self._memory:
            self._memory[kind] = torch.full((self._size[placed.held],), 0.5, dtype=placed.dtype, device=self._device)
        return self._memory[kind]


def _need(operation: Operation, held: bool) -> int:
    """Return how many elements the tensors of an operation take."""
    return sum(_rounded(placed.numel) for placed in operation.tensors if placed.held is held)


def _rounded(count: int) -> int:
    """Round up, so that every tensor starts at a cache line."""
    return -(-count // _LINE) * _LINE
