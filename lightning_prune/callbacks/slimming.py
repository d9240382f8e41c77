"""Network Slimming: a penalty drives BatchNorm scales to zero, then the channels with the smallest go."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_prune.allocation import Allocation, Global, RoundTo
from lightning_prune.callbacks.base import PruneCallback, unwrapped
from lightning_prune.callbacks.passes import Course, Passes, PassTiming, phases_of
from lightning_prune.callbacks.rehearsal import Rehearsal
from lightning_prune.callbacks.scales import OptimizedScales, penalised_scales, start_at
from lightning_prune.callbacks.travel import Lane, tell, travels
from lightning_prune.criteria import BNScale
from lightning_prune.penalties import L1, Update
from lightning_prune.reconstruction import Reconstruction
from lightning_prune.schedules import Schedule, one_shot
from lightning_prune.types import Constants, Heads, Trunks, Unit


class BNSlimmingCallback(PruneCallback):
    """Adds strength * sum |gamma| over all BatchNorm scales while training, and prunes by |gamma|.

    Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming" (arXiv 1708.06519). The
    penalty ends with the last prune event, as in the paper's fine-tuning. How far it can carry the scales is worked
    out before the first step, and a warning tells where that is not far enough.

    Several passes (slim, cut, fine-tune, again; section 3 of the paper) are asked for with a list of ratios. They are
    equally long, and the penalty is off from each cut to the end of the fine-tuning that follows it. The paper trains
    every pass with the whole learning rate schedule: `CosineAnnealingWarmRestarts` with one period a pass does so.

    Args:
        pruning_ratio: Fraction to be gone in the end, in [0, 1); or a rising sequence, what is to be gone after each
            of several passes. All are counted against the dense model.
        strength: The paper's lambda: 1e-4 for its VGG, 1e-5 for its ResNets, over 160 epochs. A short training
            needs more: scales travel by at most strength * sum(lr) / (1 - momentum), and start at 1.
        update: "subgradient" adds to the gradient, "proximal" soft-thresholds after the step; "auto" takes the
            first for SGD and the second for all optimizers that rescale gradients.
        delta: Half-width of the corner that smooth-L1 rounds off at 0, such as 1e-3; 0 is plain L1 (see `L1`).
        warmup: Epochs (or steps, with `every_n_steps`) over which the strength rises linearly from 0; in every pass.
        initial_scale: What the penalised scales of a network are set to before its first step, the paper's 0.5; None
            leaves them. Trained and pruned networks, and resumed fits, keep theirs.
        fine_tuning: Fraction of each of several passes that follows its cut, without penalty, in [0, 1); 0.5 if None,
            as in the paper. With one ratio everything after the last event is fine-tuning.
        allocation: `Global()` if None, as in the paper; `Global(cap=0.5)` spares every layer half of its channels,
            `Global(event_cap=0.5)` half of those that it has at each event, as the passes of the paper do.
        begin: Of several passes the first cut; if None, passes begin with the fit.
        end: Of several passes the last cut; if None, passes end with the fit.
        every: With several passes, cuts fall on multiples of it from `begin` on; `every_n_steps` likewise.

    The other arguments are those of `PruneCallback`. Layers under `ignore` get no penalty. Like the paper we exempt no
    other: scales that cannot be pruned (their group is frozen, or a layer tied to them stands under `ignore`) shrink
    too, unless they are ignored as well.

    Raises:
        ValueError: An argument is out of its range, or does not go with several passes.

    Example:
        >>> callback = BNSlimmingCallback(0.5, strength=1e-3, begin=10)
        >>> callback = BNSlimmingCallback([0.5, 0.75, 0.875], strength=1e-3, initial_scale=0.5)
    """

    def __init__(
        self,
        pruning_ratio: float | Sequence[float] = 0.5,
        *,
        strength: float = 1e-4,
        update: Update = "auto",
        delta: float = 0.0,
        warmup: float = 0,
        initial_scale: float | None = None,
        fine_tuning: float | None = None,
        of: Unit = "channels",
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
        passes = _passes(pruning_ratio, schedule, fine_tuning)
        super().__init__(
            pruning_ratio if passes is None else passes.ratios[-1],  # type: ignore[arg-type]
            of=of,
            criterion=BNScale(),
            allocation=allocation or Global(),
            schedule=passes or schedule,
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
        if passes is not None:
            fine_tuning = 0.5 if fine_tuning is None else fine_tuning
            self.timing = PassTiming(passes, begin, end, every, every_n_steps, fine_tuning)
        self.penalty = L1(strength, update, delta)
        self.warmup = _not_negative("warmup", warmup)
        self.initial_scale = initial_scale if initial_scale is None else _positive("initial_scale", initial_scale)
        self.course = Course()
        self._scales = OptimizedScales(())
        self._share = 0.0
        self._handles: list[RemovableHandle] = []

    @override
    def _check_reach(self, trainer: pl.Trainer, length: float, limit: str) -> None:
        super()._check_reach(trainer, length, limit)
        passes = self.timing.schedule
        if isinstance(passes, Passes) and len(self.events) < len(passes.ratios) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"{len(passes.ratios)} passes do not fit in: {type(self).__name__} can cut only at {self.timing.unit}s "
                f"{list(self.events)}, and {limit}. Train for longer, leave `begin` and `end` out, or count in steps "
                "with `every_n_steps`."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the initial scales: `configure_model` has been, and nothing has run forward yet."""
        super().on_fit_start(trainer, pl_module)
        if self.initial_scale is not None and trainer.ckpt_path is None:
            start_at(self.initial_scale, pl_module, self.request.ignore)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._scales = OptimizedScales(penalised_scales(pl_module, self.request.ignore))
        super().on_train_start(trainer, pl_module)
        self.course = Course(phases_of(self.timing, self.events), self.warmup, self.timing.unit)
        for optimizer in map(unwrapped, trainer.optimizers):
            self._join(optimizer)
        if trainer.is_global_zero and not self.is_finished:
            self._tell_travel(trainer, pl_module)

    def _join(self, optimizer: Optimizer) -> None:
        """Let the penalty enter by an optimizer, and tell how."""
        update, who = self.penalty.update_for(optimizer), type(optimizer).__name__
        rank_zero_info(
            f"{type(self).__name__}: L1 penalty of {self.penalty.strength:g} on {len(self._scales.scales)} BatchNorm "
            f"scales, as {update} update for {who}"
        )
        if update == "proximal":
            self._handles.append(optimizer.register_step_post_hook(self._shrink))
        elif not isinstance(optimizer, SGD):
            rank_zero_warn(
                f"update={self.penalty.update!r} with {who}: an optimizer that rescales its gradients moves scales "
                f"at a speed that does not depend on strength={self.penalty.strength:g}. Take update='proximal'."
            )

    def _tell_travel(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        who = type(self).__name__
        if not isfinite(trainer.num_training_batches):
            rank_zero_info(f"{who}: nobody knows how many steps there will be, so how far scales travel is not told")
            return
        moving = {
            optimizer: groups
            for optimizer in map(unwrapped, trainer.optimizers)
            if (groups := self._groups_of(optimizer)) and self._travels_by_strength(optimizer)
        }
        rehearsal = Rehearsal(trainer, pl_module, list(moving), self._epochs)
        lanes = [
            Lane(stand_in.param_groups[at], self.penalty.update_for(optimizer), _sizes(scales))
            for stand_in, (optimizer, groups) in zip(rehearsal.stand_ins, moving.items(), strict=True)
            for at, scales in groups.items()
        ]
        if lanes:
            found = travels(rehearsal, self.course, self.penalty.strength, lanes)
            tell(who, self.course, self.penalty.strength, found, rehearsal.unforeseen)

    def _travels_by_strength(self, optimizer: Optimizer) -> bool:
        return isinstance(optimizer, SGD) or self.penalty.update_for(optimizer) == "proximal"

    def _groups_of(self, optimizer: Optimizer) -> dict[int, list[torch.Tensor]]:
        found = {at: self._scales.of(group) for at, group in enumerate(optimizer.param_groups)}
        return {at: scales for at, scales in found.items() if scales}

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        epoch = trainer.current_epoch + batch_idx / trainer.num_training_batches
        self._share = self.course.share_at(epoch, trainer.global_step)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        optimizer = unwrapped(optimizer)
        if self._share and self.penalty.update_for(optimizer) == "subgradient":
            for group in optimizer.param_groups:
                share = -self._share if group.get("maximize") else self._share
                self.penalty.add_to_gradients(self._scales.of(group), share)

    def _shrink(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._share:
            for group in optimizer.param_groups:
                self.penalty.shrink(self._scales.of(group), group["lr"], self._share)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._leave()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._leave()

    def _leave(self) -> None:
        """Take the hooks off the optimizers, and let go of the scales."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._scales, self._share = OptimizedScales(()), 0.0


def _sizes(scales: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([scale.detach().abs().flatten().to("cpu", torch.float64) for scale in scales])


def _passes(pruning_ratio: Any, schedule: Schedule, fine_tuning: float | None) -> Passes | None:
    """Return the schedule of several passes; None for one."""
    if not isinstance(pruning_ratio, Sequence) or isinstance(pruning_ratio, str):
        if fine_tuning is None:
            return None
        raise ValueError(
            f"`fine_tuning` divides passes, and there is one ratio; got {fine_tuning}. Set `begin` to say when to "
            "cut, or give a list of ratios."
        )
    if schedule is not one_shot:
        raise ValueError(
            f"`schedule` is not asked where `pruning_ratio` is a list, a ratio for each pass; got {schedule!r}. Leave "
            "one of them out."
        )
    return Passes(tuple(map(float, pruning_ratio)))


def _not_negative(name: str, value: float) -> float:
    if not 0 <= value < inf:
        raise ValueError(
            f"`{name}` is the number of epochs, or steps, over which the penalty rises, 0 or more; got {value}. 0 "
            "begins with the whole strength."
        )
    return value


def _positive(name: str, value: float) -> float:
    if not 0 < value < inf:
        raise ValueError(
            f"`{name}` is what BatchNorm scales start at, above 0; got {value}. The paper has 0.5; None leaves them."
        )
    return value
