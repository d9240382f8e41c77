"""Watches layers while a network runs, together with what their outputs are added to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.handlers.normalization import is_batch_norm
from lightning_prune.inputs import Inputs
from lightning_prune.sampling import read_by_product

aten = torch.ops.aten

_VIEWS = (aten.view, aten._unsafe_view, aten.reshape, aten.alias, aten.detach)


class See(Protocol):
    """Is shown each call of a layer."""

    def __call__(self, name: str, call: int, inputs: Tensor, output: Tensor, beside: Tensor | None) -> None:
        """See a call.

        Args:
            name: The layer.
            call: Which of its calls this is, counted from 0.
            inputs: What it read, prepared as its product takes it (see `read_by_product`).
            output: What it returned.
            beside: What its output, or the norm's behind it, is added to; None where it is not added to anything.
        """


class Work:
    """Does the operations of a run."""

    def starts(self, name: str) -> None:
        """Learn that a watched layer is about to be called."""

    def __call__(self, op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Do an operation."""
        return op(*args, **kwargs)


class Enough(BaseException):
    """Ends a run in which everything has been seen; no handler for errors of the network's own is to catch it."""


def observe(
    network: nn.Module,
    inputs: Inputs,
    see: See,
    layers: Collection[str],
    summed: Collection[str],
    calls: int | None,
    work: Work | None = None,
) -> None:
    """Run a network without gradients, and end the run after so many calls.

    Args:
        network: The network, in eval mode.
        inputs: What it is called with.
        see: Is shown the calls.
        layers: Names of the layers to watch.
        summed: Those of them whose output goes into a sum.
        calls: Calls of them all after which the rest of the run is left out; None runs to the end.
        work: Does the operations; None leaves them to torch.
    """
    observer = _Observer(see, calls, work or Work())
    watched = [(name, network.get_submodule(name)) for name in layers]
    hooks = [module.register_forward_pre_hook(observer.before(name), prepend=True) for name, module in watched]
    hooks += [
        module.register_forward_hook(observer.hook(name, name in summed), with_kwargs=True) for name, module in watched
    ]
    listens = work is not None or any(name in summed for name in layers)
    try:
        with torch.no_grad(), _whole_transformers(), observer if listens else torch.no_grad():
            inputs.call(network)
    except Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _whole_transformers() -> Iterator[None]:
    """Let transformer layers do the same whoever is watched: a hook inside keeps them from their fast path."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _Observer(TorchDispatchMode):
    """Shows calls as soon as all that belongs to them is known."""

    def __init__(self, see: See, calls: int | None, work: Work) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see, self._left, self._work = see, calls, work
        self._is_showing = False
        self._counts: Counter[str] = Counter()
        self._waiting: dict[int, tuple[str, nn.Module, Tensor, Tensor, Tensor]] = {}

    def before(self, name: str) -> Any:
        """Return a hook for before a layer is called."""

        def starts(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._work.starts(name)

        return starts

    def hook(self, name: str, is_summed: bool) -> Any:
        """Return a forward hook for a layer."""

        def saw(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            if is_summed:
                self._waiting[id(output)] = (name, module, inputs, output, output)  # its id stays for as long
            else:
                self._show(name, module, inputs, output, None)

        return saw

    def _show(self, name: str, module: nn.Module, inputs: Tensor, output: Tensor, beside: Tensor | None) -> None:
        call = self._counts[name]
        self._counts[name] += 1
        self._is_showing = True  # what is done to look at a call is no part of the run
        try:
            self._see(name, call, read_by_product(module, inputs), output, beside)  # type: ignore[arg-type]
        finally:
            self._is_showing = False
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                raise Enough

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._is_showing:
            return func(*args, **(kwargs or {}))
        known = next((value for value in args if id(value) in self._waiting), None) if self._waiting else None
        if known is None:
            return self._work(func, args, kwargs or {})
        name, module, inputs, output, _ = self._waiting.pop(id(known))
        if func.overloadpacket in (aten.add, aten.add_):
            other = args[1] if args[0] is known else args[0]
            is_alike = isinstance(other, Tensor) and other.shape == known.shape and not kwargs
            self._show(name, module, inputs, output, other if is_alike else None)
            return self._work(func, args, kwargs or {})
        result = self._work(func, args, kwargs or {})
        following = result[0] if isinstance(result, (tuple, list)) else result
        if is_batch_norm(func) or func.overloadpacket in _VIEWS:
            self._waiting[id(following)] = (name, module, inputs, output, following)
        else:
            self._show(name, module, inputs, output, None)
        return result
