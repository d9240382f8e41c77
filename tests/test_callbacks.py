"""A cut inside a real fit: optimizer, learning rates, clipping, accumulation and precision go on as if nothing were."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fits import EXAMPLE, STEPS, Module, equal, kept_of, momentum, network, states, trainer, widths
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau

from lightning_prune import history_of
from lightning_prune.allocation import Global
from lightning_prune.callbacks import BNSlimmingCallback, MagnitudePruneCallback, PruneCallback
from lightning_prune.criteria import Random
from lightning_prune.schedules import cubic, linear

Scheduler = Callable[[Optimizer], dict[str, Any]]


class Spy(Callback):
    """Notes the optimizer's state at the start of each epoch, just before or after its neighbour in the list cuts."""

    def __init__(self, hook: str = "on_train_epoch_start") -> None:
        self.notes: dict[int, dict[str, dict[str, Tensor]]] = {}
        self.objects: dict[int, list[int]] = {}
        setattr(self, hook, self._note)

    def _note(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object = None, index: int = 0) -> None:
        if index == 0:
            self.notes[trainer.current_epoch] = states(pl_module, trainer.optimizers)
            held = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
            self.objects[trainer.current_epoch] = [id(parameter) for parameter in held]


class StepSpy(Callback):
    """Notes something before or after each optimizer step."""

    def __init__(self, look: Callable[[pl.Trainer, pl.LightningModule], Any], hook: str = "on_train_batch_end") -> None:
        self.seen: list[Any] = []
        setattr(self, hook, lambda trainer, module, *_: self.seen.append(look(trainer, module)))


OPTIMIZERS = {
    "momentum": momentum,
    "nesterov": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "adamw": partial(AdamW, lr=0.01, amsgrad=True),
}


@pytest.mark.parametrize("example", [EXAMPLE, None], ids=["example", "first batch"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_optimizer_follows_a_cut(optimizer: Callable[..., Optimizer], example: Tensor | None) -> None:
    module = Module(optimizer, example=example)
    before, after = (Spy("on_train_batch_start" if example is None else "on_train_epoch_start") for _ in range(2))
    trainer(before, PruneCallback(0.5, criterion=Random(1), begin=2, end=2, constants="drop"), after, max_epochs=3).fit(
        module
    )
    (record,) = history_of(module)
    assert (record.epoch, record.step, record.reached) == (2, 2 * STEPS, 0.5)
    assert widths(module) == [4, 4]
    assert len(record.kept) == 11  # 3 weights, and of each BatchNorm scale, shift, mean and variance
    old, new = before.notes[2], after.notes[2]
    assert old.keys() == new.keys() == dict(module.named_parameters()).keys()
    for name, state in old.items():
        assert len(state) > 1, "no state to compare"
        assert equal(new[name], {key: kept_of(value, record, name) for key, value in state.items()}), name
    assert after.objects[2] == before.objects[0] == [id(parameter) for parameter in module.parameters()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_all_parameters_move_at_the_step_after_the_cut(optimizer: Callable[..., Optimizer]) -> None:
    module = Module(optimizer)
    look = StepSpy(lambda _, module: [parameter.detach().clone() for parameter in module.parameters()])
    trainer(PruneCallback(0.5, begin=1, end=1), look, max_epochs=2).fit(module)
    at_cut, after = look.seen[STEPS], look.seen[STEPS + 1]
    assert [tuple(p.shape) for p in at_cut] == [tuple(p.shape) for p in module.parameters()]
    assert all(bool((was != now).any()) for was, now in zip(at_cut, after, strict=True))


def test_example_input_array_and_first_batch_cut_the_same() -> None:
    given, taken = Module(example=EXAMPLE), Module(example=None)
    for module in (given, taken):
        trainer(PruneCallback(0.5, begin=2, end=2)).fit(module)
    assert equal(given.state_dict(), taken.state_dict())
    assert history_of(given) == history_of(taken)


SCHEDULERS: dict[str, Scheduler] = {
    "epochs": lambda optimizer: {"lr_scheduler": CosineAnnealingLR(optimizer, 4)},
    "steps": lambda optimizer: {
        "lr_scheduler": {"scheduler": OneCycleLR(optimizer, 0.1, total_steps=4 * STEPS), "interval": "step"}
    },
    "plateau": lambda optimizer: {
        "lr_scheduler": {"scheduler": ReduceLROnPlateau(optimizer, mode="max", patience=0), "monitor": "epoch"}
    },
}


class Counted(Module):
    """Logs a number that no cut can change, for the plateau."""

    def on_validation_epoch_end(self) -> None:
        self.log("epoch", -float(self.current_epoch))


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_learning_rates_are_those_of_a_fit_without_a_cut(scheduler: Scheduler) -> None:
    curves = []
    for callbacks in ([], [PruneCallback(0.5, schedule=linear, begin=1, end=2)]):
        look = StepSpy(lambda trainer, _: trainer.optimizers[0].param_groups[0]["lr"])
        module = Counted(scheduler=scheduler)
        trainer(*callbacks, look).fit(module)
        curves.append(look.seen)
        assert len(history_of(module)) == len(callbacks)
    assert curves[0] == curves[1]
    assert len(set(curves[0])) > 2


def test_gradients_are_clipped_after_a_cut() -> None:
    def norm(_: pl.Trainer, module: pl.LightningModule) -> float:
        return float(torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm())

    look = StepSpy(norm)
    module = Module()
    trainer(PruneCallback(0.5, begin=1, end=1), look, gradient_clip_val=0.01).fit(module)
    assert widths(module) == [4, 4]
    assert look.seen == pytest.approx([0.01] * 4 * STEPS, rel=1e-3)


@pytest.mark.parametrize("schedule", [{"accumulate_grad_batches": 3}, GradientAccumulationScheduler({0: 1, 1: 4})])
@pytest.mark.parametrize("example", [EXAMPLE, None], ids=["example", "first batch"])
def test_accumulated_gradients(schedule: dict[str, int] | Callback, example: Tensor | None) -> None:
    module, spy = Module(example=example), Spy()
    callbacks, settings = ([], schedule) if isinstance(schedule, dict) else ([schedule], {})
    look = StepSpy(lambda trainer, _: trainer.global_step)
    trainer(PruneCallback(0.5, schedule=linear, begin=1, end=3), spy, look, *callbacks, **settings).fit(module)
    assert [record.epoch for record in history_of(module)] == [2, 3]
    assert look.seen[-1] == (8 if settings else 6 + 3 * 2)
    assert widths(module) == [4, 4]
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert not equal(spy.notes[3]["net.0.weight"], states(module, [])["net.0.weight"])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision: str) -> None:
    module = Module(partial(AdamW, lr=0.01))
    trainer(PruneCallback(0.5, begin=1, end=1), precision=precision).fit(module)
    assert widths(module) == [4, 4]
    assert all(parameter.isfinite().all() for parameter in module.parameters())


# when, and how much


small_network = pytest.mark.filterwarnings("ignore:Asked .* of channels, reached")  # its widths are coarse


@small_network
@pytest.mark.parametrize(
    ("callback", "epochs"),
    [
        (PruneCallback(0.5), [3]),  # a third of max_epochs
        (PruneCallback(0.5, begin=0, end=0), [0]),
        (PruneCallback(0.5, begin=8), [8]),
        (MagnitudePruneCallback(0.75, begin=2, end=8, every=2), [4, 6, 8]),
        (MagnitudePruneCallback(0.75), [4, 5, 6]),  # two thirds of max_epochs
        (MagnitudePruneCallback(0.75, begin=0, end=3, every=2), [2, 3]),
    ],
)
def test_events_fall_where_they_should(callback: PruneCallback, epochs: list[int]) -> None:
    module = Module()
    trainer(callback, max_epochs=9, limit_train_batches=1, limit_val_batches=0).fit(module)
    assert [record.epoch for record in history_of(module)] == epochs
    assert [record.step for record in history_of(module)] == epochs
    assert callback.is_finished


def test_a_third_of_two_epochs_is_the_first() -> None:
    module = Module()
    trainer(PruneCallback(0.5), max_epochs=2).fit(module)
    assert [record.epoch for record in history_of(module)] == [0]


@small_network
@pytest.mark.parametrize("allocation", [None, Global()], ids=["uniform", "global"])
def test_a_gradual_cut_ends_at_the_widths_of_one_cut(allocation: Global | None) -> None:
    """0.625 of 8 channels in cubic steps: 0.2637, 0.4541, 0.5835 and so on, always of the dense 16."""
    gradual = MagnitudePruneCallback(0.625, schedule=cubic, begin=0, end=6, allocation=allocation)
    at_once = PruneCallback(0.625, begin=6, end=6, allocation=allocation)
    ended = []
    for callback in (gradual, at_once):
        module = Module()
        trainer(callback, max_epochs=7, limit_val_batches=0).fit(module)
        records = history_of(module)
        assert records[-1].reached == 0.625
        assert all(sooner.reached <= later.reached for sooner, later in pairwise(records))
        assert {record.channels["net.0"].dense for record in records} == {8}
        ended.append(widths(module))
    assert sum(ended[0]) == sum(ended[1]) == 6
    assert allocation is not None or ended == [[3, 3], [3, 3]]


@pytest.mark.parametrize("of", ["params", "macs"])
def test_a_gradual_cut_of_parameters_or_macs(of: Any) -> None:
    module = Module()
    trainer(PruneCallback(0.6, of=of, schedule=linear, begin=0, end=3, round_to=1), limit_val_batches=0).fit(module)
    records = history_of(module)
    dense = {"params": records[0].params, "macs": records[0].macs}[of]
    assert dense.before == dense.dense
    assert widths(module) == [4, 4]  # 5 channels each would remove 56 % of the parameters and 58 % of the MACs
    assert records[-1].reached > 0.6


def test_rounding_to_whole_channels_is_no_shortfall() -> None:
    """30 % of 8 channels are 2 or 3, so 25 % is all that was asked: nothing was held back, nothing to warn about."""
    module = Module()
    trainer(PruneCallback(0.3, begin=1, end=1), max_epochs=2).fit(module)
    assert widths(module) == [6, 6]


def test_fast_dev_run_goes_through() -> None:
    module = Module()
    pl.Trainer(fast_dev_run=True, accelerator="cpu", callbacks=[PruneCallback(0.5)], enable_progress_bar=False).fit(
        module
    )
    assert widths(module) == [4, 4]
    module = Module()
    late = PruneCallback(0.5, begin=7)
    pl.Trainer(fast_dev_run=True, accelerator="cpu", callbacks=[late], enable_progress_bar=False).fit(module)
    assert widths(module) == [8, 8]


# one callback or several, one fit or several


def test_a_callback_serves_a_second_fit() -> None:
    """A new fit of a fresh model starts from nothing; otherwise it would silently stay dense."""
    callback, ended = PruneCallback(0.5, begin=1, end=1), []
    for _ in range(2):
        module = Module()
        trainer(callback).fit(module)
        ended.append(widths(module))
    assert ended == [[4, 4], [4, 4]]


def test_a_fit_that_goes_on_does_not_cut_again() -> None:
    module, fit = Module(), trainer(PruneCallback(0.5, begin=1, end=1), max_epochs=2)
    fit.fit(module)
    fit.fit_loop.max_epochs = 4
    fit.fit(module)
    assert fit.current_epoch == 4
    assert [record.epoch for record in history_of(module)] == [1]


def test_two_callbacks_in_one_trainer() -> None:
    """Slimming cuts a quarter, then magnitude goes on to a half of the same dense model."""
    module = Module()
    slimming = BNSlimmingCallback(0.25, strength=1e-3, begin=1, end=1)
    fit = trainer(slimming, MagnitudePruneCallback(0.5, begin=2, end=3))
    fit.fit(module)
    assert [record.epoch for record in history_of(module)] == [1, 3]
    assert [record.reached for record in history_of(module)] == [0.25, 0.5]
    assert slimming.is_finished
    assert sum(widths(module)) == 8


@pytest.mark.parametrize(
    "other",
    [
        MagnitudePruneCallback(0.5, begin=1),
        PruneCallback(0.25, begin=1),
        PruneCallback(0.5, begin=2),
        PruneCallback(0.5, begin=1, end=3),
        PruneCallback(0.5, begin=1, of="macs"),
        PruneCallback(0.5, begin=1, every=2),
        PruneCallback(0.5, begin=1, ignore=["net.0"]),
        PruneCallback(0.5, begin=1, criterion=Random()),
    ],
    ids=["class", "ratio", "begin", "end", "of", "every", "ignore", "criterion"],
)
def test_state_keys_tell_callbacks_apart(other: PruneCallback) -> None:
    assert other.state_key != PruneCallback(0.5, begin=1).state_key
    assert PruneCallback(0.5, begin=1).state_key == PruneCallback(0.5, begin=1).state_key


# other ways to train


class Manual(Module):
    """Manual optimization with two optimizers, one for the first half of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> list[Optimizer]:
        return [momentum(self.net[:3].parameters()), Adam(self.net[3:].parameters(), lr=0.01)]


def test_manual_optimization_with_several_optimizers() -> None:
    module, before, after = Manual(), Spy(), Spy()
    fit = trainer(before, PruneCallback(0.5, criterion=Random(1), begin=2, end=2, constants="drop"), after)
    fit.fit(module)
    (record,) = history_of(module)
    for name, state in before.notes[2].items():
        assert len(state) > 1
        assert equal(after.notes[2][name], {key: kept_of(value, record, name) for key, value in state.items()})
    held = [p for optimizer in fit.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in module.parameters()]
    assert widths(module) == [4, 4]
    assert all(not torch.equal(p, after.notes[3][name]["self"]) for name, p in module.named_parameters())


def test_several_param_groups_keep_their_settings() -> None:
    class Split(Module):
        def configure_optimizers(self) -> Optimizer:
            groups = [{"params": self.net[:6].parameters(), "lr": 0.03}, {"params": self.net[8].parameters()}]
            return SGD(groups, lr=0.01, momentum=0.9)

    module, fit = Split(), trainer(PruneCallback(0.5, begin=1, end=1))
    fit.fit(module)
    assert [group["lr"] for group in fit.optimizers[0].param_groups] == [0.03, 0.01]
    assert [len(group["params"]) for group in fit.optimizers[0].param_groups] == [6, 2]
    assert all(fit.optimizers[0].state[p]["momentum_buffer"].shape == p.shape for p in module.parameters())


def test_layers_that_are_made_in_configure_model() -> None:
    """Lightning makes them after the callbacks' `setup`."""

    class Late(Module):
        def __init__(self) -> None:
            super().__init__(net=nn.Identity())

        def configure_model(self) -> None:
            self.net = network()

    for callback in (PruneCallback(0.5, begin=1, end=1), BNSlimmingCallback(0.5, begin=1, end=1)):
        module = Late()
        trainer(callback, max_epochs=2).fit(module)
        assert sum(widths(module)) == 8


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "WeightAveraging", "StochasticWeightAveraging"])
def test_averaged_weights_follow(name: str) -> None:
    averaging = getattr(pl.callbacks, name, None)
    if averaging is None:
        pytest.skip(f"this Lightning has no {name}")
    options = {"swa_lrs": 0.01, "swa_epoch_start": 1} if name.startswith("Stochastic") else {}
    module, callback = Module(), averaging(**options)
    trainer(PruneCallback(0.5, begin=2, end=2), callback).fit(module)
    assert widths(module) == [4, 4]
    assert module(torch.zeros_like(EXAMPLE)).isfinite().all()
