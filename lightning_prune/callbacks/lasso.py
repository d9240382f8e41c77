"""Channel pruning by LASSO and least squares: cut a trained network first, make up for it, then train on or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_prune import history
from lightning_prune.allocation import Allocation, RoundTo
from lightning_prune.callbacks.base import PruneCallback, own_example, tell_record, tell_refits
from lightning_prune.callbacks.ranks import agreed, check_strategy, sum_when_all_come
from lightning_prune.criteria import Criterion, Lasso
from lightning_prune.errors import PruningError
from lightning_prune.inputs import ExampleInputs, first_examples
from lightning_prune.one_shot import ratio_of
from lightning_prune.pruner import Draft, draft_cut
from lightning_prune.reconstruction import Reconstruction
from lightning_prune.restoring import Sights
from lightning_prune.schedules import Schedule, one_shot
from lightning_prune.types import Heads, PruneRecord, Trunks, Unit


class LassoPruneCallback(PruneCallback):
    """Cuts a trained network at the start of a fit, layer after layer, and refits what reads the channels left.

    He, Zhang, Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks" (arXiv 1707.06168): the channels
    of each group are chosen by LASSO, and the weights of the layers that read them fitted by least squares to what
    these returned in the original network, over a few thousand examples of the training data and without their labels.
    The fit is the fine-tuning. Without one, `trainer.validate(model, datamodule, ...)` with this callback cuts a
    network that has not been cut before, and tells how good what is left is.

    Args:
        pruning_ratio: Fraction to be gone in the end, counted against the dense model, in [0, 1).
        speed_up: In its place: how many times fewer MACs there will be, above 1.
        of: What `pruning_ratio` is a fraction of (see `prune`).
        criterion: How channels are chosen; `Lasso()` if None. Any other one goes with a refit as well.
        allocation: How the ratio is shared out over the groups; `Uniform()` if None. `ByCost()` with `Lasso()` lets
            the error per MAC saved be the same everywhere, `ShallowToDeep()` is the paper's.
        reconstruction: What is looked at; `Reconstruction()` if None.
        batches: What forward takes, to look at in `trainer.validate`; None takes the training data of the data module,
            or of the module. A fit looks at its training data.
        begin: Epoch, or step, of the first event; 0 if the network is trained already.
        trunks: How a trunk that several layers read is cut; "sampled" is the paper's.

    The other arguments are those of `PruneCallback`.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> callback = LassoPruneCallback(speed_up=2)
        >>> callback.request.pruning_ratio, callback.request.of
        (0.5, 'macs')
    """

    def __init__(
        self,
        pruning_ratio: float | None = None,
        *,
        speed_up: float | None = None,
        of: Unit = "macs",
        criterion: Criterion | None = None,
        allocation: Allocation | None = None,
        reconstruction: Reconstruction | None = None,
        batches: Iterable[ExampleInputs] | None = None,
        schedule: Schedule = one_shot,
        begin: int = 0,
        end: int | None = None,
        every: int = 1,
        every_n_steps: int | None = None,
        ignore: Sequence[str] = (),
        heads: Heads = "whole",
        min_channels: int = 1,
        round_to: RoundTo = None,
        trunks: Trunks = "whole",
        recalibrate: int = 0,
    ) -> None:
        super().__init__(
            ratio_of(pruning_ratio, speed_up, of),
            of=of,
            criterion=criterion or Lasso(),
            allocation=allocation,
            schedule=schedule,
            begin=begin,
            end=end,
            every=every,
            every_n_steps=every_n_steps,
            ignore=ignore,
            heads=heads,
            min_channels=min_channels,
            round_to=round_to,
            trunks=trunks,
            recalibrate=recalibrate,
            reconstruction=reconstruction or Reconstruction(),
        )
        self.batches = batches

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.VALIDATING or history.history_of(pl_module):
            return
        with torch.inference_mode(False):  # else what is left could not be trained any more
            self.prune_now(trainer, pl_module)

    def prune_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> PruneRecord:
        """Cut a network that no fit is training.

        Raises:
            MisconfigurationException: There is nothing to look at, or the network is spread over several devices.
            PruningError: There are no batches, or fewer than processes.
        """
        check_strategy(trainer, pl_module, type(self).__name__)
        draft = agreed(trainer, pl_module, lambda: self._drafted(trainer, pl_module))
        history.commit(pl_module, draft.cut, draft.record, draft.offsets)
        tell_record(trainer, draft.record, f"{type(self).__name__}, without training")
        tell_refits(trainer, draft.refits)
        return draft.record

    def _drafted(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Draft:
        seen = list(self._examples(trainer, pl_module))
        if not seen:
            raise PruningError(
                f"{type(self).__name__} got no batch to look at on rank {trainer.global_rank} of {trainer.world_size}. "
                "Pass a few thousand images in batches, at least one for each process."
            )
        example = seen[0] if pl_module.example_input_array is None else own_example(trainer, pl_module)
        sights = Sights(seen, sum_when_all_come(trainer) if trainer.world_size > 1 else None)
        return draft_cut(pl_module, example, self.request, sights)

    def _examples(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[ExampleInputs]:
        settings = self.request.reconstruction
        assert settings is not None
        own = islice(iter(self._batches(trainer, pl_module)), trainer.global_rank, None, trainer.world_size)
        moved = (trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch)) for batch in own)
        return first_examples(pl_module, moved, -(-settings.images // trainer.world_size))

    def _batches(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterable[ExampleInputs]:
        if self.batches is not None:
            return self.batches
        data: pl.LightningDataModule | None = getattr(trainer, "datamodule", None)
        if data is not None and is_overridden("train_dataloader", data):
            data.setup("fit")
            return data.train_dataloader()  # type: ignore[no-any-return]
        if is_overridden("train_dataloader", pl_module):
            return pl_module.train_dataloader()  # type: ignore[no-any-return]
        raise MisconfigurationException(
            f"{type(self).__name__} has nothing to look at in `trainer.validate`. Pass `batches`, a loader of a few "
            "thousand examples, or a data module with a `train_dataloader`."
        )
