"""The engine of callbacks that prune single weights: masks on a schedule, held through the fit, and what follows."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from typing_extensions import Self, override

from lightning_prune import dropout, history
from lightning_prune.allocation import Allocation, DenseLayer, WeightAllocation, Zeros
from lightning_prune.callbacks.averages import averaged_copies
from lightning_prune.callbacks.base import PruneCallback, shows_tables, unwrapped
from lightning_prune.callbacks.ranks import agreed
from lightning_prune.callbacks.retraining import (
    Retraining,
    parts_of,
    rewind,
    scale_learning_rates,
    snapshot,
    stand_still,
)
from lightning_prune.callbacks.signals import signals_wait
from lightning_prune.callbacks.upkeep import Upkeep
from lightning_prune.criteria import Alive
from lightning_prune.cut import cut_tensor, renamed
from lightning_prune.errors import NothingToPruneError
from lightning_prune.inputs import ExampleInputs
from lightning_prune.masks.granularity import Granularity
from lightning_prune.masks.granularity import granularity as read_granularity
from lightning_prune.masks.held import Masks, apply, check_zeros, hold, masks_of, packed_bits
from lightning_prune.masks.magnitude import magnitude_masks
from lightning_prune.masks.maskable import dense_layers, maskable
from lightning_prune.pruner import Draft, draft_cut
from lightning_prune.report import mask_table
from lightning_prune.tensors import named_parameters
from lightning_prune.types import PruneRecord, Unit


@dataclass(frozen=True, eq=False)
class MaskProposal:
    """Masks that all ranks are to take.

    Attributes:
        masks: The masks.
    """

    masks: Masks

    def sent(self) -> Self:
        """Return what other ranks need of it."""
        return self

    def received(self, first: MaskProposal) -> MaskProposal:
        """Return the first rank's masks on the devices of this one's."""
        return MaskProposal({name: mask.to(self.masks[name].device) for name, mask in first.masks.items()})

    def digest(self) -> str:
        """Return a hash of it."""
        whole = hashlib.sha256(repr([(name, tuple(mask.shape)) for name, mask in self.masks.items()]).encode())
        for mask in self.masks.values():
            whole.update(packed_bits(mask).numpy().tobytes())
        return whole.hexdigest()


def what_goes(
    granularity: str | Granularity,
    allocation: Allocation | WeightAllocation | None,
    of: Unit,
    retraining: Retraining | None,
) -> tuple[Granularity | None, Allocation | None, WeightAllocation | None]:
    """Tell what a preset prunes, None for channels, and part its allocation into that of channels and of weights.

    Raises:
        ValueError: An argument does not go with the granularity.
    """
    unit = None if granularity == "channels" else read_granularity(granularity)
    of_channels = allocation if isinstance(allocation, Allocation) else None
    of_weights = allocation if isinstance(allocation, WeightAllocation) else None
    if unit is None and retraining is not None:
        raise ValueError(f'`retraining` is about weights; got {retraining} with granularity="channels".')
    if allocation is not None and (of_channels if unit is None else of_weights) is None:
        raise ValueError(
            f"`allocation` {allocation!r} does not share out {'channels' if unit is None else 'weights'}, and "
            f"`granularity` is {granularity!r}. Uniform() and Global() share out both."
        )
    if unit is not None and of != "channels":
        raise ValueError(f"`of` is about channels; got {of!r} with granularity={granularity!r}. Leave it out.")
    return unit, of_channels, of_weights


class MaskPruneCallback(PruneCallback):
    """Prunes weights on a schedule: masks them, holds the masks through the fit, and sees to the retraining.

    A pruned weight is exactly 0 after every optimizer step and in every file that is written; the masks lie in every
    checkpoint, as the history of cuts does. Biases, norms and embeddings are never masked.

    Args:
        pruning_ratio: Fraction of the weights to be gone in the end, counted against the dense model, in [0, 1).
        granularity: What goes as one: "weights", "2:4" or another n:m, "blocks" or sides such as "8x1"; None leaves
            masks to others, and cuts channels as `PruneCallback` does.
        weight_allocation: How the ratio is shared out over the layers; `Uniform()` if None.
        retraining: What happens after the events; `Retraining()` if None.
        **arguments: Those of `PruneCallback`.

    Raises:
        ValueError: An argument is out of its range, or does not go with another.
    """

    def __init__(
        self,
        pruning_ratio: float,
        *,
        granularity: Granularity | None,
        weight_allocation: WeightAllocation | None = None,
        retraining: Retraining | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(pruning_ratio, **arguments)
        if granularity is not None and self.request.trunks == "sampled":
            raise ValueError(
                f'`trunks` "sampled" gives convolutions other names, by which masks are known; got it with '
                f'granularity={granularity!r}. Take "selected", or prune channels with a callback of its own.'
            )
        if granularity is not None and self.request.reconstruction is not None:
            raise ValueError(
                f"`reconstruction` is about channels: masks leave all of them; got it with granularity={granularity!r}."
            )
        self.unit = granularity
        self.weight_allocation = weight_allocation
        self.retraining = retraining or Retraining()
        self.upkeep = Upkeep()
        self._dense: dict[str, DenseLayer] = {}
        self._dropouts: dict[str, float] = {}
        self._lowered: dict[str, float] = {}
        self._acts_on: dict[str, list[str]] = {}
        self._parts: list[list[nn.Parameter]] = []
        self._earlier: dict[str, Tensor] = {}
        self._cuts_then = 0
        self._began = 0
        self._taken: Masks = {}

    @override
    def _settings(self) -> Sequence[object]:
        return () if self.unit is None else (_Told(self.unit, self.weight_allocation, self.retraining),)

    def masked_weights(self, pl_module: pl.LightningModule) -> set[str]:
        """Return the names of the weights that this callback masks."""
        return set() if self.unit is None else set(maskable(pl_module, self.request.ignore))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.current_epoch == 0 and not masks_of(pl_module):  # another network
            self._dense, self._dropouts, self._lowered, self._acts_on = {}, {}, {}, {}
            self._earlier, self._cuts_then = {}, 0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        check_alone(self, trainer, pl_module)
        for name, p in self._lowered.items():
            _dropout(pl_module, name).p = p

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = trainer.global_step
        if self.unit is not None:
            check_zeros(masks_of(pl_module), named_parameters(pl_module))
            self._follow(pl_module)
        super().on_train_start(trainer, pl_module)
        if self.unit is not None:
            self.upkeep.watch(map(unwrapped, trainer.optimizers))

    @override
    def _rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: ExampleInputs) -> None:
        if self.unit is None:
            return super()._rehearse(trainer, pl_module, example)
        retraining = self.retraining
        if retraining.alternate and len(self.events) <= len(retraining.alternate):
            raise MisconfigurationException(
                f"{len(retraining.alternate)} parts take turns between prune events, and there are {len(self.events)} "
                "events: one more than parts is needed. Take a schedule with more events, such as `cubic`, or leave "
                "`alternate` out."
            )
        self._dense = self._dense or dense_layers(pl_module, self.request.ignore)
        self._follow_names(pl_module)
        if retraining.dropout == "follow":
            acts_on = dropout.dropout_layers(pl_module, example)
            own = {name: [weight for weight in weights if weight in self._dense] for name, weights in acts_on.items()}
            self._acts_on = {name: weights for name, weights in own.items() if weights}
            self._dropouts = self._dropouts or {name: _dropout(pl_module, name).p for name in self._acts_on}
        masks = agreed(trainer, pl_module, lambda: self._proposed(pl_module, self.request.pruning_ratio)).masks
        rank_zero_info(f"{type(self).__name__}, at present weights: {self._in_words(masks)}")
        if retraining.dead == "remove":
            self._draft_of_dead(trainer, pl_module, example)
        return None

    def _information(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Mapping[str, Tensor] | None:
        """Return the Fisher information by which weights are ranked at an event; None: they are by magnitude."""
        return None

    def _proposed(
        self, pl_module: pl.LightningModule, ratio: float, information: Mapping[str, Tensor] | None = None
    ) -> MaskProposal:
        assert self.unit is not None
        masks = magnitude_masks(
            pl_module,
            ratio,
            self.unit,
            allocation=self.weight_allocation,
            ignore=self.request.ignore,
            before={name: mask for name, mask in masks_of(pl_module).items() if name in self._dense} or None,
            dense=self._dense,
            information=information,
        )
        return MaskProposal(masks)

    @override
    def _event(self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: ExampleInputs, moment: int) -> None:
        if self.unit is None:
            return super()._event(trainer, pl_module, example, moment)
        self._follow_names(pl_module)
        ratio = self.events[moment] * self.request.pruning_ratio
        information = self._information(trainer, pl_module)
        masks = agreed(trainer, pl_module, lambda: self._proposed(pl_module, ratio, information)).masks
        every = [unwrapped(optimizer) for optimizer in trainer.optimizers]
        with signals_wait():
            if self.retraining.rewind_to is not None:
                rewind(pl_module, self._snapshot_now(pl_module), every)
            put_on({**masks_of(pl_module), **masks}, trainer, pl_module)
            records = self._remove_dead(trainer, pl_module, example)
            masks = {name: masks_of(pl_module)[name] for name in masks}
            self._lower_dropouts(pl_module, masks)
            self._follow(pl_module, every)
            if self._done < 0:  # last, since all else can be done twice
                scale_learning_rates(trainer, every, self.retraining.lr_factor)
            self._done = moment
        title = f"{type(self).__name__}, {self.timing.unit} {self.timing.now(trainer)}"
        rank_zero_info(f"{title}: asked {ratio:.1%} of weights, {self._in_words(masks)}")
        if shows_tables(trainer):
            Console().print(mask_table(masks, title))
        if records:
            first, last = records[0], records[-1]
            rank_zero_info(
                f"{title}: channels without weights cut out; parameters {first.params.before:,} -> "
                f"{last.params.after:,}, MACs {first.macs.before:,} -> {last.macs.after:,}"
            )
        return None

    def _follow_names(self, pl_module: pl.LightningModule) -> None:
        """Know weights by the names that they have since the cuts of other callbacks."""
        for selects in (record.selects for record in history.history_of(pl_module)):
            self._dense = {renamed(name, selects): layer for name, layer in self._dense.items()}
            acts_on = self._acts_on.items()
            self._acts_on = {name: [renamed(weight, selects) for weight in weights] for name, weights in acts_on}

    def _in_words(self, masks: Masks) -> str:
        total = sum(prod(layer.shape) for layer in self._dense.values())
        left = sum(int(mask.count_nonzero()) for mask in masks.values())
        return f"reached {1 - left / total:.1%}; weights {total:,} -> {left:,}"

    def _snapshot_now(self, pl_module: pl.LightningModule) -> Mapping[str, Tensor]:
        """Return the weights of `rewind_to`, cut as the network has been since."""
        if not self._earlier:
            raise MisconfigurationException(
                f"`rewind_to` is step {self.retraining.rewind_to}, and the first prune event comes before it. "
                "Lower it, or raise `begin`."
            )
        earlier = dict(self._earlier)
        for record in history.history_of(pl_module)[self._cuts_then :]:
            earlier = {renamed(name, record.selects): tensor for name, tensor in earlier.items()}
            for name, dims in record.kept.items():
                if name in earlier:
                    kept = {dim: torch.tensor(positions) for dim, positions in dims.items()}
                    earlier[name] = cut_tensor(earlier[name], kept)
        return earlier

    def _lower_dropouts(self, pl_module: pl.LightningModule, masks: Masks) -> None:
        sizes = {name: prod(layer.shape) for name, layer in self._dense.items()}
        self._lowered = dropout.ratios(self._acts_on, self._dropouts, masks, sizes)
        for name, p in self._lowered.items():
            _dropout(pl_module, name).p = p

    def _draft_of_dead(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: ExampleInputs
    ) -> Draft | None:
        request = replace(self.request, pruning_ratio=0.0, of="channels", criterion=Alive(), allocation=Zeros())
        try:
            return agreed(trainer, pl_module, lambda: draft_cut(pl_module, example, request))
        except NothingToPruneError:
            return None

    def _remove_dead(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: ExampleInputs
    ) -> Sequence[PruneRecord]:
        """Cut out channels without weights, and those that have none left because of that."""
        records: list[PruneRecord] = []
        while self.retraining.dead == "remove":
            draft = self._draft_of_dead(trainer, pl_module, example)
            if draft is None or not len(draft.plan):
                break
            records.append(self._cut(trainer, pl_module, draft))
            if self._earlier:  # with the constants that have just been absorbed
                self._remember(pl_module)
        return records

    def _follow(self, pl_module: pl.LightningModule, optimizers: Sequence[Optimizer] | None = None) -> None:
        """Let the upkeep follow the masks, and optimizers forget what they know of weights that are pruned anew."""
        self._taken = masks_of(pl_module)
        names = self.masked_weights(pl_module)
        own = {name: mask for name, mask in self._taken.items() if name in names}
        if optimizers is None:
            self.upkeep.follow(own, pl_module)
        else:
            self.upkeep.take(own, pl_module, optimizers)
        self._parts = parts_of(pl_module, self.retraining.alternate)  # cuts can make biases

    def _remember(self, pl_module: pl.LightningModule) -> None:
        self._earlier, self._cuts_then = snapshot(pl_module), len(history.history_of(pl_module))

    def _remember_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rewind_to = self.retraining.rewind_to
        if rewind_to is not None and not self._earlier and self._began <= rewind_to <= trainer.global_step:
            self._remember(pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remember_if_due(trainer, pl_module)
        super().on_train_epoch_start(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._remember_if_due(trainer, pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.unit is None:
            return
        if masks_of(pl_module) is not self._taken:
            self._follow(pl_module)
        if self._parts and self._done >= 0 and not self.is_finished:
            stand_still(self._parts, bisect_right(list(self.events), self._done) - 1)
        self.upkeep.before_step(unwrapped(optimizer))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self.upkeep.leave()
        self._taken = {}

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self.upkeep.leave()
        self._taken = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        dense = {name: [list(layer.shape), layer.std] for name, layer in self._dense.items()}
        masking = {
            "dense": dense,
            "dropouts": self._dropouts,
            "lowered": self._lowered,
            "earlier": self._earlier,
            "cuts_then": self._cuts_then,
        }
        return {**super().state_dict(), **({} if self.unit is None else masking)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.unit is not None:
            dense = state_dict["dense"].items()
            self._dense = {name: DenseLayer(tuple(shape), std) for name, (shape, std) in dense}
            self._dropouts, self._lowered = dict(state_dict["dropouts"]), dict(state_dict["lowered"])
            self._earlier = dict(state_dict["earlier"])
            self._cuts_then = state_dict["cuts_then"]


@dataclass(frozen=True)
class _Told:
    """What tells two mask callbacks apart."""

    granularity: Granularity
    weight_allocation: WeightAllocation | None
    retraining: Retraining


def _dropout(pl_module: nn.Module, name: str) -> _DropoutNd:
    module = pl_module.get_submodule(name)
    assert isinstance(module, _DropoutNd)
    return module


class MasksWeights(Protocol):
    """A callback that masks weights."""

    def masked_weights(self, pl_module: pl.LightningModule) -> set[str]:
        """Return their names."""


def check_alone(callback: MasksWeights, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse two callbacks that mask the same weight.

    Raises:
        MisconfigurationException: Another callback of the Trainer masks one of these weights.
    """
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is not callback and hasattr(other, "masked_weights"):
            both = callback.masked_weights(pl_module) & other.masked_weights(pl_module)
            if both:
                raise MisconfigurationException(
                    f"{type(callback).__name__} and {type(other).__name__} both mask {min(both)!r}. Keep one of "
                    "them, or divide the layers between them with `ignore`."
                )


def put_on(masks: Masks, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let the network and its averaged copies hold masks, and set their pruned weights to 0."""
    for network in (pl_module, *averaged_copies(trainer)):
        hold(network, masks)
        apply(masks, network)
