"""How far scales travel: what is told before the fit is what the penalty alone then does, and nothing is disturbed."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fits import STEPS, Module, Resumable, equal, images, momentum, states, trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.callbacks import BNSlimmingCallback
from lightning_prune.callbacks.travel import Travel

# Lightning, where the resumed fit writes no checkpoints itself
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

SHORT = "the scales cannot reach zero before they are pruned"


class Alone(Module):
    """The loss gives the scales no gradient but zero, so that they move by the penalty alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0 * F.cross_entropy(self(batch[0]), batch[1])


class Told(BNSlimmingCallback):
    """Keeps what it foresees, and how far the first scale has come when each cut is due."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found: list[Travel] = []
        self.measured: list[float] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning_prune.callbacks.slimming.tell", lambda *given: self.found.extend(given[3]))
            super().on_train_start(trainer, pl_module)
        self.began = self.scale_of(pl_module)

    def scale_of(self, pl_module: pl.LightningModule) -> float:
        return float(pl_module.net[1].weight.detach()[0])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch in self.events:
            self.measured.append(self.began - self.scale_of(pl_module))
        super().on_train_epoch_start(trainer, pl_module)

    @property
    def foreseen(self) -> list[float]:
        return [float(travel.distances[0]) for travel in self.found]


nesterov = partial(SGD, lr=0.05, momentum=0.9, nesterov=True)
damped = partial(SGD, lr=0.05, momentum=0.9, dampening=0.5)
decoupled = partial(AdamW, lr=0.05, weight_decay=0.0)

SCHEDULES: dict[str, Callable[[Optimizer], dict[str, Any]]] = {
    "constant": lambda _: {},
    "steps": lambda o: {"lr_scheduler": lr_scheduler.StepLR(o, 2, 0.1)},
    "cosine": lambda o: {"lr_scheduler": {"scheduler": lr_scheduler.CosineAnnealingLR(o, 36), "interval": "step"}},
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("make", [momentum, decoupled], ids=["momentum", "adamw"])
def test_the_travel_is_what_the_scales_do(
    make: Callable[..., Optimizer], schedule: Callable[[Optimizer], dict[str, Any]]
) -> None:
    """To single precision: 24 steps in float32, each rounded to 6e-8 of a scale near 1."""
    assert_foreseen(Told(0.5, strength=0.01, begin=4), Alone(make, schedule))


@pytest.mark.parametrize("make", [nesterov, damped, partial(SGD, lr=0.05)], ids=["nesterov", "damped", "plain"])
def test_the_travel_of_a_warmed_up_penalty(make: Callable[..., Optimizer]) -> None:
    assert_foreseen(Told(0.5, strength=0.01, begin=4, warmup=1.5), Alone(make, SCHEDULES["cosine"]))


def assert_foreseen(callback: Told, module: Alone) -> None:
    trainer(callback, max_epochs=6, limit_val_batches=0).fit(module)
    assert callback.foreseen == pytest.approx(callback.measured, abs=24 * 6e-8)
    assert len(callback.foreseen) == 1
    assert callback.foreseen[0] > 1e-3


def test_accumulation_and_mixed_precision_make_fewer_steps_of_the_same_length() -> None:
    callback = Told(0.5, strength=0.01, begin=4)
    settings: dict[str, Any] = {"accumulate_grad_batches": 3, "precision": "bf16-mixed"}
    trainer(callback, max_epochs=6, **settings).fit(Alone(partial(SGD, lr=0.05)))
    assert callback.foreseen == pytest.approx([8 * 0.05 * 0.01])
    assert callback.measured == pytest.approx(callback.foreseen, abs=1e-6)


def test_in_the_long_run_it_is_the_formula() -> None:
    """strength * sum(lr) / (1 - momentum), up to the steps in which the momentum builds up: 9 of 240."""
    callback = Told(0.5, strength=1e-4, begin=40)
    trainer(callback, max_epochs=41, limit_val_batches=0).fit(Alone(momentum))
    formula = 1e-4 * 40 * STEPS * 0.05 / (1 - 0.9)
    assert 0.96 * formula < callback.foreseen[0] < formula


def test_the_numbers_of_the_paper() -> None:
    """160 epochs of 782 steps at 0.1, from a half 0.01, from three quarters 0.001: 6.6 for 1e-4, 0.66 for 1e-5.

    Here an epoch has 48 steps. Up to 0.3 %: the steps in which the momentum builds up.
    """

    class Paper(Module):
        def train_dataloader(self) -> Any:
            return DataLoader(torch.utils.data.TensorDataset(*images().dataset.tensors), batch_size=1)

        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [lr_scheduler.MultiStepLR(optimizer, [80, 120])]

    class Stopped(Told):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_train_start(trainer, pl_module)
            trainer.should_stop = True

    for strength, reach in ((1e-4, 6.6), (1e-5, 0.66)):
        callback = Stopped(0.7, strength=strength, begin=160)
        trainer(callback, max_epochs=320, limit_val_batches=0).fit(Paper())
        steps = 48 * 160
        formula = strength * (0.5 * 0.1 + 0.25 * 0.01 + 0.25 * 0.001) * steps / (1 - 0.9)
        assert callback.foreseen[0] == pytest.approx(formula, rel=3e-3)
        assert callback.foreseen[0] * 782 / 48 == pytest.approx(reach, rel=0.02)


def test_each_pass_has_its_own_travel() -> None:
    """A cosine over the whole fit leaves little for the last pass."""
    callback = Told([0.25, 0.5, 0.75], strength=0.01, warmup=0.5)
    module = Alone(partial(SGD, lr=0.05), lambda o: {"lr_scheduler": lr_scheduler.CosineAnnealingLR(o, 12)})
    trainer(callback, max_epochs=12).fit(module)
    assert list(callback.events) == [2, 6, 10]
    began = [0.0, callback.measured[0], callback.measured[1]]
    walked = [far - before for far, before in zip(callback.measured, began, strict=True)]
    assert callback.foreseen == pytest.approx(walked, abs=1e-6)
    assert walked[2] < 0.3 * walked[1]


def test_a_resumed_fit_tells_the_rest(tmp_path: Path) -> None:
    sgd = partial(SGD, lr=0.05)

    class Still(Resumable, Alone):
        pass

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first = Told(0.5, strength=0.01, begin=3)
    trainer(first, keep, enable_checkpointing=True).fit(Still(sgd))
    second = Told(0.5, strength=0.01, begin=3)
    trainer(second).fit(Still(sgd), ckpt_path=tmp_path / "step=8.ckpt")
    assert first.foreseen == pytest.approx([18 * 0.05 * 0.01])
    assert second.foreseen == pytest.approx([10 * 0.05 * 0.01])
    assert second.measured == pytest.approx(second.foreseen, abs=1e-6)


def test_frozen_groups_and_groups_of_their_own_rate_count_as_they_are() -> None:
    """0.1 for the first layer's scales and 0.01 for the second's: the median of 16 lies with the second."""

    class Groups(Alone):
        def configure_optimizers(self) -> Any:
            return SGD([{"params": self.net[:3].parameters()}, {"params": self.net[3:].parameters(), "lr": 0.01}], 0.1)

    callback = Told(0.5, strength=0.05, begin=2)
    trainer(callback, max_epochs=3).fit(Groups())
    (travel,) = callback.found
    assert travel.distances.tolist() == pytest.approx([12 * 0.1 * 0.05] * 8 + [12 * 0.01 * 0.05] * 8)
    assert travel.shortfall == pytest.approx(1 / (12 * 0.1 * 0.05))
    module = Groups()
    module.net[1].weight.requires_grad_(requires_grad=False)
    trainer(callback, max_epochs=3).fit(module)
    assert callback.found[0].distances.tolist() == pytest.approx([12 * 0.01 * 0.05] * 8)


# what is said


def said(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    return caplog


def test_too_weak_a_penalty_is_warned_about_with_the_strength_that_would_do() -> None:
    """12 steps of 0.1 at 0.01 are 0.012."""
    weak = BNSlimmingCallback(0.5, strength=0.01, begin=2)
    match = (
        rf"BNSlimmingCallback: {SHORT}: strength=0\.01 carries a scale by 0\.012 from epoch 0 to the cut at 2 .*"
        r"median \|gamma\| is 1\. Set `strength` to 0\.84 or more, let the cut come later, or .*initial_scale=0\.5"
    )
    with pytest.warns(UserWarning, match=match):
        trainer(weak, max_epochs=3).fit(Module(partial(SGD, lr=0.1)))


def test_the_strength_that_would_do_does(told: pytest.LogCaptureFixture) -> None:
    """Nothing is warned about; warnings are errors here."""
    trainer(BNSlimmingCallback(0.5, strength=0.84, begin=2), max_epochs=3).fit(Alone(partial(SGD, lr=0.1)))
    assert "strength=0.84 carries a scale by 1 from epoch 0 to the cut at 2" in said(told)


def test_smaller_scales_have_a_shorter_way(told: pytest.LogCaptureFixture) -> None:
    callback = BNSlimmingCallback(0.5, strength=0.43, begin=2, initial_scale=0.5)
    trainer(callback, max_epochs=3).fit(Alone(partial(SGD, lr=0.1)))
    assert "the median |gamma| is 0.5" in said(told)


def test_a_learning_rate_of_zero_is_named() -> None:
    with pytest.warns(UserWarning, match=rf"{SHORT}.*Their learning rate is 0: raise it"):
        trainer(BNSlimmingCallback(0.5, begin=2), max_epochs=3).fit(Module(partial(SGD, lr=0.0)))


def test_the_worst_pass_is_named() -> None:
    callback = BNSlimmingCallback([0.25, 0.5], strength=1.0, begin=2, end=6)
    schedule = SCHEDULES["steps"]
    with pytest.warns(UserWarning, match=rf"{SHORT}.*carries a scale by 0\.012 from epoch 4 to the cut at 6"):
        trainer(callback, max_epochs=8).fit(Alone(partial(SGD, lr=0.1), schedule))


def test_a_rate_that_waits_for_a_metric_is_taken_as_it_is(told: pytest.LogCaptureFixture) -> None:
    plateau = partial(lr_scheduler.ReduceLROnPlateau, patience=99)
    module = Alone(partial(SGD, lr=0.1), lambda o: {"lr_scheduler": {"scheduler": plateau(o), "monitor": "val_loss"}})
    trainer(BNSlimmingCallback(0.5, strength=0.84, begin=2), max_epochs=3).fit(module)
    assert "with the learning rate as it is now for ReduceLROnPlateau" in said(told)


class Endless(IterableDataset[tuple[Tensor, ...]]):
    def __iter__(self) -> Any:
        return iter(images().dataset)


class Streamed(Alone):
    def train_dataloader(self) -> Any:
        return DataLoader(Endless(), batch_size=8)


@pytest.mark.parametrize("unit", [{"begin": 1, "end": 1}, {"begin": 6, "end": 6, "every_n_steps": 1}], ids=str)
def test_an_unknown_length_is_told_and_not_warned_about(told: pytest.LogCaptureFixture, unit: dict[str, Any]) -> None:
    """The penalty is on up to the cut all the same, in whole epochs of warm-up."""
    module = Streamed(partial(SGD, lr=0.1))
    trainer(BNSlimmingCallback(0.5, strength=0.01, **unit), max_epochs=2).fit(module)
    assert "nobody knows how many steps there will be" in said(told)
    assert module.net[1].weight.tolist() == pytest.approx([1 - 6 * 0.1 * 0.01] * len(module.net[1].weight))


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"max_steps": 8}], ids=str)
def test_a_cut_that_the_fit_does_not_reach_is_no_matter_of_travel(settings: dict[str, Any]) -> None:
    callback = BNSlimmingCallback(0.5, strength=1e-4, begin=1, end=1, schedule=lambda _: 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, **({"max_epochs": 3} | settings)).fit(Module())
    told = [str(one.message) for one in caught if SHORT in str(one.message)]
    assert bool(told) is ("max_steps" in settings)


@pytest.mark.parametrize("make", [partial(Adam, lr=0.1), partial(AdamW, lr=0.1)])
def test_a_subgradient_behind_adam_is_warned_about(make: Callable[..., Optimizer]) -> None:
    callback = BNSlimmingCallback(0.5, update="subgradient", begin=1)
    with pytest.warns(UserWarning, match=r"update='subgradient' with Adam.*does not depend on strength=0\.0001.*prox"):
        trainer(callback, max_epochs=2).fit(Module(make))


# nothing is disturbed


class Drawing(lr_scheduler.LRScheduler):
    """Draws from every generator there is."""

    def get_lr(self) -> list[float]:
        return [0.05 * (0.5 + random.random() + np.random.rand() + float(torch.rand(()))) for _ in self.base_lrs]


class Shuffled(Module):
    """Draws random numbers itself, so that a disturbed generator shows."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = float(np.random.rand()) + random.random()
        return super().training_step([batch[0] + noise * torch.randn_like(batch[0]), batch[1]], batch_idx)


@pytest.mark.parametrize(
    "schedule",
    [
        SCHEDULES["cosine"],
        lambda o: {"lr_scheduler": {"scheduler": lr_scheduler.OneCycleLR(o, 0.1, 24), "interval": "step"}},
        lambda o: {"lr_scheduler": {"scheduler": Drawing(o), "interval": "step"}},
    ],
    ids=["cosine", "one cycle", "drawing"],
)
def test_the_fit_is_the_same_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, schedule: Callable[[Optimizer], dict[str, Any]]
) -> None:
    def fitted() -> tuple[Any, ...]:
        pl.seed_everything(3, verbose=False)
        module = Shuffled(momentum, schedule)
        fit = trainer(BNSlimmingCallback(0.5, strength=3.0, begin=3))
        fit.fit(module)
        scheduler = [
            {key: value for key, value in config.scheduler.state_dict().items() if not callable(value)}
            for config in fit.lr_scheduler_configs
        ]
        groups = [{k: v for k, v in g.items() if k != "params"} for o in fit.optimizers for g in o.param_groups]
        return module.state_dict(), states(module, fit.optimizers), scheduler, groups, torch.get_rng_state()

    told = fitted()
    monkeypatch.setattr(BNSlimmingCallback, "_tell_travel", lambda *_: None)
    untold = fitted()
    assert equal(told[0], untold[0])
    assert all(equal(told[1][name], state) for name, state in untold[1].items())
    assert told[2:4] == untold[2:4]
    assert torch.equal(told[4], untold[4])


class Unfreezing(BaseFinetuning):
    """The first layer joins at epoch 1, as a param group of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.walks: list[list[float]] = []

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.net[:3], train_bn=False)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[:3], optimizer, lr=0.1, initial_denom_lr=1.0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.walks.append([1 - float(pl_module.net[layer].weight.detach()[0]) for layer in (1, 4)])


class Filtered(Alone):
    def configure_optimizers(self) -> Any:
        return SGD([parameter for parameter in self.parameters() if parameter.requires_grad], lr=0.1)


# Lightning compares parameters by value: to it, a bias of zeros is in the optimizer already
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.filterwarnings(f"ignore:BNSlimmingCallback. {SHORT}")
def test_scales_that_are_unfrozen_later_are_penalised_from_then_on() -> None:
    unfreezing, one = Unfreezing(), STEPS * 0.1 * 0.05
    trainer(BNSlimmingCallback(0.5, strength=0.05, begin=2), unfreezing, max_epochs=3).fit(Filtered())
    expected = [0.0, one, one, 2 * one, one, 2 * one]
    assert [walk for walks in unfreezing.walks for walk in walks] == pytest.approx(expected, abs=1e-6)
