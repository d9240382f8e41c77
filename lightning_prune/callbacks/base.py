"""The engine of all prune callbacks: when to cut, and what must follow a cut inside a fit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune import history, optimizers
from lightning_prune.allocation import Allocation, Limits, RoundTo, Uniform
from lightning_prune.calibration import tracking_norms
from lightning_prune.callbacks.averages import averaged_copies
from lightning_prune.callbacks.calibration import recalibrate_in_fit, training_batches, training_data
from lightning_prune.callbacks.checkpoints import follow_checkpoints, warn_of_late_scores
from lightning_prune.callbacks.gathering import Gathering
from lightning_prune.callbacks.ranks import (
    agreed,
    check_strategy,
    failing_together,
    share_buffers,
    sum_when_all_come,
    without_reducer,
)
from lightning_prune.callbacks.signals import signals_wait
from lightning_prune.callbacks.timing import Timing, epochs_of
from lightning_prune.criteria import Criterion, Gathered, Magnitude, Random, Watched
from lightning_prune.inputs import ExampleInputs, first_examples
from lightning_prune.pruner import Draft, Request, draft_cut, reading
from lightning_prune.reconstruction import Reconstruction, Refit
from lightning_prune.report import history_table, record_table, refit_table
from lightning_prune.restoring import Sights, check_restorable
from lightning_prune.schedules import Schedule, one_shot
from lightning_prune.surgery import together
from lightning_prune.types import Constants, Heads, PruneRecord, Trunks, Unit

_TOLD = 8
"""So many prune events are told before the fit."""


class PruneCallback(pl.Callback):
    """Cuts channels out of the network while it trains, on a schedule of epochs or of optimizer steps.

    A cut falls at the start of an epoch, or with `every_n_steps` before a step, so that every checkpoint holds the
    network whose score it bears. The network that is read is the LightningModule's `forward`, on its
    `example_input_array` or else on the batch at hand. Several processes (DDP) take the plan of the first.

    Args:
        pruning_ratio: Fraction to be gone in the end, counted against the dense model, in [0, 1).
        of: What it is a fraction of: "channels" (of all that can be pruned), "params", "macs", "memory" or "latency"
            (of the model; see `prune`).
        criterion: How channels are scored; `Magnitude()` if None.
        allocation: How the ratio is shared out over the groups; `Uniform()` if None.
        schedule: Pure function from progress to the share of the ratio, see `lightning_prune.schedules`.
        begin: Epoch of progress 0, counted from 0; a third of `max_epochs` if None.
        end: Epoch of progress 1; two thirds of `max_epochs` if None.
        every: Epochs between prune events.
        every_n_steps: Optimizer steps (`trainer.global_step`) between prune events, in place of epochs. `begin` and
            `end` count steps then, and are thirds of all steps of the fit if None.
        ignore: Patterns of module names that are not to be touched.
        heads: How attention heads are cut: "whole", "inside" or "keep" (see `find_groups`).
        min_channels: Channels that each group keeps at least.
        round_to: Widths are rounded to the nearest multiple of it; "auto": of the one that this machine likes.
        constants: What becomes of what removed channels emit on average: "absorb" or "drop" (see `prune`).
        trunks: How a trunk that several layers read is cut: "whole", "selected" or "sampled" (see `prune`).
        recalibrate: Over so many batches of the training data BatchNorm's running statistics are estimated anew after
            each cut; 0 leaves them to the training.
        reconstruction: How the layers that read what is left are refitted at each event, to return what they returned:
            by least squares over examples of the training data (see `Reconstruction`). None leaves that to the
            training.

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
        every_n_steps: int | None = None,
        ignore: Sequence[str] = (),
        heads: Heads = "whole",
        min_channels: int = 1,
        round_to: RoundTo = None,
        constants: Constants = "absorb",
        trunks: Trunks = "whole",
        recalibrate: int = 0,
        reconstruction: Reconstruction | None = None,
    ) -> None:
        limits = Limits(min_channels, round_to)
        criterion, allocation = criterion or Magnitude(), allocation or Uniform()
        self.request = Request(
            pruning_ratio, of, criterion, allocation, ignore, heads, limits, constants, trunks, reconstruction
        )
        self.timing = Timing(schedule, begin, end, every, every_n_steps)
        if recalibrate < 0:
            raise ValueError(f"`recalibrate` is a number of batches, 0 or more; got {recalibrate}.")
        self.recalibrate = recalibrate
        self.gathering = Gathering(criterion if self._is_gathered(criterion) else Random())
        self.events: dict[int, float] = {}
        self._epochs = inf
        self._done = -1
        self._checked = False

    def _is_gathered(self, criterion: Criterion) -> bool:
        """Tell whether a criterion looks on while the network trains; what needs no gradients sees the examples."""
        return isinstance(criterion, Gathered) and (self.request.reconstruction is None or criterion.gradients)

    @property
    @override
    def state_key(self) -> str:
        parts = (self.request, self.timing, *self._settings())
        return self._generate_state_key(**{name: _told(value) for part in parts for name, value in vars(part).items()})

    def _settings(self) -> Sequence[object]:
        """Return what else tells two callbacks of a class apart."""
        return ()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        follow_checkpoints(pl_module)
        if stage != "fit":
            return
        check_strategy(trainer, pl_module, type(self).__name__)
        warn_of_late_scores(trainer)
        self._checked = False
        if trainer.current_epoch == 0:
            self._done = -1
            self.gathering.forget()
        self._epochs = epochs_of(trainer)  # now: StochasticWeightAveraging adds one later, in which nothing is trained
        if self.timing.unit == "epoch":
            self.events = self.timing.lay_out(self._epochs, type(self).__name__)
            self._check_reach(trainer, self._epochs, f"max_epochs={trainer.max_epochs}")

    def _check_reach(self, trainer: pl.Trainer, length: float, limit: str) -> None:
        """Refuse a schedule that never fires within the fit, and warn of one that does not end."""
        unit = self.timing.unit
        reached = [share for moment, share in self.events.items() if moment < length]
        if trainer.fast_dev_run or len(reached) == len(self.events):  # type: ignore[attr-defined]
            return
        if not reached:
            raise MisconfigurationException(
                f"The schedule of {type(self).__name__} never fires: its first event is at {unit} {min(self.events)}, "
                f"but {limit}, and {unit}s count from 0. Lower `begin` (now {self.timing.begin}) or train for longer."
            )
        rank_zero_warn(
            f"The schedule of {type(self).__name__} ends at {unit} {max(self.events)}, but {limit}: this fit reaches "
            f"only {reached[-1]:.0%} of pruning_ratio={self.request.pruning_ratio}. Lower `end`."
        )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        made = [name for record in history.history_of(pl_module) for name in record.biases]
        for optimizer in trainer.optimizers:  # before the checkpoint's state is loaded into them
            optimizers.adopt(unwrapped(optimizer), pl_module, made)

    @property
    def is_finished(self) -> bool:
        """Whether the last prune event has been."""
        return self._done >= max(self.events, default=-1)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizers.check(map(unwrapped, trainer.optimizers), pl_module)
        if self.recalibrate:
            training_data(trainer)
            tracking_norms(pl_module)
        if self.request.reconstruction is not None:
            training_data(trainer, "`reconstruction`", "`lightning_prune.reconstruct`")
        length = self.timing.length(trainer, self._epochs)
        if self.timing.unit == "step":
            self.events = self.timing.lay_out(length, type(self).__name__)
            self._check_reach(trainer, length, f"the fit has {length} steps")
        elif trainer.max_steps >= 0:
            self._check_reach(trainer, length, f"max_steps={trainer.max_steps}")
        self.gathering.check(min(self.events, default=None), self.timing.unit, type(self).__name__)
        if pl_module.example_input_array is not None:
            self._check_ahead(trainer, pl_module, own_example(trainer, pl_module))

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.example_input_array is not None and self.timing.unit == "epoch":
            self._fire(trainer, pl_module, own_example(trainer, pl_module))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        example = batch if pl_module.example_input_array is None else own_example(trainer, pl_module)
        self._check_ahead(trainer, pl_module, example)
        if self.timing.unit == "step":
            if batch_idx % trainer.accumulate_grad_batches == 0:
                self._fire(trainer, pl_module, example)
        elif batch_idx == 0:  # a resumed fit may have come past `on_train_epoch_start`
            self._fire(trainer, pl_module, example)
        if not self.is_finished and not trainer.sanity_checking:
            self.gathering.begin(pl_module, lambda: reading(pl_module, example, self.request))
            self.gathering.look(batch, self._steps_left(trainer, batch_idx))

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.gathering.see_loss(loss)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.gathering.take(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.gathering.pause()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.gathering.pause()

    def _steps_left(self, trainer: pl.Trainer, batch_idx: int) -> float:
        """Return the optimizer steps before the next event."""
        coming = next((moment for moment in self.events if moment > self._done), None)
        return inf if coming is None else self.timing.steps_before(coming, trainer, batch_idx)

    def _check_ahead(self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: ExampleInputs) -> None:
        """Plan the whole pruning once before the first step, so that what is wrong shows before time is spent."""
        if not self._checked and not self.is_finished:
            rank_zero_info(f"{type(self).__name__}: {self._intention()}")
            self._rehearse(trainer, pl_module, example)
        self._checked = True

    def _intention(self) -> str:
        """Return the events in words."""
        shares = [f"{at} ({share * self.request.pruning_ratio:.1%})" for at, share in self.events.items()]
        told = ", ".join(shares if len(shares) <= _TOLD else [*shares[: _TOLD - 1], "...", shares[-1]])
        return f"prune events at {self.timing.unit}s {told}"

    def _rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: ExampleInputs) -> None:
        """Plan the last event at the weights that there are now."""
        if self.request.reconstruction is not None:
            check_restorable(pl_module)
        self.gathering.begin(pl_module, lambda: reading(pl_module, example, self.request))
        request = replace(self.request, criterion=self._stand_in(pl_module, example), reconstruction=None)
        record = agreed(trainer, pl_module, lambda: draft_cut(pl_module, example, request)).record
        rank_zero_info(f"{type(self).__name__}, at present weights: {record}")
        if self.request.allocation.event_cap == 1:  # else it takes more than one event
            _tell_shortfall(record)

    def _stand_in(self, pl_module: pl.LightningModule, example: ExampleInputs) -> Criterion:
        """Return a criterion that can score before anything was seen, to rehearse with."""
        criterion = self.request.criterion
        if isinstance(criterion, Gathered) and not self._is_gathered(criterion):
            criterion.forget()
            with reading(pl_module, example, self.request) as graph:
                criterion.begin(pl_module, graph)
            return Watched(criterion)
        return self.gathering.stand_in(criterion)

    def _fire(self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: ExampleInputs) -> None:
        """Cut if an event is due; one that a resumed fit has missed is made up for."""
        moments = list(self.events)
        come = bisect_right(moments, self.timing.now(trainer))
        due = come and moments[come - 1] > self._done and not self.is_finished
        if due and trainer.current_epoch < self._epochs:
            self._event(trainer, pl_module, example, moments[come - 1])

    def _event(self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: ExampleInputs, moment: int) -> None:
        """Prune as far as the schedule says for this moment."""
        request = self._request_at(pl_module, example, moment)
        if request.reconstruction is not None:
            share_buffers(trainer, [pl_module, *averaged_copies(trainer)])
        draft = agreed(trainer, pl_module, lambda: draft_cut(pl_module, example, request, self._sights(trainer)))
        with signals_wait():
            record = self._cut(trainer, pl_module, draft)
            self._done = moment
            self.gathering.forget()
        self._tell(trainer, record)
        tell_refits(trainer, draft.refits)

    def _sights(self, trainer: pl.Trainer) -> Sights:
        """Return the examples that a reconstruction looks at, of which each rank has its share."""
        settings = self.request.reconstruction
        if settings is None:
            return Sights()
        with isolate_rng():
            seen = first_examples(
                trainer.lightning_module, training_batches(trainer), -(-settings.images // trainer.world_size)
            )
            return Sights(list(seen), sum_when_all_come(trainer) if trainer.world_size > 1 else None)

    def _request_at(self, pl_module: pl.LightningModule, example: ExampleInputs, moment: int) -> Request:
        """Return what is asked of an event."""
        return replace(self.request, pruning_ratio=self.events[moment] * self.request.pruning_ratio)

    def _cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, draft: Draft) -> PruneRecord:
        """Cut the network and its averaged copies, and let the optimizers follow: all of it, or nothing."""
        record = replace(draft.record, epoch=trainer.current_epoch, step=trainer.global_step)
        every = [unwrapped(optimizer) for optimizer in trainer.optimizers]
        optimizers.check(every, pl_module)
        _drop_spent_gradients(pl_module, every)
        with without_reducer(trainer), together() as steps, failing_together(trainer):
            steps.append(history.commit(pl_module, draft.cut, record, draft.offsets))
            for network in averaged_copies(trainer):
                steps.append(history.commit(network, draft.cut, record, draft.offsets_in(network)))
            for optimizer in every:
                steps.append(optimizers.rebuild(optimizer, pl_module, draft.cut))
            optimizers.check(every, pl_module)
        if self.recalibrate:
            recalibrate_in_fit(trainer, [pl_module, *averaged_copies(trainer)], self.recalibrate)
        return record

    def _tell(self, trainer: pl.Trainer, record: PruneRecord) -> None:
        tell_record(trainer, record, f"{type(self).__name__}, {self.timing.unit} {self.timing.now(trainer)}")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        records = history.history_of(pl_module)
        if records and shows_tables(trainer):
            Console().print(history_table(records))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done, **self.gathering.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = state_dict["done"]
        self.gathering.load_state_dict(state_dict)


def unwrapped(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    """Return the torch optimizer inside a Lightning one."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def own_example(trainer: pl.Trainer, pl_module: pl.LightningModule) -> ExampleInputs:
    """Return the module's example inputs in the Trainer's precision."""
    return trainer.precision_plugin.convert_input(pl_module.example_input_array)


def tell_record(trainer: pl.Trainer, record: PruneRecord, when: str) -> None:
    """Tell a cut that was done."""
    rank_zero_info(f"{when}: {record}")
    _tell_shortfall(record)
    if shows_tables(trainer):
        Console().print(record_table(record, when))


def tell_refits(trainer: pl.Trainer, refits: Sequence[Refit]) -> None:
    """Tell how well refitted layers reproduce their outputs."""
    if refits:
        worst = max(refits, key=lambda refit: refit.error)
        rank_zero_info(f"{len(refits)} layers were refitted; the worst is {worst}")
        if shows_tables(trainer):
            Console().print(refit_table(refits))


def _drop_spent_gradients(pl_module: pl.LightningModule, every: Sequence[Optimizer]) -> None:
    """Free the gradients where Lightning does so before it uses them again: they need not be cut along."""
    if pl_module.automatic_optimization and not is_overridden("optimizer_zero_grad", pl_module):
        for optimizer in every:
            optimizer.zero_grad(set_to_none=True)


def shows_tables(trainer: pl.Trainer) -> bool:
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
