"""Weights are exchanged while the network trains: which ones, when, and what everything else does meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import cos, floor, pi
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fits import STEPS, Module, equal, momentum, network, states, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lightning_prune.allocation import Uniform
from lightning_prune.callbacks import RigLCallback, rigl
from lightning_prune.masks.allocations import PerLayer
from lightning_prune.masks.growing import constant, random_masks
from lightning_prune.masks.held import apply, hold, masks_of, sparsity

EVERY = 4

sparse = partial(RigLCallback, 0.8, drop_fraction=0.5, every_n_steps=EVERY, end=20)
"""Of 24 steps, 4, 8, 12 and 16 are exchanges."""

still = partial(SGD, lr=0.0)


def kept(module: nn.Module) -> dict[str, int]:
    return {name: int(mask.count_nonzero()) for name, mask in masks_of(module).items()}


class Watch(Callback):
    """Notes what each batch did to the masks, the weights and the optimizer's state."""

    def __init__(self) -> None:
        self.counts: list[dict[str, int]] = []
        self.changed: list[int] = []
        self.zero: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.masks, self.was = masks_of(pl_module), states(pl_module, trainer.optimizers)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        masks, weights = masks_of(pl_module), dict(pl_module.named_parameters())
        self.counts.append(kept(pl_module))
        self.zero.append(all(bool((weights[name][~mask] == 0).all()) for name, mask in masks.items()))
        if any(not torch.equal(mask, self.masks[name]) for name, mask in masks.items()):
            self.changed.append(STEPS * trainer.current_epoch + index)
            self.exchanged(self.masks, masks, states(pl_module, trainer.optimizers))

    def exchanged(self, before: Any, after: Any, now: dict[str, dict[str, Tensor]]) -> None:
        """For subclasses."""


@pytest.mark.parametrize("grow", ["gradient", "random"])
@pytest.mark.parametrize("allocation", [None, Uniform(), PerLayer({"net.3": 0.9})], ids=repr)
def test_every_layer_has_as_many_weights_as_it_was_given(grow: Any, allocation: Any) -> None:
    module, watch = Module(), Watch()
    given = random_masks(module, 0.8, allocation)
    trainer(sparse(grow=grow, allocation=allocation), watch).fit(module)
    assert watch.changed == [4, 8, 12, 16]
    assert watch.counts == [{name: int(mask.count_nonzero()) for name, mask in given.items()}] * 24
    assert watch.zero == [True] * 24
    assert not torch.equal(masks_of(module)["net.3.weight"], given["net.3.weight"])


def test_masks_are_on_before_the_first_forward() -> None:
    """Also that of the sanity check; what they leave is as it was initialised."""
    seen: list[bool] = []
    module = Module()
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    class Checking(Callback):
        def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.sanity_checking:
                now = dict(pl_module.named_parameters())
                ones = {name: torch.ones_like(value) for name, value in start.items()}
                masks = {**ones, **masks_of(pl_module)}
                seen.append(all(torch.equal(now[name], value * masks[name]) for name, value in start.items()))

    trainer(sparse(every_n_steps=2), Checking(), max_epochs=1, num_sanity_val_steps=2).fit(module)
    assert seen == [True, True]
    assert sparsity(masks_of(module)) == pytest.approx(0.8, abs=0.001)


class Dots(pl.LightningModule):
    """The loss is w * x, so that the gradient is x at every place, whatever w is; one batch is one x."""

    def __init__(self, *batches: list[float], optimizer: Callable[..., Optimizer] = still) -> None:
        super().__init__()
        self.fc = nn.Linear(len(batches[0]), 1, bias=False)
        self.fc.weight.data = torch.tensor([[5.0, 0.1, 0.0, 0.0]])
        self.batches, self.optimizer = torch.tensor(batches), optimizer
        hold(self, {"fc.weight": torch.tensor([[True, True, False, False]])})

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.fc(batch).sum()

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.batches, batch_size=1)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.parameters())

    @property
    def places(self) -> list[int]:
        return masks_of(self)["fc.weight"][0].nonzero().flatten().tolist()


half = partial(RigLCallback, 0.5, drop_fraction=0.5, decay=constant, every_n_steps=1, end=1.0)


@pytest.mark.parametrize("optimizer", [still, partial(still, momentum=0.9)], ids=["sgd", "m"])
def test_the_gradient_of_pruned_places_decides(optimizer: Callable[..., Optimizer]) -> None:
    """Of w = (5, 0.1, -, -) the second goes; the gradient (1, 2, 3, -10) is largest where nothing is."""
    module = Dots([1.0, 2.0, 3.0, -10.0], [1.0, 2.0, 3.0, -10.0], optimizer=optimizer)
    trainer(half(), max_epochs=1).fit(module)
    assert module.places == [0, 3]
    assert module.fc.weight.tolist() == [[5, 0, 0, 0]]


def test_the_accumulated_gradient_decides() -> None:
    """The last batch alone says the fourth place, both of them the third."""
    module = Dots(*[[1.0, 1.0, 3.0, -4.0], [1.0, 1.0, 3.0, 5.0]] * 2)
    trainer(half(), max_epochs=1, accumulate_grad_batches=2).fit(module)
    assert module.places == [0, 2]


def test_a_gradient_that_is_not_finite_lets_the_exchange_wait() -> None:
    infinite = [1.0, 2.0, float("inf"), 3.0]
    module = Dots([1.0, 2.0, 3.0, 4.0], infinite, infinite, [1.0, 2.0, 9.0, 3.0])
    trainer(half(every_n_steps=1, end=2), max_epochs=1).fit(module)
    assert module.places == [0, 2]


class Undisturbed(Watch):
    """Sees that an exchange moves nothing but what it drops."""

    def exchanged(self, before: Any, after: Any, now: dict[str, dict[str, Tensor]]) -> None:
        for name, state in now.items():
            for key, value in state.items():
                if name in after and value.shape == after[name].shape:
                    stays = before[name] & after[name]
                    assert torch.equal(value[stays], self.was[name][key][stays]), (name, key)
                    assert not value[~stays].any(), (name, key)
                else:
                    assert torch.equal(value, self.was[name][key]), (name, key)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": partial(Adam, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1),
    "fused adamw": partial(AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "one by one": partial(AdamW, lr=0.01, weight_decay=0.1, foreach=False),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.001, momentum=0.9),
}


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_exchange_takes_the_place_of_the_step(optimizer: Callable[..., Optimizer], settings: dict[str, Any]) -> None:
    """Momentum, weight decay and step counters stand still; what goes and what comes has no weight and no state."""
    module, watch = Module(optimizer), Undisturbed()
    fit = trainer(sparse(), watch, **settings)
    fit.fit(module)
    assert watch.changed == [4, 8, 12, 16]
    assert watch.zero == [True] * 24
    steps = [state["step"] for state in states(module, fit.optimizers).values() if "step" in state]
    assert all(int(step) == 20 for step in steps)


class Mixing(Optimizer):
    """Moves every weight that has a gradient, also where the gradient is 0, as optimizers of whole matrices do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.grad is not None:
                parameter.sub_(0.05 * parameter.grad - 1e-3)
        return loss


def test_optimizers_that_mix_weights_are_seen_through_after_each_exchange() -> None:
    """A step that moves nothing says nothing about the optimizer."""
    watch = Watch()
    trainer(sparse(), watch).fit(Module(Mixing))
    assert watch.changed == [4, 8, 12, 16]
    assert watch.zero == [True] * 24


def test_schedulers_go_on() -> None:
    def falling(optimizer: Optimizer) -> dict[str, Any]:
        return {"lr_scheduler": {"scheduler": StepLR(optimizer, 1, gamma=0.9), "interval": "step"}}

    fit = trainer(sparse())
    fit.fit(Module(scheduler=falling))
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.9**24)


@pytest.mark.parametrize(
    ("settings", "moments", "end"),
    [
        ({}, [4, 8, 12, 16], 18),
        ({"end": 0.5}, [4, 8], 12),
        ({"end": 13}, [4, 8, 12], 13),
        ({"end": 1.0, "every_n_steps": 10}, [10, 20], 24),
        ({"decay": constant}, [4, 8, 12, 16], None),
        ({"end": 500}, [4, 8, 12, 16, 20], 500),
    ],
)
def test_when_and_how_many(
    settings: dict[str, Any], moments: list[int], end: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """f_t = 0.3 / 2 * (1 + cos(pi t / T_end)); no exchange at T_end or later."""
    shares: list[float] = []

    def noted(mask: Tensor, weight: Tensor, wanted: Tensor, share: float) -> Tensor:
        shares.append(share)
        return own(mask, weight, wanted, share)

    own = rigl.exchange
    monkeypatch.setattr(rigl, "exchange", noted)
    trainer(RigLCallback(0.8, **{"every_n_steps": EVERY, **settings})).fit(Module())
    expected = [0.3 if end is None else 0.15 * (1 + cos(pi * moment / end)) for moment in moments]
    assert shares[::3] == pytest.approx(expected)
    assert len(shares) == 3 * len(moments)


def test_what_is_logged() -> None:
    module, fit = Module(), trainer(sparse(end=5))
    masks = random_masks(module, 0.8)
    fit.fit(module)
    most = sum(floor(0.25 * (1 + cos(pi * 4 / 5)) * int(mask.count_nonzero())) for mask in masks.values())
    grown = sum(int((mask & ~masks[name]).count_nonzero()) for name, mask in masks_of(module).items())
    assert 0 < grown <= most
    assert fit.callback_metrics["prune/exchanged"] == grown
    assert fit.callback_metrics["prune/sparsity"] == pytest.approx(0.8, abs=0.001)


class Silent(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("settings", [{"barebones": True}, {"fast_dev_run": 3}], ids=str)
def test_short_and_bare_fits(settings: dict[str, Any]) -> None:
    module = Silent()
    bare = {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_model_summary": None}
    bare |= {"enable_progress_bar": None, "limit_val_batches": 0}
    trainer(sparse(), **(bare if "barebones" in settings else settings)).fit(module)
    assert sparsity(masks_of(module)) == pytest.approx(0.8, abs=0.001)


def test_dense_layers_and_tiny_ones_change_nothing() -> None:
    """The optimizer steps as ever: the fit is that without the callback."""
    module, plain = Module(), Module()
    trainer(RigLCallback(0.0, every_n_steps=2)).fit(module)
    trainer().fit(plain)
    assert equal(module.state_dict(), plain.state_dict())


def test_static_masks() -> None:
    """No exchange takes the place of a step, and no interval is refused."""
    module, watch = Module(AdamW), Watch()
    fit = trainer(sparse(drop_fraction=0, every_n_steps=1000), watch)
    fit.fit(module)
    assert watch.changed == []
    assert watch.zero == [True] * 24
    assert {int(state["step"]) for state in states(module, fit.optimizers).values()} == {24}


def test_chance_is_that_of_the_seed() -> None:
    """Whatever state torch's generators are in."""

    def fitted(chance: int, seed: int) -> nn.Module:
        module = Module()
        torch.manual_seed(chance)
        trainer(sparse(grow="random", seed=seed)).fit(module)
        return module

    first, again, other = fitted(1, 0), fitted(2, 0), fitted(1, 1)
    assert equal(first.state_dict(), again.state_dict())
    assert not torch.equal(masks_of(first)["net.3.weight"], masks_of(other)["net.3.weight"])


def test_frozen_layers_keep_their_masks() -> None:
    module = Module()
    module.net[3].requires_grad_(False)
    given = random_masks(module, 0.8, Uniform())
    trainer(sparse(allocation=Uniform())).fit(module)
    assert torch.equal(masks_of(module)["net.3.weight"], given["net.3.weight"])
    assert not torch.equal(masks_of(module)["net.8.weight"], given["net.8.weight"])


def test_masks_that_are_there_are_gone_on_with() -> None:
    module = Module()
    own = {**random_masks(module, 0.8, seed=77)}
    hold(module, own)
    apply(own, module)
    trainer(sparse(drop_fraction=0)).fit(module)
    assert all(torch.equal(mask, own[name]) for name, mask in masks_of(module).items())


def test_a_second_fit_goes_on() -> None:
    module = Module()
    fit = trainer(sparse(end=1.0))
    fit.fit(module)
    first = masks_of(module)
    fit.fit_loop.max_epochs = 8
    fit.fit(module)
    assert kept(module) == {name: int(mask.count_nonzero()) for name, mask in first.items()}
    assert not torch.equal(masks_of(module)["net.3.weight"], first["net.3.weight"])


class ByHand(Module):
    """Two optimizers that step in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()[batch_idx % 2]  # type: ignore[index]
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()
        for each in self.optimizers():  # type: ignore[union-attr]
            each.zero_grad()

    def configure_optimizers(self) -> list[Optimizer]:
        return [momentum(self.net[:3].parameters()), AdamW(self.net[3:].parameters(), lr=0.01)]


def test_each_optimizer_exchanges_its_own_weights() -> None:
    """Steps are counted over all of them; each has its turn at its first step after the moment."""
    module, watch = ByHand(), Watch()
    given = random_masks(module, 0.8, Uniform())
    trainer(sparse(decay=constant, allocation=Uniform()), watch).fit(module)
    assert watch.changed == [4, 5, 8, 9, 12, 13, 16, 17]
    assert watch.counts == [{name: int(mask.count_nonzero()) for name, mask in given.items()}] * 24
    assert watch.zero == [True] * 24
    assert all(not torch.equal(mask, given[name]) for name, mask in masks_of(module).items())


class Compiled(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(network(), backend="eager")  # type: ignore[assignment]


def test_compiled_networks() -> None:
    """The same as without; the draw depends on names, so the masks are given."""
    module, plain = Compiled(), Module()
    given = random_masks(plain, 0.8)
    hold(plain, given)
    hold(module, {name.replace("net.", "net._orig_mod."): mask for name, mask in given.items()})
    trainer(sparse()).fit(module)
    trainer(sparse()).fit(plain)
    assert equal(dict(zip(plain.state_dict(), module.state_dict().values(), strict=True)), plain.state_dict())
