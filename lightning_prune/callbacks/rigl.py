"""Sparse training from scratch: few weights from the first step on, and which ones changes while the network learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor, isfinite
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_prune.allocation import WeightAllocation
from lightning_prune.callbacks.base import unwrapped
from lightning_prune.callbacks.checkpoints import follow_checkpoints
from lightning_prune.callbacks.masking import MaskProposal, check_alone, put_on
from lightning_prune.callbacks.pausing import Pauses
from lightning_prune.callbacks.ranks import agreed, check_strategy
from lightning_prune.callbacks.signals import signals_wait
from lightning_prune.callbacks.timing import Timing, epochs_of
from lightning_prune.callbacks.upkeep import Upkeep
from lightning_prune.masks.allocations import ERK
from lightning_prune.masks.growing import (
    Decay,
    Growth,
    check_allocation,
    check_sparsity,
    cosine_decay,
    exchange,
    lot,
    random_masks,
)
from lightning_prune.masks.held import Masks, masks_of, sparsity
from lightning_prune.masks.maskable import maskable
from lightning_prune.schedules import one_shot

_NEAR = 0.005
"""Masks that a network brings along may be this far from the sparsity asked."""


class RigLCallback(pl.Callback):
    """Trains a sparse network from scratch that drops small weights and grows others (RigL, SET).

    Before the first forward, masks are drawn by lot; every layer has as many weights from then on as it has then.
    Every `every_n_steps` optimizer steps an exchange takes the place of the step: each layer drops the kept weights of
    smallest |w| and grows as many where the dense gradient of the masked network is largest,

        k_l = floor(f_t * kept_l),  f_t = drop_fraction / 2 * (1 + cos(pi t / T_end)),

    Evci et al. 2020 ("Rigging the Lottery: Making All Tickets Winners", algorithm 1). With `grow="random"` they grow
    anywhere (SET, Mocanu et al. 2018). Grown weights are 0 and have no momentum; those that are neither dropped nor
    grown stay as they are, with what the optimizer knows of them, and so do dropped ones that grow in the same
    exchange, as in the authors' code. The weights that the masks leave start as they were initialised, without
    scaling by the density: so do the authors'.

    A pruned weight is exactly 0 after every optimizer step and in every file that is written. In an exchange the
    optimizer moves nothing and no step is counted in its state; LR schedules go on. A layer without a gradient keeps
    its mask; gradients that are not finite (AMP lowers its scale then) let the exchange wait for the next step.
    A network that holds masks already goes on with them. `prune/sparsity` and `prune/exchanged` are logged.

    Args:
        sparsity: Fraction of the weights that are pruned, in [0, 1).
        allocation: How it is shared out over the layers: `ERK()` if None, `Uniform()` or `PerLayer({...})`.
        grow: "gradient" (RigL) or "random" (SET).
        drop_fraction: Fraction of the kept weights that the first exchange drops, in [0, 1); 0 keeps the first masks.
        decay: Pure function from progress to the share of it that is left, see `lightning_prune.masks.growing`.
        every_n_steps: Optimizer steps (`trainer.global_step`) from one exchange to the next.
        end: Exchanges come before this step (int), or before this fraction of the fit's steps (float in (0, 1]).
        ignore: Patterns of module names that stay dense.
        seed: Of everything that is drawn by lot.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: `allocation` cannot be used before there are scores.

    Example:
        >>> callback = RigLCallback(0.98, every_n_steps=200)
        >>> callback = RigLCallback(0.98, grow="random")
    """

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        allocation: WeightAllocation | None = None,
        grow: Growth = "gradient",
        drop_fraction: float = 0.3,
        decay: Decay = cosine_decay,
        every_n_steps: int = 100,
        end: int | float = 0.75,  # in this order: jsonargparse takes the first type that fits
        ignore: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        check_sparsity(sparsity)
        _check_exchange(grow, drop_fraction, decay, every_n_steps)
        _check_end(end)
        self.sparsity = sparsity
        self.allocation = check_allocation(allocation or ERK())
        self.grow = grow
        self.drop_fraction = drop_fraction
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.end = end
        self.ignore = ignore
        self.seed = seed
        self.upkeep = Upkeep()
        self.pauses = Pauses()
        self._end = 0
        self._started = False
        self._done: dict[int, int] = {}
        self._taken: Masks = {}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(ignore=list(self.ignore))  # nothing else tells two of them in a fit apart

    def masked_weights(self, pl_module: pl.LightningModule) -> set[str]:
        """Return the names of the weights that this callback masks."""
        return set(maskable(pl_module, self.ignore))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        follow_checkpoints(pl_module)
        if stage == "fit":
            check_strategy(trainer, pl_module, type(self).__name__)
            if trainer.current_epoch == 0:
                self._started, self._done = False, {}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_alone(self, trainer, pl_module)
        if any(isinstance(unwrapped(optimizer), LBFGS) for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                f"{type(self).__name__} exchanges weights, and LBFGS keeps one flat history of all of them, which "
                "cannot follow. Use SGD, Adam or another optimizer that treats each weight by itself."
            )
        masks = agreed(trainer, pl_module, lambda: MaskProposal(self._first_masks(pl_module))).masks
        put_on({**masks_of(pl_module), **masks}, trainer, pl_module)
        self._started = True
        left = sum(int(mask.count_nonzero()) for mask in masks.values())
        rank_zero_info(f"{type(self).__name__}: {left:,} weights in {len(masks)} layers ({sparsity(masks):.1%} gone)")

    def _first_masks(self, pl_module: pl.LightningModule) -> Masks:
        """Return the masks that the network holds, or else new ones."""
        drawn = random_masks(pl_module, self.sparsity, self.allocation, ignore=self.ignore, seed=self.seed)
        held = {name: mask.to(drawn[name].device) for name, mask in masks_of(pl_module).items() if name in drawn}
        masks = {**drawn, **held}
        if not self._started and abs(sparsity(masks) - sparsity(drawn)) > _NEAR:
            raise MisconfigurationException(
                f"{type(self).__name__}(sparsity={self.sparsity}) would prune {sparsity(drawn):.1%} of the weights, "
                f"but the network already holds masks that prune {sparsity(masks):.1%}, and exchanges change no "
                "number of weights. Ask for that sparsity, or drop them with `lightning_prune.masks.hold(model, {})`."
            )
        return masks

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.upkeep.watch(map(unwrapped, trainer.optimizers))
        self.pauses.watch(map(unwrapped, trainer.optimizers))
        self._end = self._end_of(trainer)
        if self.drop_fraction and self._moment(self._end) <= 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"{type(self).__name__} would never exchange a weight: every_n_steps={self.every_n_steps}, and "
                f"with end={self.end} exchanges end before step {self._end}. Lower `every_n_steps`, train for longer, "
                "or keep the first masks with drop_fraction=0."
            )

    def _end_of(self, trainer: pl.Trainer) -> int:
        if isinstance(self.end, int):
            return self.end
        length = Timing(one_shot, every_n_steps=self.every_n_steps).length(trainer, epochs_of(trainer))
        if not isfinite(length):
            raise MisconfigurationException(
                f"{type(self).__name__} has end={self.end} of the fit, and nobody knows how many steps that will have. "
                "Set Trainer(max_steps=...), or `end` to a step."
            )
        return floor(self.end * length + 1e-9)

    def _moment(self, step: int) -> int:
        """Return the step of the last exchange up to a step; 0 before the first."""
        return min(step, self._end - 1) // self.every_n_steps * self.every_n_steps

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        optimizer = unwrapped(optimizer)
        exchanged = self._exchange(trainer, pl_module, optimizer)
        self.pauses.pause(optimizer, now=exchanged)
        if exchanged:
            return
        if masks_of(pl_module) is not self._taken:
            self._take(trainer, pl_module)
        self.upkeep.before_step(optimizer)

    def _exchange(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> bool:
        """Let the weights that an optimizer holds be exchanged if that is due, and tell whether any was."""
        place = [unwrapped(each) for each in trainer.optimizers].index(optimizer)
        moment = self._moment(trainer.global_step)
        if moment <= self._done.get(place, 0):
            return False
        weights = self._weights_of(optimizer, pl_module)
        if weights and not _ready(weights):
            return False
        after = agreed(trainer, pl_module, lambda: self._proposed(pl_module, weights, moment)).masks
        self._done[place] = moment
        if after:
            self._put_on(after, trainer, pl_module)
        return bool(after)

    def _weights_of(self, optimizer: Optimizer, pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
        """Return the masked weights that an optimizer moves."""
        every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        held = {id(parameter) for parameter in every if parameter.requires_grad}
        return {name: weight for name, weight in maskable(pl_module, self.ignore).items() if id(weight) in held}

    def _proposed(
        self, pl_module: pl.LightningModule, weights: Mapping[str, nn.Parameter], moment: int
    ) -> MaskProposal:
        """Propose masks for those layers that exchange at least one weight."""
        share = self.drop_fraction * self.decay(moment / self._end)
        found: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if weight.grad is not None:
                mask = masks_of(pl_module)[name].to(weight.device)
                after = exchange(mask, weight, self._wanted(name, weight.grad, moment), share)
                if after is not mask:
                    found[name] = after
        return MaskProposal(found)

    def _wanted(self, name: str, gradient: Tensor, moment: int) -> Tensor:
        if self.grow == "gradient":
            return gradient
        return lot(gradient.shape, self.seed, name, moment).to(gradient.device)

    def _put_on(self, after: Masks, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before = masks_of(pl_module)
        with signals_wait():
            put_on({**before, **after}, trainer, pl_module)
            self._take(trainer, pl_module)
        if not trainer.barebones:
            grown = sum(int((mask & ~before[name].to(mask.device)).count_nonzero()) for name, mask in after.items())
            values = {"prune/sparsity": sparsity(masks_of(pl_module)), "prune/exchanged": float(grown)}
            pl_module.log_dict(values, rank_zero_only=True)

    def _take(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the upkeep follow the masks."""
        self._taken = masks_of(pl_module)
        names = self.masked_weights(pl_module)
        own = {name: mask for name, mask in self._taken.items() if name in names}
        self.upkeep.take(own, pl_module, map(unwrapped, trainer.optimizers))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.upkeep.leave()
        self.pauses.leave()
        self._taken = {}

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"done": dict(self._done)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._started, self._done = True, dict(state_dict["done"])


def _check_exchange(grow: Growth, drop_fraction: float, decay: Decay, every_n_steps: int) -> None:
    if grow not in get_args(Growth):
        raise ValueError(f'`grow` is "gradient" (RigL) or "random" (SET); got {grow!r}.')
    if not 0 <= drop_fraction < 1:
        raise ValueError(
            f"`drop_fraction` is the fraction of kept weights that the first exchange drops, in [0, 1); got "
            f"{drop_fraction}. The paper has 0.3."
        )
    shares = [decay(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(
            f"`decay` is a function from progress to the share of `drop_fraction` that is left, [0, 1] -> [0, 1]; at "
            f"0, 0.25, 0.5, 0.75 and 1 it gives {shares}. Use lightning_prune.masks.growing.cosine_decay or constant."
        )
    if every_n_steps < 1:
        raise ValueError(
            f"`every_n_steps` is the number of optimizer steps between exchanges, 1 or more; got {every_n_steps}. The "
            "paper has 100."
        )


def _check_end(end: int | float) -> None:
    if end < 1 if isinstance(end, int) else not 0 < end <= 1:
        raise ValueError(
            f"`end` is a step (int, 1 or more), or a fraction of the fit's steps (float in (0, 1]); got {end!r}. The "
            "paper has 0.75."
        )


def _ready(weights: Mapping[str, nn.Parameter]) -> bool:
    """Tell whether there is a gradient, and all of them are finite."""
    gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
    return bool(gradients) and all(bool(gradient.isfinite().all()) for gradient in gradients)
