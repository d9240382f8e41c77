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
    own, failure = None, None
    try:
        own = draw_up()
    except Exception as error:
        failure = error
    first = trainer.strategy.broadcast(None if own is None else own.sent(), src=0)
    said = _gathered(
        (None if failure is None else str(failure), _digest(pl_module), None if first is None else first.digest())
    )
    if failure is not None:
        raise failure
    failed = [f"rank {rank} failed: {message}" for rank, (message, *_) in enumerate(said) if message is not None]
    if failed:
        raise PruningError(f"Nothing was cut: {failed[0]}")
    for what, digests in (("hold different networks", said[0][1]), ("have different plans", said[0][2])):
        other = next((rank for rank, one in enumerate(said) if digests not in one[1:]), None)
        if other is not None:
            raise PruningError(
                f"Nothing was cut: ranks 0 and {other} {what}. Build the model the same way on every rank, with "
                "`pl.seed_everything` where its shape depends on chance."
            )
    assert first is not None
    assert own is not None
    return own.received(first)


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
