"""Network slimming in a real fit: the penalty enters once a step, in the right way, and ends with the last event."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fits import STEPS, Module, momentum, trainer, widths
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from lightning_prune import history_of
from lightning_prune.allocation import Global
from lightning_prune.callbacks import BNSlimmingCallback, PruneCallback
from lightning_prune.schedules import linear

STRENGTH = 0.05

# fits of a few steps, in which no scale gets to zero: test_slimming_travel.py tests the warning
pytestmark = pytest.mark.filterwarnings("ignore:BNSlimmingCallback. the scales cannot reach zero")


def scales(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.weight": layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))
    }


class Gradients(Callback):
    """Notes all gradients, and the signs of all parameters, at each optimizer step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.signs: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self.seen.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})
        self.signs.append({n: p.detach().sign() for n, p in pl_module.named_parameters()})


def penalties(callback: BNSlimmingCallback, module: pl.LightningModule, **settings: Any) -> list[dict[str, Tensor]]:
    """What the callback adds to each gradient, in units of its strength: a spy on either side of it."""
    before, after = Gradients(), Gradients()
    trainer(before, callback, after, **settings).fit(module)
    return [
        {name: (new[name] - grad) / callback.penalty.strength for name, grad in old.items()}
        for old, new in zip(before.seen, after.seen, strict=True)
    ]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_each_step_gets_the_sign_once(accumulate: int, precision: Any) -> None:
    module, signs = Module(), Gradients()
    callback = BNSlimmingCallback(0.5, strength=STRENGTH, begin=3)
    fit = trainer(before := Gradients(), callback, signs, accumulate_grad_batches=accumulate, precision=precision)
    fit.fit(module)
    steps = 3 * STEPS // accumulate
    assert fit.global_step == 4 * STEPS // accumulate
    for old, new, sign in zip(before.seen[:steps], signs.seen[:steps], signs.signs[:steps], strict=True):
        for name in old:
            expected = STRENGTH * sign[name] if name in scales(module) else torch.zeros_like(old[name])
            assert torch.allclose(new[name] - old[name], expected, atol=1e-6), name


def test_the_penalty_ends_with_the_last_event() -> None:
    callback = BNSlimmingCallback(0.5, strength=STRENGTH, schedule=linear, begin=0, end=2)
    module = Module()
    added = penalties(callback, module)
    assert [record.epoch for record in history_of(module)] == [1, 2]
    on = [bool(step["net.1.weight"].abs().gt(0.5).all()) for step in added]
    assert on == [True] * 2 * STEPS + [False] * 2 * STEPS
    assert all(not step["net.1.weight"].any() for step in added[2 * STEPS :])


def test_clipping_sees_the_penalty() -> None:
    module = Module()
    callback = BNSlimmingCallback(0.5, strength=100.0, begin=1)
    seen: list[float] = []

    class Norm(Callback):
        def on_before_zero_grad(self, *_: object) -> None:
            gradients = [p.grad.norm() for p in module.parameters() if p.grad is not None]
            seen.append(float(torch.stack(gradients).norm()) if gradients else 0.0)

    trainer(callback, Norm(), gradient_clip_val=0.5, max_epochs=2).fit(module)
    assert max(seen) == pytest.approx(0.5, rel=1e-3)


class NoData(Module):
    """A loss that gives the scales no gradient but zero, so that they move by the penalty alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0 * F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("optimizer", "update"),
    [
        (partial(SGD, lr=0.1), "subgradient"),
        (partial(SGD, lr=0.1), "proximal"),
        (partial(AdamW, lr=0.1, weight_decay=0.0), "proximal"),
        (partial(RMSprop, lr=0.1), "proximal"),
    ],
)
def test_scales_walk_down_by_lr_times_strength(optimizer: Callable[..., Optimizer], update: Any) -> None:
    """gamma = 1 - steps * lr * lambda, whatever the optimizer."""
    module = NoData(optimizer)
    callback = BNSlimmingCallback(0.5, strength=STRENGTH, update=update, begin=2)
    trainer(callback, max_epochs=3).fit(module)
    expected = 1 - 2 * STEPS * 0.1 * STRENGTH
    for scale in scales(module).values():
        assert scale.tolist() == pytest.approx([expected] * len(scale), abs=1e-5)


@pytest.mark.parametrize("make", [partial(SGD, lr=0.1), partial(AdamW, lr=0.1, weight_decay=0.0)], ids=["sgd", "adamw"])
def test_smooth_l1_slows_down_near_zero(make: Callable[..., Optimizer]) -> None:
    """12 strides of 0.05 lead from 1 to 0.4; with a corner of 0.8 the last 8 of them only shrink what is left."""
    module = NoData(make)
    trainer(BNSlimmingCallback(0.5, strength=0.5, delta=0.8, begin=2), max_epochs=3).fit(module)
    gradient = isinstance(make(module.parameters()), SGD)
    expected = 1.0
    for _ in range(2 * STEPS):
        inside = expected * (1 - 0.05 / 0.8) if gradient else expected * 0.8 / (0.8 + 0.05)
        expected = max(expected - 0.05, inside)
    assert module.net[1].weight.tolist() == pytest.approx([expected] * len(module.net[1].weight), abs=1e-5)
    assert expected > 0.45


def test_an_optimizer_that_maximizes_is_pulled_down_too() -> None:
    module = NoData(partial(SGD, lr=0.1, maximize=True))
    trainer(BNSlimmingCallback(0.5, strength=STRENGTH, begin=1), max_epochs=2).fit(module)
    expected = 1 - STEPS * 0.1 * STRENGTH
    assert module.net[1].weight.tolist() == pytest.approx([expected] * len(module.net[1].weight), abs=1e-5)


class Counted(NoData):
    """Steps half of its batches by hand."""

    def __init__(self) -> None:
        super().__init__(partial(SGD, lr=0.1))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


@pytest.mark.parametrize("update", ["subgradient", "proximal"])
def test_steps_taken_by_hand_get_it_once_each(update: Any) -> None:
    module = Counted()
    trainer(BNSlimmingCallback(0.5, strength=STRENGTH, update=update, begin=2), max_epochs=3).fit(module)
    expected = 1 - STEPS * 0.1 * STRENGTH
    assert module.net[4].weight.tolist() == pytest.approx([expected] * len(module.net[4].weight), abs=1e-5)


def test_proximal_steps_with_accumulation_come_once_a_step() -> None:
    module = NoData(partial(AdamW, lr=0.1, weight_decay=0.0))
    callback = BNSlimmingCallback(0.5, strength=STRENGTH, begin=2)
    trainer(callback, max_epochs=3, accumulate_grad_batches=3, precision="bf16-mixed").fit(module)
    expected = 1 - 4 * 0.1 * STRENGTH
    assert module.net[4].weight.tolist() == pytest.approx([expected] * len(module.net[4].weight), abs=1e-5)


def test_proximal_reaches_exactly_zero_with_adamw() -> None:
    module = NoData(partial(AdamW, lr=0.1, weight_decay=0.0))

    class Zeros(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                self.found = [bool((scale == 0).all()) for scale in scales(pl_module).values()]

    zeros = Zeros()
    trainer(BNSlimmingCallback(0.5, strength=1.0, begin=2), zeros, max_epochs=3).fit(module)
    assert zeros.found == [True, True]
    assert sum(widths(module)) == 8


def test_auto_follows_the_optimizer() -> None:
    for optimizer, added in ((momentum, True), (partial(AdamW, lr=0.01), False)):
        callback = BNSlimmingCallback(0.5, strength=STRENGTH, begin=1)
        steps = penalties(callback, Module(optimizer), max_epochs=2)
        assert bool(steps[0]["net.1.weight"].any()) is added


def test_each_optimizer_gets_the_update_that_fits_it() -> None:
    """SGD for the first half of the network, AdamW with its own learning rate for the second."""

    class Two(NoData):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> list[Optimizer]:
            groups = [{"params": self.net[3].parameters()}, {"params": self.net[4:].parameters(), "lr": 0.02}]
            return [SGD(self.net[:3].parameters(), lr=0.1), AdamW(groups, lr=0.5, weight_decay=0.0)]

    module = Two()
    trainer(BNSlimmingCallback(0.5, strength=STRENGTH, begin=1), max_epochs=2).fit(module)
    first, second = scales(module).values()
    assert first.tolist() == pytest.approx([1 - STEPS * 0.1 * STRENGTH] * len(first), abs=1e-5)
    assert second.tolist() == pytest.approx([1 - STEPS * 0.02 * STRENGTH] * len(second), abs=1e-5)


def test_ignored_and_frozen_scales_get_no_penalty() -> None:
    module = Module()
    added = penalties(BNSlimmingCallback(0.5, strength=STRENGTH, begin=1, ignore=["net.4"]), module, max_epochs=2)
    assert bool(added[0]["net.1.weight"].any())
    assert not added[0]["net.4.weight"].any()
    module = Module()
    module.net[1].weight.requires_grad_(requires_grad=False)
    added = penalties(BNSlimmingCallback(0.5, strength=STRENGTH, begin=1), module, max_epochs=2)
    assert "net.1.weight" not in added[0]
    assert set(module.net[1].weight.tolist()) == {1.0}


def test_batchnorm_of_linear_layers_counts_too() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
    module = NoData(partial(SGD, lr=0.1), net=net)
    trainer(BNSlimmingCallback(0.5, strength=STRENGTH, begin=1), max_epochs=2).fit(module)
    assert net[1].out_features == 6
    assert net[2].weight.tolist() == pytest.approx([1 - STEPS * 0.1 * STRENGTH] * 6, abs=1e-5)


def test_the_smallest_scales_of_the_whole_network_go() -> None:
    """With the scales held fast, the cut is what a sort by hand says; ties aside, layers give what they have to."""
    module = Module(partial(SGD, lr=0.0))
    with torch.no_grad():
        module.net[1].weight.copy_(torch.tensor([0.1, 2, 0.2, -3, 0.3, 4, 0.4, 5]))
        module.net[4].weight.copy_(torch.tensor([1.0, -0.05, 1.1, 1.2, 1.3, 1.4, 0.5, -0.6]))
    trainer(BNSlimmingCallback(7 / 16, strength=1e-6, begin=1), max_epochs=2).fit(module)
    (record,) = history_of(module)
    assert record.kept["net.1.weight"][0] == (1, 3, 5, 7)
    assert record.kept["net.4.weight"][0] == (0, 2, 3, 4, 5)
    assert record.kept["net.3.weight"] == {0: (0, 2, 3, 4, 5), 1: (1, 3, 5, 7)}


def test_a_cap_spares_every_layer_half() -> None:
    module = Module(partial(SGD, lr=0.0))
    module.net[1].weight.data.fill_(0.01)
    fit = trainer(BNSlimmingCallback(0.6, begin=1, allocation=Global(cap=0.5)), max_epochs=2)
    with pytest.warns(UserWarning, match=r"Held back: .*net\.0: keeps 4 channels in place of 0: .*cap=0\.5"):
        fit.fit(module)
    assert widths(module) == [4, 4]


def test_no_hooks_are_left_behind() -> None:
    callback = BNSlimmingCallback(0.5, strength=1.0, begin=1)
    module = Module(partial(AdamW, lr=0.1))
    fit = trainer(callback, max_epochs=2)
    fit.fit(module)
    (optimizer,) = fit.optimizers
    assert not optimizer._optimizer_step_post_hooks


def test_no_hooks_are_left_behind_by_a_crash() -> None:
    class Broken(Module):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("power cut")

    fit = trainer(BNSlimmingCallback(0.5, strength=1.0, begin=1))
    with pytest.raises(RuntimeError, match="power cut"):
        fit.fit(Broken(partial(AdamW, lr=0.1)))
    assert not fit.optimizers[0]._optimizer_step_post_hooks


def test_slimming_is_a_prune_callback_with_defaults_of_the_paper() -> None:
    callback = BNSlimmingCallback()
    assert isinstance(callback, PruneCallback)
    assert callback.penalty.strength == 1e-4
    assert isinstance(callback.request.allocation, Global)
    assert callback.request.pruning_ratio == 0.5
