"""A criterion looks on during a fit: the signal of Fisher pruning comes from the backward passes of the training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn

from lightning_prune.callbacks.ranks import sum_over_ranks
from lightning_prune.callbacks.timing import window_of
from lightning_prune.criteria import Criterion, Gathered, Watched
from lightning_prune.graph import Graph
from lightning_prune.tensors import named_modules

_ACROSS_EXAMPLES = ("Contrastive", "Triplet", "NTXent", "InfoNCE", "SupCon", "Barlow", "VICReg")


class Gathering:
    """Lets a criterion see every training step, and no others; of other criteria than `Gathered` ones it knows nothing.

    Args:
        criterion: The criterion.
        window: It looks at so many optimizer steps before each event, 1 or more; None: at all since the last one.

    Raises:
        ValueError: `window` is below 1.
    """

    def __init__(self, criterion: Criterion, window: int | None = None) -> None:
        if window is not None and window < 1:
            raise ValueError(
                f"`window` is the optimizer steps before an event that are looked at, 1 or more; got {window}."
            )
        self.criterion = criterion if isinstance(criterion, Gathered) else None
        self.window = window
        self._is_ready = False
        self._is_told = False

    def check(self, first: int | None, unit: str, who: str) -> None:
        """See that there is something to gather before the first event.

        Raises:
            MisconfigurationException: The first event comes before the first step.
        """
        if self.criterion is not None and first == 0:
            raise MisconfigurationException(
                f"{who} scores channels by what {type(self.criterion).__name__} has seen of the training, and its "
                f"first event is at {unit} 0, before the first step. Set `begin` to 1 or more."
            )

    def stand_in(self, criterion: Criterion) -> Criterion:
        """Return a criterion that can score before anything was gathered, to rehearse with."""
        return criterion if self.criterion is None else Watched(self.criterion)

    def begin(self, pl_module: pl.LightningModule, reading: Callable[[], AbstractContextManager[Graph]]) -> None:
        """Find out whom to watch, unless that is known.

        Args:
            pl_module: The network.
            reading: Reads it, and lets it be the one that was read for as long as the context lasts.
        """
        if self.criterion is None or self._is_ready:
            return
        with reading() as graph:
            self.criterion.begin(pl_module, graph)
        self._is_ready = True
        joint = [name for name, module in named_modules(pl_module).items() if _joins_examples(module)]
        if joint and not self._is_told:
            rank_zero_warn(
                f"{type(self.criterion).__name__} takes the loss for a mean over examples, and {joint[0]} "
                f"({type(named_modules(pl_module)[joint[0]]).__name__}) looks like a loss that compares them with each "
                "other: scores are those of rows of the batch, not of independent examples."
            )

    def look(self, batch: Any, left: float) -> None:
        """Look at the step that comes, if the next event is near enough.

        Args:
            batch: Of the step.
            left: Optimizer steps before the next event.
        """
        if self.criterion is not None and (self.window is None or left <= self.window):
            self.criterion.look(_rows(batch))

    def see_loss(self, loss: Tensor) -> None:
        """Show a loss before its backward pass."""
        if self.criterion is not None and self.criterion.is_looking:
            self.criterion.see_loss(loss)

    def take(self, trainer: pl.Trainer) -> None:
        """Take in what a backward pass has shown, on all ranks."""
        if self.criterion is None or not self.criterion.is_looking:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and not self.criterion.is_finite():
            self.criterion.drop_step()  # the scaler skips this step too
        scale = window_of(trainer, trainer.current_epoch) / (1.0 if scaler is None else float(scaler.get_scale()))
        self.criterion.take(scale, sum_over_ranks(trainer) if trainer.world_size > 1 else None)
        if not self._is_told:
            self._is_told = True
            _tell_missed(self.criterion)

    def pause(self) -> None:
        """Look away until the next step."""
        if self.criterion is not None:
            self.criterion.look_away()

    def forget(self) -> None:
        """Begin anew, as after a cut."""
        if self.criterion is not None:
            self.criterion.forget()
            self._is_ready = False

    def state_dict(self) -> dict[str, Any]:
        """Return what was gathered; nothing for other criteria."""
        return {} if self.criterion is None else {"gathered": self.criterion.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was gathered before an interruption."""
        if self.criterion is not None and "gathered" in state:
            self.criterion.load_state_dict(state["gathered"])


def _joins_examples(module: nn.Module) -> bool:
    return any(word in type(module).__name__ for word in _ACROSS_EXAMPLES)


def _rows(batch: Any) -> int | None:
    """Return the examples in a batch; None where that is not clear."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return extract_batch_size(batch)
        except MisconfigurationException:
            return None


def _tell_missed(criterion: Gathered) -> None:
    missed = criterion.missed()
    if missed:
        listed = ", ".join(f"{group} ({reader})" for group, reader in list(missed.items())[:4])
        rank_zero_info(
            f"{type(criterion).__name__}: {len(missed)} groups are read by layers that the first step did not call, "
            f"and are left alone unless these are called later: {listed}"
        )
