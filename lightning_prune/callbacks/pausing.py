"""Optimizer steps in which nothing moves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class Pauses:
    """Lets single steps of optimizers pass without moving anything: all of them skip parameters without a gradient.

    Gradients of 0 would not do: momentum, weight decay and Adam move weights all the same. Gradients are dropped at the
    last moment, after hooks, clipping and the GradScaler have seen them: some of these fail where there is none.
    """

    def __init__(self) -> None:
        self._due: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Look at each step of these optimizers."""
        self._handles += [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]

    def leave(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._due.clear()

    def pause(self, optimizer: Optimizer, *, now: bool) -> None:
        """Say of the step that an optimizer is about to make, or is in, whether it moves nothing.

        It is said of each step: one that a GradScaler skips must not hand its pause on to the next.
        """
        self._due.discard(id(optimizer))
        if now:
            self._due.add(id(optimizer))

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure")
        if closure is None:
            self._drop(optimizer)
            return None

        def then_drop() -> Any:
            loss = closure()
            self._drop(optimizer)
            return loss

        return args, {**kwargs, "closure": then_drop}

    def _drop(self, optimizer: Optimizer) -> None:
        if id(optimizer) in self._due:
            self._due.remove(id(optimizer))
            optimizer.zero_grad(set_to_none=True)
