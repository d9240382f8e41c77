"""Fisher pruning: while the network trains, the channels whose removal costs the least loss go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lightning_prune.allocation import Allocation, Global, RoundTo, WeightAllocation
from lightning_prune.baseline import Baseline
from lightning_prune.callbacks.calibration import training_batches, training_data
from lightning_prune.callbacks.gathering import Gathering
from lightning_prune.callbacks.masking import MaskPruneCallback, what_goes
from lightning_prune.callbacks.ranks import average_over_ranks
from lightning_prune.callbacks.retraining import Retraining
from lightning_prune.callbacks.timing import Timing
from lightning_prune.criteria import Fisher, score_groups
from lightning_prune.criteria.gathered import Reduction
from lightning_prune.information import fisher_information
from lightning_prune.inputs import ExampleInputs
from lightning_prune.masks.granularity import Granularity
from lightning_prune.pruner import Request, reading
from lightning_prune.reconstruction import Reconstruction
from lightning_prune.schedules import Schedule, cubic
from lightning_prune.types import Constants, Heads, PruneRecord, Trunks, Unit


class FisherPruneCallback(MaskPruneCallback):
    """Prunes what costs the least loss: channels by the gradients of the training that goes on, or single weights.

    Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning" (arXiv 1801.05787). The signal of
    channels (see `Fisher`) is gathered in every training step since the last prune event, and forgotten with the cut.
    With another granularity weights are masked, in the order of F_i w_i^2: the Fisher information is then estimated per
    example at each event (see `fisher_information`), over some batches of the training data.

    Args:
        pruning_ratio: Fraction to be gone in the end, counted against the dense model, in [0, 1).
        granularity: "channels"; or "weights", "2:4", "blocks" and so on, see `MagnitudePruneCallback`.
        of: What the ratio of channels is a fraction of, "macs" for instance.
        channels_per_event: So many channels go at each event, until the ratio is reached; the paper takes 1 every 10
            steps: `channels_per_event=1, every_n_steps=10`. None: as many as the schedule says.
        reduction: How the loss joins the examples of a batch, "mean" or "sum".
        window: Only so many optimizer steps before each event are looked at; None: all, as where events are counted in
            epochs of a length that nobody knows.
        allocation: `Global()` if None: scores of different groups are in one unit, that of the loss. `ByCost()` weighs
            them against what the channels cost.
        batches: Batches over which the information of weights is estimated, 1 or more.
        retraining: What follows when weights are masked; `Retraining()` if None.
        schedule: How the ratio rises with progress; not asked with `channels_per_event`.
        begin: First epoch, or step, with an event; at least 1. With `channels_per_event` the first interval if None.
        end: Last epoch, or step, with an event. With `channels_per_event` the end of the fit if None.

    The other arguments are those of `PruneCallback`.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> callback = FisherPruneCallback(0.6, of="macs", begin=2, end=8)
        >>> callback = FisherPruneCallback(0.6, of="macs", channels_per_event=1, every_n_steps=10)
    """

    def __init__(
        self,
        pruning_ratio: float = 0.5,
        *,
        granularity: str | Granularity = "channels",
        of: Unit = "channels",
        channels_per_event: int | None = None,
        reduction: Reduction = "mean",
        window: int | None = None,
        allocation: Allocation | WeightAllocation | None = None,
        batches: int = 16,
        retraining: Retraining | None = None,
        schedule: Schedule = cubic,
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
        unit, of_channels, of_weights = what_goes(granularity, allocation, of, retraining)
        _check(unit, of, channels_per_event, batches)
        super().__init__(
            pruning_ratio,
            granularity=unit,
            weight_allocation=of_weights or Global(),
            retraining=retraining,
            of=of,
            criterion=Fisher(reduction) if unit is None else None,
            allocation=of_channels or Global(),
            schedule=schedule,
            begin=begin,
            end=end,
            every=every,
            every_n_steps=every_n_steps,
            ignore=ignore,
            heads=heads,
            min_channels=min_channels,
            round_to=round_to,
            constants=constants,
            trunks=trunks,
            recalibrate=recalibrate,
            reconstruction=reconstruction,
        )
        self.gathering = Gathering(self.request.criterion, window)
        if channels_per_event is not None:
            self.timing = Steady(schedule, begin, end, every, every_n_steps)
        self.channels_per_event = channels_per_event
        self.batches = batches
        self._is_reached = False

    @override
    def _settings(self) -> Sequence[object]:
        return (*super()._settings(), _Settings(self.channels_per_event, self.gathering.window))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.unit is not None:
            training_data(
                trainer, f"{type(self).__name__}(granularity={self.unit!r})", "`magnitude_masks(information=)`"
            )

    @property
    @override
    def is_finished(self) -> bool:
        return self._is_reached or super().is_finished

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.current_epoch == 0:
            self._is_reached = False

    @override
    def _intention(self) -> str:
        if self.channels_per_event is None:
            return super()._intention()
        first, last = min(self.events), max(self.events)
        return (
            f"{self.channels_per_event} channels go at each of {len(self.events)} events, {self.timing.unit}s {first} "
            f"to {last}, until {self.request.pruning_ratio:.1%} of {self.request.of} are gone"
        )

    @override
    def _request_at(self, pl_module: pl.LightningModule, example: ExampleInputs, moment: int) -> Request:
        request = super()._request_at(pl_module, example, moment)
        if self.channels_per_event is None:
            return request
        with reading(pl_module, example, request) as graph:
            scores = score_groups(request.criterion, pl_module, graph.groups)
            dense = sum(Baseline.of(pl_module, graph, scores).channels.values())
        gone = dense - sum(map(len, scores.values()))
        most = min(gone + self.channels_per_event, dense - 1)
        return replace(request, of="channels", pruning_ratio=most / max(dense, 1))

    @override
    def _information(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Mapping[str, Tensor] | None:
        with isolate_rng(), trainer.precision_plugin.forward_context():
            found = fisher_information(pl_module, training_batches(trainer), most=self.batches)
        average_over_ranks(trainer, found.values())
        return found

    @override
    def _tell(self, trainer: pl.Trainer, record: PruneRecord) -> None:
        if self.channels_per_event is None:
            super()._tell(trainer, record)
            return
        who, of = type(self).__name__, self.request.of
        reached = {"channels": record.reached, "params": record.params.removed, "macs": record.macs.removed}[of]
        thinner = ", ".join(
            f"{name} {change.after}" for name, change in record.channels.items() if change.after < change.before
        )
        rank_zero_info(f"{who}, {self.timing.unit} {self.timing.now(trainer)}: {thinner}; {reached:.1%} of {of} gone")
        if reached >= self.request.pruning_ratio:
            self._is_reached = True
        elif not thinner:
            self._is_reached = True
            reasons = "; ".join(f"{name}: {reason}" for name, reason in record.held_back.items())
            rank_zero_warn(f"{who}: asked {self.request.pruning_ratio:.1%} of {of}, reached {reached:.1%}; {reasons}")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "is_reached": self._is_reached}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._is_reached = state_dict["is_reached"]


def _check(unit: Granularity | None, of: Unit, channels_per_event: int | None, batches: int) -> None:
    """See that the arguments go together."""
    if batches < 1:
        raise ValueError(f"`batches` is what the information of weights is estimated over, 1 or more; got {batches}.")
    if unit is not None and channels_per_event is not None:
        raise ValueError(
            f"`channels_per_event` is about channels; got {channels_per_event} with granularity {unit!r}. Leave it out."
        )
    if channels_per_event is not None and channels_per_event < 1:
        raise ValueError(f"`channels_per_event` is 1 or more, or None; got {channels_per_event}.")
    if channels_per_event is not None and of not in ("channels", "params", "macs"):
        raise ValueError(
            f'`of` is "channels", "params" or "macs" with `channels_per_event`; got {of!r}. Leave `channels_per_event` '
            "out, and the schedule says how many go."
        )


@dataclass(frozen=True)
class _Settings:
    channels_per_event: int | None
    window: int | None


@dataclass(frozen=True)
class Steady(Timing):
    """Events at each multiple of the interval from `begin` to `end`, all alike; from the first interval on if None."""

    @override
    def lay_out(self, length: float, who: str) -> dict[int, float]:
        interval = self.every if self.every_n_steps is None else self.every_n_steps
        if self.end is None and not isfinite(length):
            raise MisconfigurationException(
                f"{who} removes channels until the fit ends, and nobody knows when that is. Set `end`, or limit the "
                "fit with Trainer(max_epochs=...) or Trainer(max_steps=...)."
            )
        end = int(length) - 1 if self.end is None else self.end
        begin = interval if self.begin is None else self.begin
        return dict.fromkeys(range(begin, end + 1, interval), 1.0)
