"""Reconstructions on two processes; each rank writes what became of them. Run by test_lasso_ddp.py.

python lasso_ddp_fits.py <folder>
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from ddp_fits import Shuffled, fit, hashed, outcome, run_all
from fits import EXAMPLE, Module, images, trainer, widths
from lightning.pytorch import callbacks as neighbours
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import history_of
from lightning_prune.allocation import ByCost, Global
from lightning_prune.callbacks import LassoPruneCallback, PruneCallback, base
from lightning_prune.callbacks.averages import averaged_copies
from lightning_prune.criteria import Magnitude
from lightning_prune.pruner import Draft, draft_cut
from lightning_prune.reconstruction import Reconstruction
from lightning_prune.restoring import Sights

WHOLE = Reconstruction(images=48, points=36)
"""All positions of all maps: nothing is left to draw."""

lasso = partial(LassoPruneCallback, 0.5, of="channels", reconstruction=WHOLE)
patient = partial(DDPStrategy, process_group_backend="gloo", timeout=timedelta(seconds=60))


class Keep(pl.Callback):
    """Keeps the network as it is before the first step."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.state = self.state or {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


class Noting(LassoPruneCallback):
    """Notes what it looks at."""

    def _sights(self, trainer: pl.Trainer) -> Sights:
        found = super()._sights(trainer)
        self.seen = [batch.args[0] for batch in found.batches]
        return found


def together(folder: Path) -> dict[str, Any]:
    """What both ranks have seen, and what came of it."""
    net, keep, own = Module(), Keep(), Noting(0.5, of="channels", reconstruction=WHOLE)
    fit(net, own, keep, strategy=patient, max_epochs=1)
    torch.save({"seen": own.seen, "state": keep.state}, folder / f"together{net.global_rank}.pt")
    return outcome(net) | {"at the cut": hashed(keep.state)}


class Astray(pl.Callback):
    """On the second rank, norms have seen images of another kind."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == 1 and trainer.current_epoch == 2:
            norm = pl_module.get_submodule("net.4")
            norm.running_var *= torch.logspace(-3, 3, 8)  # type: ignore[operator]


def cut_in_a_fit(*neighbours: Callable[[], pl.Callback], **settings: Any) -> Any:
    """Cuts after two epochs, in which each rank saw images of its own; notes the plan that it has drawn up itself."""

    def run(folder: Path) -> dict[str, Any]:
        plans: list[str] = []

        def noted(*arguments: Any) -> Draft:
            draft = draft_cut(*arguments)
            plans.append(repr(draft.record.kept))
            return draft

        base.draft_cut = noted  # type: ignore[attr-defined]
        own = PruneCallback(0.5, reconstruction=WHOLE, begin=2, end=2, **settings)
        net, copies = Shuffled(), []

        class Look(pl.Callback):
            def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                copies[:] = [hashed(dict(copy.named_parameters())) for copy in averaged_copies(trainer)]

        try:
            made = fit(net, *(make() for make in neighbours), own, Look(), strategy=patient, max_epochs=4)
        finally:
            base.draft_cut = draft_cut  # type: ignore[attr-defined]
        return outcome(net, made) | {"plans": plans, "copies": copies}

    return run


class Tainted(Module):
    """On the second rank, the images are something else."""

    def __init__(self, taint: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._taint = taint

    def train_dataloader(self) -> Any:
        inputs, labels = images().dataset.tensors  # type: ignore[attr-defined]
        return DataLoader(TensorDataset(self._taint(inputs) if self.global_rank else inputs, labels), batch_size=8)


class Unreadable(TensorDataset):
    """Cannot be read, on the second rank."""

    def __getitem__(self, index: int) -> Any:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


class OnABrokenDisk(Module):
    def train_dataloader(self) -> Any:
        return DataLoader(Unreadable(*images().dataset.tensors), batch_size=8)  # type: ignore[attr-defined]


class Heavy(Module):
    """Its forward fails on the second rank, on more than two images in eval mode."""

    is_broken = True

    def forward(self, images: Tensor) -> Tensor:
        looked_at = not self.training and len(images) > 2
        if self.is_broken and looked_at and torch.distributed.get_rank() == 1:
            raise RuntimeError("out of memory")
        return super().forward(images)


class Light(Heavy):
    is_broken = False


class BreakCopies(pl.Callback):
    """Lets averaged copies fail."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for copy in averaged_copies(trainer):
            copy.is_broken = True  # type: ignore[assignment]


def failing(make: Callable[[], Module], *callbacks: Callable[[], pl.Callback], begin: int = 0) -> Any:
    def run(folder: Path) -> dict[str, Any]:
        net, start = make(), time.monotonic()
        arguments = {"begin": begin, "end": begin}
        try:
            settings = {"use_distributed_sampler": False, "num_sanity_val_steps": 0, "limit_val_batches": 0}
            fit(net, *(one() for one in callbacks), lasso(**arguments), strategy=patient, max_epochs=2, **settings)
        except Exception as error:
            seconds = time.monotonic() - start
            return {"error": f"{type(error).__name__}: {error}", "seconds": seconds, "widths": widths(net)}
        return {"error": None}

    return run


def validated(batches: int | None = None, **settings: Any) -> Any:
    """Cut without a fit, looking at a list of batches or at the module's own data."""

    def run(folder: Path) -> dict[str, Any]:
        net, start = Module(example=settings.get("example", EXAMPLE)), time.monotonic()
        seen = None if batches is None else [batch[0] for batch in images()][:batches]
        allocation = settings.get("allocation")
        made = trainer(lasso(batches=seen, allocation=allocation), devices=2, strategy=patient())
        try:
            made.validate(net, verbose=False)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - start}
        if seen is not None and allocation is None:
            torch.save(net.state_dict(), folder / f"validated{batches}of{net.global_rank}.pt")
        return outcome(net) | {"error": None, "records": len(history_of(net))}

    return run


FITS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "together": together,
    "lasso after two epochs": cut_in_a_fit(criterion=lasso().request.criterion),
    "norms astray": cut_in_a_fit(Astray, criterion=lasso().request.criterion),
    "magnitude after two epochs": cut_in_a_fit(criterion=Magnitude(), allocation=Global()),
    "validated": validated(),
    "validated on 6 batches": validated(6),
    "validated on 5 batches": validated(5),
    "validated on 5 batches by cost": validated(5, allocation=ByCost()),
    "validated on 1 batch": validated(1),
    "validated on 1 batch without example": validated(1, example=None),
    "NaN on one rank": failing(lambda: Tainted(lambda inputs: inputs * torch.nan)),
    "a loader that fails on one rank": failing(OnABrokenDisk),
    "a forward that fails on one rank": failing(Heavy),
    "after all that": together,
}

if hasattr(neighbours, "EMAWeightAveraging"):  # Lightning 2.6
    average = partial(neighbours.EMAWeightAveraging, decay=0.9)
    FITS["averaged"] = cut_in_a_fit(average, criterion=lasso().request.criterion)
    FITS["an average that fails on one rank"] = failing(Light, average, BreakCopies, begin=1)


if __name__ == "__main__":
    run_all({name: run for name, run in FITS.items() if name in (sys.argv[2:] or FITS)}, Path(sys.argv[1]))
