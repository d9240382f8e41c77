"""What a cut costs at once: accuracy just before the first cut and just after each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.history import history_of
from lightning_prune.modes import in_eval_mode


class CutProbe(pl.Callback):
    """Notes the accuracy around cuts. Stands behind the pruning callback in the list.

    Each cut costs one pass over the validation images, taken before the next optimizer step. Cuts between which
    nothing was trained are measured together.

    Args:
        monitor: Name under which the module logs its validation accuracy.

    Attributes:
        before: The last validation accuracy before the first cut; None if there was no validation before it.
        after: The validation accuracy right after each cut, before any fine-tuning.
    """

    def __init__(self, monitor: str = "val/acc") -> None:
        self.monitor = monitor
        self.before: float | None = None
        self.after: list[float] = []
        self._seen = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nor are those that a network has been through when it is validated."""
        if stage == "validate":
            self._seen = len(history_of(pl_module))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cuts that a checkpoint brought along are no news."""
        self._seen = len(history_of(pl_module))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the accuracy as long as nothing has been cut, and where the cut was made to be validated, after it."""
        if trainer.sanity_checking or self.monitor not in trainer.callback_metrics:
            return
        found, cuts = float(trainer.callback_metrics[self.monitor]), len(history_of(pl_module))
        if cuts == self._seen and not self.after:
            self.before = found
        elif cuts > self._seen and trainer.state.fn == TrainerFn.VALIDATING:
            self.after.append(found)
            self._seen = cuts

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for a cut between epochs."""
        self._look(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look for a cut between steps."""
        self._look(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for a cut after the last step."""
        self._look(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What has been noted so far."""
        return {"before": self.before, "after": list(self.after)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the notes of a checkpoint."""
        self.before, self.after = state_dict["before"], list(state_dict["after"])

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        cuts = len(history_of(pl_module))
        if cuts > self._seen:
            self.after.append(_accuracy(trainer, pl_module))
        self._seen = cuts


def _accuracy(trainer: pl.Trainer, module: pl.LightningModule) -> float:
    """Share of the validation images that the module gets right now; nothing else changes."""
    right = torch.zeros((), device=module.device)
    total = torch.zeros((), device=module.device)
    with evaluating(module), isolate_rng():
        for batch in _validation_batches(trainer):
            images, labels = module.transfer_batch_to_device(batch, module.device, 0)
            right += (module(images).argmax(1) == labels).sum()
            total += len(labels)
    sums: Tensor = trainer.strategy.reduce(torch.stack((right, total)), reduce_op="sum")
    if sums[1] == 0:
        raise ValueError("`CutProbe` measures on validation images; got none. Give the Trainer a val dataloader.")
    return float(sums[0] / sums[1])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each submodule is in the mode it was in."""
    with in_eval_mode(module), torch.no_grad():
        yield


def _validation_batches(trainer: pl.Trainer) -> Iterator[Any]:
    loaders: Any = trainer.val_dataloaders
    if loaders is None and trainer.datamodule is not None:  # type: ignore[attr-defined]
        loaders = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
    for one in loaders if isinstance(loaders, (list, tuple)) else [loaders or ()]:
        yield from islice(one, _batches(trainer, len(one)))


def _batches(trainer: pl.Trainer, length: int) -> int:
    limit = trainer.limit_val_batches
    return min(limit, length) if isinstance(limit, int) else int(limit * length)
