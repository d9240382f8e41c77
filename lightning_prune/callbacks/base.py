"""The engine of all prune callbacks: when to cut, and what must follow a cut inside a fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from math import ceil
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune import history, optimizers
from lightning_prune.allocation import Allocation, Limits, Uniform
from lightning_prune.callbacks.averages import averaged_copies
from lightning_prune.callbacks.checkpoints import follow_checkpoints
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.inputs import ExampleInputs
from lightning_prune.pruner import Draft, Request, draft_cut
from lightning_prune.report import history_table, record_table
from lightning_prune.schedules import Schedule, events, one_shot
from lightning_prune.types import Heads, PruneRecord, Unit


class PruneCallback(pl.Callback):
    """Cuts channels out of the network while it trains, on a schedule of epochs.

    A cut falls at the start of an epoch, so that every checkpoint holds the network whose score it bears. The
    network that is read is the LightningModule's `forward`, on its `example_input_array` or else on the first batch.

    Args:
        pruning_ratio: Fraction to be gone in the end, counted against the dense model, in [0, 1).
        of: What it is a fraction of: "channels" (of all that can be pruned), "params" or "macs" (of the model).
        criterion: How channels are scored; `Magnitude()` if None.
        allocation: How the ratio is shared out over the groups; `Uniform()` if None.
        schedule: Pure function from progress to the share of the ratio, see `lightning_prune.schedules`.
        begin: Epoch of progress 0, counted from 0; a third of `max_epochs` if None.
        end: Epoch of progress 1; two thirds of `max_epochs` if None.
        every: Epochs between prune events.
        ignore: Patterns of module names that are not to be touched.
        heads: How attention heads are cut: "whole", "inside" or "keep" (see `find_groups`).
        min_channels: Channels that each group keeps at least.
        round_to: Widths are rounded to the nearest multiple of it.

    Raises:
        ValueError: An argument is out of its range, or `begin` lies after `end`.
    """

    def __init__(
        self,
        pruning_ratio: float,
        *,
        of: Unit = "channels",
        criterion: Criterion | None = None,
        allocation: Allocation | None = None,
        schedule: Schedule = one_shot,
        begin: int | None = None,
        end: int | None = None,
        every: int = 1,
        ignore: Sequence[str] = (),
        heads: Heads = "whole",
        min_channels: int = 1,
        round_to: int | None = None,
    ) -> None:
        limits = Limits(min_channels, round_to)
        self.request = Request(
            pruning_ratio, of, criterion or Magnitude(), allocation or Uniform(), ignore, heads, limits
        )
        self.schedule, self.begin, self.end, self.every = schedule, begin, end, every
        events(schedule, begin or 0, max(begin or 0, 0) if end is None else end, every)
        self.events: dict[int, float] = {}
        self._done = -1
        self._checked = False

    @property
    @override
    def state_key(self) -> str:
        asked = {field.name: getattr(self.request, field.name) for field in fields(self.request)}
        when = {"schedule": self.schedule, "begin": self.begin, "end": self.end, "every": self.every}
        return self._generate_state_key(**{name: _told(value) for name, value in (asked | when).items()})

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        follow_checkpoints(pl_module)
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise MisconfigurationException(
                f"{type(self).__name__} cuts on one device so far; got the strategy "
                f"{type(trainer.strategy).__name__}. Use Trainer(devices=1), or `lightning_prune.prune` before the fit."
            )
        self.events = self._lay_out(trainer.max_epochs)
        self._checked = False
        if trainer.current_epoch == 0:
            self._done = -1
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            self._check_reach(trainer, trainer.max_epochs, f"max_epochs={trainer.max_epochs}")

    def _lay_out(self, max_epochs: int | None) -> dict[int, float]:
        """Return epoch -> share for this fit."""
        unlimited = max_epochs is None or max_epochs < 0
        if unlimited and (self.begin is None or self.end is None):
            raise MisconfigurationException(
                f"{type(self).__name__} lays its schedule out over `max_epochs`, which is {max_epochs}. "
                "Set Trainer(max_epochs=...), or both `begin` and `end`."
            )
        begin = (max_epochs or 0) // 3 if self.begin is None else self.begin
        end = max(begin, 2 * (max_epochs or 0) // 3) if self.end is None else self.end
        return events(self.schedule, begin, end, self.every)

    def _check_reach(self, trainer: pl.Trainer, epochs: int, limit: str) -> None:
        """Refuse a schedule that never fires within the epochs of the fit, and warn of one that does not end."""
        reached = [share for epoch, share in self.events.items() if epoch < epochs]
        if trainer.fast_dev_run or len(reached) == len(self.events):  # type: ignore[attr-defined]
            return
        if not reached:
            raise MisconfigurationException(
                f"The schedule of {type(self).__name__} never fires: its first event is at epoch {min(self.events)}, "
                f"but {limit}, and epochs count from 0. Lower `begin` (now {self.begin}) or train for longer."
            )
        rank_zero_warn(
            f"The schedule of {type(self).__name__} ends at epoch {max(self.events)}, but {limit}: this fit reaches "
            f"only {reached[-1]:.0%} of pruning_ratio={self.request.pruning_ratio}. Lower `end`."
        )

    @property
    def is_finished(self) -> bool:
        """Whether the last prune event has been."""
        return self._done >= max(self.events, default=-1)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizers.check(map(unwrapped, trainer.optimizers), pl_module)
        if trainer.max_steps >= 0 and isinstance(trainer.num_training_batches, int):
            steps = ceil(max(trainer.num_training_batches, 1) / trainer.accumulate_grad_batches)
            self._check_reach(trainer, ceil(trainer.max_steps / steps), f"max_steps={trainer.max_steps}")
        if pl_module.example_input_array is not None:
            self._check_ahead(pl_module, pl_module.example_input_array)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.example_input_array is not None:
            self._fire(trainer, pl_module, pl_module.example_input_array)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and pl_module.example_input_array is None:
            self._check_ahead(pl_module, batch)
            self._fire(trainer, pl_module, batch)

    def _check_ahead(self, pl_module: pl.LightningModule, example: ExampleInputs) -> None:
        """Plan the whole pruning once before the first step, so that what is wrong shows before time is spent."""
        if not self._checked and not self.is_finished:
            record = draft_cut(pl_module, example, self.request).record
            epochs = ", ".join(
                f"{epoch} ({share * self.request.pruning_ratio:.1%})" for epoch, share in self.events.items()
            )
            rank_zero_info(f"{type(self).__name__}: prune events at epochs {epochs}; at present weights: {record}")
            _tell_shortfall(record)
        self._checked = True

    def _fire(self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: ExampleInputs) -> None:
        """Cut if an event is due; one that a resumed fit has missed is made up for."""
        due = [epoch for epoch in self.events if self._done < epoch <= trainer.current_epoch]
        if due:
            ratio = self.events[due[-1]] * self.request.pruning_ratio
            draft = draft_cut(pl_module, example, replace(self.request, pruning_ratio=ratio))
            self._cut(trainer, pl_module, draft)
            self._done = due[-1]

    def _cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, draft: Draft) -> None:
        """Cut, let optimizers and averaged copies follow, verify, log, and append to the history."""
        record = replace(draft.record, epoch=trainer.current_epoch, step=trainer.global_step)
        every = [unwrapped(optimizer) for optimizer in trainer.optimizers]
        optimizers.check(every, pl_module)
        for network in (pl_module, *averaged_copies(trainer)):
            history.commit(network, draft.cut, record)
        for optimizer in every:
            optimizers.rebuild(optimizer, pl_module, draft.cut)
        optimizers.check(every, pl_module)
        rank_zero_info(f"{type(self).__name__}, epoch {record.epoch}: {record}")
        _tell_shortfall(record)
        if _shows_tables(trainer):
            Console().print(record_table(record, f"{type(self).__name__}, epoch {record.epoch}"))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        records = history.history_of(pl_module)
        if records and _shows_tables(trainer):
            Console().print(history_table(records))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = state_dict["done"]


def unwrapped(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    """Return the torch optimizer inside a Lightning one."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _shows_tables(trainer: pl.Trainer) -> bool:
    """Tables go where the progress bar goes."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def _tell_shortfall(record: PruneRecord) -> None:
    """Warn where less was reached than asked, rounding to whole channels aside."""
    total = sum(change.dense for change in record.channels.values())
    rounding = 0.5 * len(record.channels) / max(total, 1) if record.of == "channels" else 0.0
    if record.reached < record.asked - rounding - 1e-9:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in record.held_back.items())
        rank_zero_warn(f"Asked {record.asked:.1%} of {record.of}, reached {record.reached:.1%}. Held back: {reasons}.")


def _told(value: object) -> str:
    """Write an argument so that equal ones look alike in another process: without addresses."""
    if callable(value) and not isinstance(value, type) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value) if type(value).__repr__ is not object.__repr__ else f"{type(value).__name__}{vars(value)}"
