"""Faults and signals for tests: where a cut can be struck, by what, and who handles it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from lightning_prune import history, optimizers, surgery
from lightning_prune.callbacks import base
from lightning_prune.surgery import Undo, together


class FaultError(Exception):
    """The fault that a test injects."""


def sends(number: int) -> None:
    os.kill(os.getpid(), number)


@contextmanager
def handled(numbers: Sequence[int], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


INSIDE = (
    (surgery, "cut_tensor"),
    (surgery, "_exchange"),
    (surgery, "set_attributes"),
    (surgery, "_forget_what_was_computed"),
    (optimizers, "cut_tensor"),
    (optimizers, "_cut_state"),
    (optimizers, "check"),
)
"""Steps of the cut that can fail before their work and after it."""

WHOLE = ((history, "commit"), (optimizers, "rebuild"))
"""Steps that can be taken back: they fail before their work, or once it is known how to take it back."""


@contextmanager
def struck(strike: Callable[[int, str], object]) -> Iterator[list[str]]:
    """Call something with its number and its name at each point of a cut.

    Yields:
        The points that were reached.
    """
    points: list[str] = []

    def reach(point: str) -> None:
        points.append(point)
        strike(len(points) - 1, point)

    def watched(real: Callable[..., Any], name: str, late: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            reach(f"before {name}")
            result = real(*args, **kwargs)
            if late:
                reach(f"after {name}")
            return result

        return run

    class Steps(list[Undo]):
        def __init__(self, done: list[Undo]) -> None:
            self.done = done

        def append(self, undo: Undo) -> None:
            self.done.append(undo)
            reach("after a whole step")

    @contextmanager
    def watched_together() -> Iterator[list[Undo]]:
        with together() as done:
            yield Steps(done)

    with pytest.MonkeyPatch.context() as patch:
        for places, late in ((INSIDE, True), (WHOLE, False)):
            for room, name in places:
                patch.setattr(room, name, watched(getattr(room, name), name, late))
        patch.setattr(base, "together", watched_together)
        yield points


def at(number: int, strike: Callable[[], object]) -> Callable[[int, str], object]:
    """Strike at one point only."""
    return lambda point, _: strike() if point == number else None


def fails(fault: type[BaseException]) -> None:
    raise fault
