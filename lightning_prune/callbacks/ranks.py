"""Several processes cut as one: they take the same plan, or all of them stop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import lightning.pytorch as pl
import torch.distributed
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Self

from lightning_prune.callbacks.checkpoints import PrunedStateMixin
from lightning_prune.errors import PruningError
from lightning_prune.history import history_of
from lightning_prune.tensors import named_tensors


def check_strategy(trainer: pl.Trainer, pl_module: pl.LightningModule, who: str) -> None:
    """Refuse strategies under which a cut would lose something.

    Raises:
        MisconfigurationException: The network is sharded, or weights would come back into a dense module, or ranks
            would drift apart.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, SingleDeviceStrategy):
        return
    if type(strategy) is not DDPStrategy:  # DeepSpeed's is one of its subclasses
        raise MisconfigurationException(
            f"{who} cuts on one device and under DDP; got the strategy {name}, which spreads or changes the "
            "parameters. Use `lightning_prune.prune` in `configure_model`, before they are, or Trainer(strategy='ddp')."
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher) and not isinstance(pl_module, PrunedStateMixin):
        raise MisconfigurationException(
            f"The processes that {name}(start_method={strategy._start_method!r}) starts bring the weights back into "
            f"the dense module that they have started with. Use strategy='ddp', or let {type(pl_module).__name__} "
            "inherit from `lightning_prune.callbacks.PrunedStateMixin` as well."
        )
    if strategy._ddp_kwargs.get("static_graph") and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{who}: with manual optimization and static_graph=True the ranks drift apart after a cut. Leave "
            "`static_graph` out."
        )


def average_over_ranks(trainer: pl.Trainer, tensors: Iterable[Tensor]) -> None:
    """Let each tensor be the mean of those of all ranks, in place."""
    if trainer.world_size > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= trainer.world_size


def share_buffers(trainer: pl.Trainer, networks: Iterable[nn.Module]) -> None:
    """Let floating-point buffers be those of the first rank, in place, as DDP does before each training step."""
    if trainer.world_size > 1:
        for buffer in (buffer for network in networks for buffer in network.buffers() if buffer.is_floating_point()):
            torch.distributed.broadcast(buffer, src=0)


def sum_over_ranks(trainer: pl.Trainer) -> Callable[[Tensor], Tensor]:
    """Return what sums a tensor over all ranks."""

    def summed(values: Tensor) -> Tensor:
        there = values.to(trainer.strategy.root_device)  # NCCL takes nothing else
        total: Tensor = trainer.strategy.reduce(there, reduce_op="sum")
        return total.to(values.device)

    return summed


def sum_when_all_come(trainer: pl.Trainer) -> Callable[[Tensor], Tensor]:
    """Return what sums a tensor over all ranks inside of `failing_together`: no rank waits for one that has failed."""
    plain = sum_over_ranks(trainer)

    def summed(values: Tensor) -> Tensor:
        trouble = _meet(f"sum up {tuple(values.shape)}")
        if trouble is not None:
            raise _TroubleError(trouble)
        return plain(values)

    return summed


class Proposal(Protocol):
    """What several ranks are to do alike."""

    def sent(self) -> Self:
        """Return what other ranks need of it."""

    def received(self, first: Self) -> Self:
        """Return the first rank's proposal, with what this one has kept of its own."""

    def digest(self) -> str:
        """Return a hash of it."""


Proposed = TypeVar("Proposed", bound=Proposal)


def agreed(trainer: pl.Trainer, pl_module: nn.Module, draw_up: Callable[[], Proposed]) -> Proposed:
    """Draw up a proposal on every rank, and take that of the first.

    Whatever goes wrong on one rank is an error on all of them; none is left waiting.

    Args:
        trainer: Whose strategy knows the ranks.
        pl_module: The network; it must be the same on all ranks.
        draw_up: Makes the proposal.

    Raises:
        PruningError: Another rank has failed, or the ranks hold different networks or plans.
        Exception: What `draw_up` has raised on this rank.
    """
    if trainer.world_size == 1:
        return draw_up()
    with failing_together(trainer):
        own = draw_up()
    first = trainer.strategy.broadcast(own.sent(), src=0)
    said = _gathered((_digest(pl_module), first.digest()))
    for what, digest in zip(("hold different networks", "have different plans"), said[0], strict=True):
        other = next((rank for rank, digests in enumerate(said) if digest not in digests), None)
        if other is not None:
            raise PruningError(
                f"Nothing was cut: ranks 0 and {other} {what}. Build the model the same way on every rank, with "
                "`pl.seed_everything` where its shape depends on chance."
            )
    return own.received(first)


class _TroubleError(Exception):
    """Something went wrong, and all ranks have heard of it."""


@contextmanager
def failing_together(trainer: pl.Trainer) -> Iterator[None]:
    """Let what goes wrong inside on one rank be an error on all of them, also where they sum up on the way.

    Raises:
        PruningError: Another rank has failed.
        Exception: What was raised on this rank.
    """
    if trainer.world_size == 1:
        yield
        return
    try:
        yield
        trouble = _meet("end")
    except _TroubleError as heard:
        trouble = str(heard)
    except Exception as error:
        _meet("end", str(error))
        raise
    if trouble is not None:
        raise PruningError(f"Nothing was cut: {trouble}")


def _meet(purpose: str, failure: str | None = None) -> str | None:
    """Wait until all ranks have come for one purpose, and tell them if this one has failed; return what is wrong."""
    said = _gathered((purpose, failure))
    for rank, (_, message) in enumerate(said):
        if message is not None:
            return f"rank {rank} failed: {message}"
    first = said[0][0]
    other = next((rank for rank, (what, _) in enumerate(said) if what != first), None)
    if other is None:
        return None
    return (
        f"rank 0 was to {first}, and rank {other} was to {said[other][0]}. Build the model the same way on every rank, "
        "and let each have examples."
    )


def _gathered(mine: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Tell all ranks something, and hear what they tell."""
    said: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(said, mine)
    return said


def _digest(model: nn.Module) -> str:
    """Return a hash of what must be the same on all ranks before a cut: names, shapes and history."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    return hashlib.sha256(repr((shapes, history_of(model))).encode()).hexdigest()


@contextmanager
def without_reducer(trainer: pl.Trainer) -> Iterator[None]:
    """Take DDP's wrapper off, and wrap what comes out anew: its buckets have the sizes of before."""
    strategy = trainer.strategy
    if not (isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel)):
        yield
        return
    strategy.model = strategy.lightning_module
    try:
        yield
    finally:
        strategy._pl_static_graph_delay_done = False
        strategy.configure_ddp()
