"""What a rehearsal foresees is what the fit does: each optimizer step, its moment, its learning rate and momentum."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fits import STEPS, Module, Resumable, momentum, trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers

from lightning_prune.callbacks.base import unwrapped
from lightning_prune.callbacks.rehearsal import Rehearsal

# Lightning, where the resumed fit writes no checkpoints itself
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

EPOCHS = 5
Told = list[tuple[float, int, float, float]]


class Beside(Callback):
    """Rehearses before training, and notes what then happens."""

    def __init__(self) -> None:
        self.foreseen: Told = []
        self.seen: Told = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.foreseen, self.seen = [], []
        optimizers = [unwrapped(optimizer) for optimizer in trainer.optimizers]
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else float("inf")
        self.rehearsal = Rehearsal(trainer, pl_module, optimizers[:1], epochs)
        (stand_in,) = self.rehearsal.stand_ins
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for epoch, step in islice(self.rehearsal.steps(), 200):
                self.foreseen.append((epoch, step, *settings_of(stand_in)))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, at: int) -> None:
        self.now = trainer.current_epoch + at / trainer.num_training_batches

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if unwrapped(optimizer) is unwrapped(trainer.optimizers[0]):
            self.seen.append((self.now, trainer.global_step, *settings_of(optimizer)))


def settings_of(optimizer: Optimizer) -> tuple[float, float]:
    (group,) = optimizer.param_groups
    return float(group["lr"]), group["betas"][0] if "betas" in group else group["momentum"]


def every(interval: str, frequency: int = 1) -> Callable[[Any], dict[str, Any]]:
    return lambda scheduler: {"lr_scheduler": {"scheduler": scheduler, "interval": interval, "frequency": frequency}}


def warm_then_cosine(optimizer: Optimizer) -> schedulers.LRScheduler:
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=4), schedulers.CosineAnnealingLR(optimizer, 20)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[4])


SCHEDULES: dict[str, Callable[[Optimizer], dict[str, Any]]] = {
    "none": lambda _: {},
    "steps": lambda o: {"lr_scheduler": schedulers.StepLR(o, 2, 0.1)},
    "milestones": lambda o: {"lr_scheduler": schedulers.MultiStepLR(o, [1, 3])},
    "cosine each step": lambda o: every("step")(schedulers.CosineAnnealingLR(o, EPOCHS * STEPS)),
    "restarts": lambda o: every("step")(schedulers.CosineAnnealingWarmRestarts(o, 7)),
    "sequence": lambda o: every("step")(warm_then_cosine(o)),
    "chain": lambda o: every("step")(
        schedulers.ChainedScheduler([schedulers.ConstantLR(o, 0.5, 5), schedulers.ExponentialLR(o, 0.9)])
    ),
    "each other epoch": lambda o: every("epoch", 2)(schedulers.ExponentialLR(o, 0.5)),
    "each fourth batch": lambda o: every("step", 4)(schedulers.ExponentialLR(o, 0.5)),
    "one cycle, of momentum too": lambda o: every("step")(schedulers.OneCycleLR(o, 0.2, total_steps=EPOCHS * STEPS)),
    "cyclic": lambda o: every("step")(schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=4)),
    "lambda": lambda o: every("step")(schedulers.LambdaLR(o, lambda step: 1 / (1 + step))),
    "multiplied": lambda o: every("epoch")(schedulers.MultiplicativeLR(o, lambda _: 0.7)),
    "polynomial": lambda o: every("step")(schedulers.PolynomialLR(o, 20, 2.0)),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_each_step_is_foreseen(schedule: Callable[[Optimizer], dict[str, Any]]) -> None:
    beside = Beside()
    trainer(beside, max_epochs=EPOCHS, limit_val_batches=0).fit(Module(scheduler=schedule))
    assert beside.foreseen == beside.seen
    assert len(beside.seen) == EPOCHS * STEPS
    assert beside.rehearsal.unforeseen == []


def test_adam_has_betas_in_place_of_momentum() -> None:
    beside = Beside()
    module = Module(partial(AdamW, lr=0.01), SCHEDULES["one cycle, of momentum too"])
    trainer(beside, max_epochs=EPOCHS, limit_val_batches=0).fit(module)
    assert beside.foreseen == beside.seen


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 4},
        {"limit_train_batches": 4},
        {"max_steps": 8},
        {"max_epochs": -1, "max_steps": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", ["cosine each step", "each fourth batch"])
def test_windows_and_limits(settings: dict[str, Any], schedule: str) -> None:
    beside = Beside()
    trainer(beside, **({"max_epochs": 3} | settings)).fit(Module(scheduler=SCHEDULES[schedule]))
    assert beside.foreseen == beside.seen
    assert beside.seen


def test_windows_that_change() -> None:
    beside = Beside()
    trainer(beside, GradientAccumulationScheduler({1: 3, 2: 4})).fit(Module(scheduler=SCHEDULES["cosine each step"]))
    assert beside.foreseen == beside.seen
    assert len(beside.seen) == 6 + 2 + 2 + 2


@pytest.mark.parametrize("schedule", ["cosine each step", "steps"])
@pytest.mark.parametrize("step", [STEPS - 1, STEPS, STEPS + 2])
def test_a_resumed_fit_foresees_the_rest(tmp_path: Path, step: int, schedule: str) -> None:
    make = Resumable if step % STEPS else Module
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(keep, max_epochs=3, enable_checkpointing=True).fit(make(scheduler=SCHEDULES[schedule]))
    beside = Beside()
    rest = trainer(beside, max_epochs=3)
    rest.fit(make(scheduler=SCHEDULES[schedule]), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert beside.foreseen == beside.seen
    assert len(beside.seen) == 3 * STEPS - step


class ByHand(Module):
    """Two optimizers stepped by hand, each once a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        made = [momentum(self.net[:3].parameters()), SGD(self.net[3:].parameters(), lr=0.1)]
        return made, [schedulers.StepLR(made[0], 1)]


def test_optimizers_stepped_by_hand_keep_their_rate() -> None:
    beside = Beside()
    trainer(beside, max_epochs=2).fit(ByHand())
    assert beside.foreseen == beside.seen
    assert [step for _, step, *_ in beside.seen] == list(range(0, 4 * STEPS, 2))
    assert beside.rehearsal.unforeseen == ["StepLR"]


class Stubborn(schedulers.StepLR):
    def __deepcopy__(self, memo: object) -> Stubborn:
        raise TypeError("not to be copied")


class Exhausted(schedulers.StepLR):
    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch >= 1:
            raise ValueError("no more")
        super().step()


def plateau(optimizer: Optimizer) -> dict[str, Any]:
    return {"lr_scheduler": {"scheduler": schedulers.ReduceLROnPlateau(optimizer), "monitor": "train_loss"}}


@pytest.mark.parametrize("make", [plateau, lambda o: {"lr_scheduler": Stubborn(o, 10)}], ids=["plateau", "stubborn"])
def test_what_cannot_be_rehearsed_is_named(make: Callable[[Optimizer], dict[str, Any]]) -> None:
    beside = Beside()
    trainer(beside, max_epochs=2).fit(Module(scheduler=make))
    assert beside.foreseen == beside.seen
    assert beside.rehearsal.unforeseen in (["ReduceLROnPlateau"], ["Stubborn"])


def test_a_scheduler_that_gives_up_does_not_stop_the_rehearsal() -> None:
    beside = Beside()
    with pytest.raises(ValueError, match="no more"):
        trainer(beside, max_epochs=4).fit(Module(scheduler=lambda o: {"lr_scheduler": Exhausted(o, 10)}))
    assert len(beside.foreseen) == 4 * STEPS
    assert beside.rehearsal.unforeseen == ["Exhausted"]


class OwnRate(Module):
    """Its schedule is a method of its own, which holds the whole module."""

    def rate(self, step: int) -> float:
        return 0.5**step

    def __deepcopy__(self, memo: object) -> Module:
        raise AssertionError("copied for a forecast")

    def configure_optimizers(self) -> Any:
        optimizer = momentum(self.parameters())
        return [optimizer], [schedulers.LambdaLR(optimizer, self.rate)]


def test_what_a_scheduler_holds_of_the_module_is_not_copied() -> None:
    beside = Beside()
    trainer(beside).fit(OwnRate())
    assert beside.foreseen == beside.seen
    assert beside.rehearsal.unforeseen == []


def test_the_stand_in_shares_nothing_that_changes() -> None:
    rate = torch.tensor(0.1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = AdamW([parameter], lr=rate)
    scheduler = schedulers.StepLR(optimizer, 1)
    made = trainer(limit_train_batches=2)
    module = Module()
    seen: list[Tensor] = []

    class Look(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.strategy.lr_scheduler_configs = [type(trainer.lr_scheduler_configs[0])(scheduler)]
            rehearsal = Rehearsal(trainer, pl_module, [optimizer], 4)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                seen.extend(rehearsal.stand_ins[0].param_groups[0]["lr"].clone() for _ in rehearsal.steps())
            trainer.should_stop = True

    made.callbacks.append(Look())
    module._scheduler = lambda o: {"lr_scheduler": schedulers.StepLR(o, 1)}
    made.fit(module)
    assert [round(float(value), 6) for value in seen] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    assert rate.item() == pytest.approx(0.1)
    assert scheduler.last_epoch == 0
    assert not optimizer.state
