"""A pruned weight is exactly 0 after every optimizer step, whatever the optimizer does and remembers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fits import STEPS, Module, momentum, trainer
from lightning.pytorch.callbacks import Callback
from masked import Exact, is_exact, masked, weights_of, wrong
from torch import Tensor, nn, optim
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_prune.callbacks.upkeep import Upkeep
from lightning_prune.errors import PruningError
from lightning_prune.masks.held import Masks, apply, hold, masks_of

APART: dict[str, Callable[..., Optimizer]] = {
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "maximize": partial(SGD, lr=1e-4, momentum=0.9, dampening=0.1, maximize=True),
    "adam": partial(Adam, lr=0.01, weight_decay=0.1),
    "amsgrad": partial(optim.AdamW, lr=0.01, weight_decay=0.1, amsgrad=True),
    "one by one": partial(optim.AdamW, lr=0.01, foreach=False),
    "fused": partial(optim.AdamW, lr=0.01, fused=True),
    "nadam": partial(optim.NAdam, lr=0.01, momentum_decay=0.1),
    "radam": partial(optim.RAdam, lr=0.01, weight_decay=0.1),
    "adamax": partial(optim.Adamax, lr=0.01, weight_decay=0.1),
    "rmsprop": partial(optim.RMSprop, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": partial(optim.Adagrad, lr=0.01, weight_decay=0.1, initial_accumulator_value=0.1),
    "adadelta": partial(optim.Adadelta, lr=1.0, weight_decay=0.1),
    "asgd": partial(optim.ASGD, lr=0.01, weight_decay=0.1, t0=2),
    "rprop": partial(optim.Rprop, lr=0.001),
}
TOGETHER: dict[str, Callable[..., Optimizer]] = {
    "lbfgs": partial(optim.LBFGS, lr=0.1, max_iter=3, history_size=5),
    "wolfe": partial(optim.LBFGS, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
}
if hasattr(optim, "Adafactor"):
    TOGETHER["adafactor"] = partial(optim.Adafactor, lr=0.01, weight_decay=0.1)


class Mixing(Optimizer):
    """Each weight moves by the mean gradient of its tensor, but not before it has made some steps (as SOAP does)."""

    def __init__(self, params: Any, lr: float = 0.1, idle: int = 0) -> None:
        super().__init__(params, {"lr": lr, "idle": idle})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                count = self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1
                if parameter.grad is not None and count > group["idle"]:
                    parameter.sub_(group["lr"] * (parameter.grad + parameter.grad.mean()))
        return loss


class Noisy(SGD):
    """A child of SGD that adds noise: its class says nothing of what it does."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        return loss


TOGETHER |= {
    "mixing": Mixing,
    "mixing late": partial(Mixing, idle=2 * STEPS + 2),  # the last masks come with step 12
    "noisy": partial(Noisy, lr=0.01),
}


@pytest.mark.parametrize("make", (APART | TOGETHER).values(), ids=APART | TOGETHER)
def test_a_pruned_weight_is_0_after_every_step(make: Callable[..., Optimizer]) -> None:
    module, look = Module(make), Exact(lambda _, module: module.net[3].weight.detach().clone())
    trainer(masked(0.7), look).fit(module)
    assert look.wrong == []
    assert is_exact(module)
    counts = [sum(int((~mask).count_nonzero()) for mask in masks.values()) for masks in look.masks]
    assert counts == sorted(counts)
    assert counts[STEPS - 1] == 0 < counts[STEPS] < counts[-1]
    assert not torch.equal(look.seen[-1], look.seen[-2]), "nothing moves"


@pytest.mark.parametrize("make", APART.values(), ids=APART)
def test_the_optimizer_remembers_nothing_of_it(make: Callable[..., Optimizer]) -> None:
    """At most the averages of squares that begin at a number of their own."""
    module, left = Module(make), list[str]()

    def look(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        state = trainer.optimizers[0].state
        for name, mask in masks_of(module).items():
            weight = module.get_parameter(name)
            for key, value in state[weight].items():
                if isinstance(value, Tensor) and value.shape == weight.shape and key != "step_size":
                    left.extend([key] if bool((value[~mask].abs() > 1e-8).any()) else [])

    trainer(masked(0.7), Exact(look)).fit(module)
    assert set(left) <= {"exp_inf"}  # Adamax adds eps there


def test_torchs_own_optimizers_are_not_masked_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would cost a pass over all weights; others need it."""
    cleared: list[object] = []
    real = Upkeep._masked_by
    monkeypatch.setattr(Upkeep, "_masked_by", lambda self, item: cleared.append(item) or real(self, item))
    for make, passes in ((momentum, 1), (Mixing, 2)):
        module = Module(make)
        cleared.clear()
        trainer(masked(begin=0, end=0), max_epochs=1).fit(module)
        assert len(cleared) in (passes * STEPS, passes * STEPS + 1)  # and a look after the first step


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="this torch has none")
def test_matrices_made_orthogonal() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    module, look = Module(partial(optim.Muon, lr=0.01), net=net), Exact()
    trainer(masked(0.7), look).fit(module)
    assert look.wrong == []
    assert is_exact(module)


@pytest.mark.parametrize("warm", [0, STEPS, 2 * STEPS + 2])
def test_learning_rates_that_begin_at_0(warm: int) -> None:
    """From a step that moves nothing nothing can be learnt about an optimizer."""

    def ramp(optimizer: Optimizer) -> dict[str, Any]:
        schedule = LambdaLR(optimizer, lambda step: float(step > warm))
        return {"lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module, look = Module(Mixing, ramp), Exact()
    trainer(masked(0.7), look).fit(module)
    assert look.wrong == []


def test_a_layer_that_is_unfrozen_after_the_event() -> None:
    class Thaw(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.net[3].weight.requires_grad_(trainer.current_epoch == 3)

    module, look = Module(Mixing), Exact()
    trainer(masked(0.7), Thaw(), look).fit(module)
    assert look.wrong == []
    assert is_exact(module)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("make", [momentum, APART["amsgrad"], Mixing], ids=["momentum", "adamw", "mixing"])
def test_other_precisions(precision: Any, make: Callable[..., Optimizer]) -> None:
    module, look = Module(make), Exact()
    trainer(masked(0.7), look, precision=precision).fit(module)
    assert look.wrong == []
    assert is_exact(module)


def test_an_example_in_ordinary_precision_serves_a_fit_in_double_precision() -> None:
    """As Lightning takes it; only a convolution with a bias tells the difference on tensors without memory."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    module = Module(net=net)
    trainer(masked(0.5, retraining=None), precision="64-true").fit(module)
    assert is_exact(module)


@pytest.mark.parametrize("kind", [torch.complex64, torch.complex128, torch.float64, torch.float16, torch.bfloat16])
def test_all_types_of_numbers(kind: torch.dtype) -> None:
    net, upkeep = nn.Linear(6, 3, dtype=kind), Upkeep()
    masks = {"weight": torch.rand(3, 6) < 0.5}
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad()
        net(torch.randn(2, 6, dtype=kind)).abs().sum().backward()
        upkeep.before_step(optimizer)
        optimizer.step()
        if step == 0:
            upkeep.watch([optimizer])
            apply(masks, net)
            upkeep.take(masks, net, [optimizer])
            assert wrong(masks, {"weight": optimizer.state[net.weight]["momentum_buffer"]}) == []
        assert wrong(masks, weights_of(net)) == []
    assert bool((net.weight[masks["weight"]] != 0).all())


class Infinite(Module):
    """Its gradients are NaN wherever a weight is pruned."""

    def on_after_backward(self) -> None:
        for name, mask in masks_of(self).items():
            self.get_parameter(name).grad[~mask] = float("nan")  # type: ignore[index]


@pytest.mark.parametrize("make", [momentum, APART["amsgrad"], Noisy], ids=["momentum", "adamw", "noisy"])
def test_gradients_of_pruned_weights_may_be_anything(make: Callable[..., Optimizer]) -> None:
    module, look = Infinite(make), Exact()
    trainer(masked(0.7), look, gradient_clip_val=0.5).fit(module)
    assert look.wrong == []


def test_clipping_by_norm_does_not_see_them() -> None:
    """The norm is that of the gradients of the weights that there are."""
    seen: list[tuple[float, float]] = []

    class Clipping(Module):
        def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
            masks = masks_of(self)
            ours = [p.grad * masks.get(name, torch.tensor(True)) for name, p in self.named_parameters()]  # type: ignore[operator]
            before = float(torch.stack([gradient.norm() for gradient in ours]).norm())
            seen.append((before, float(nn.utils.clip_grad_norm_(self.parameters(), 0.01))))

    trainer(masked(0.9), gradient_clip_val=0.01).fit(Clipping())
    assert len(seen) == 4 * STEPS
    assert all(theirs == pytest.approx(ours, rel=1e-6) for ours, theirs in seen)


class ByHand(Module):
    """Manual optimization; `raw` takes torch's optimizers, of whose steps Lightning tells nobody."""

    def __init__(self, make: Callable[..., Optimizer] = momentum, *, raw: bool = False, seed: int = 0) -> None:
        super().__init__(make, seed=seed)
        self.automatic_optimization, self.raw = False, raw

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers(use_pl_optimizer=not self.raw)
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for optimizer in optimizers:
            optimizer.zero_grad()
            if batch_idx == 0:
                optimizer.step()  # nothing moves, so that nothing can be learnt of it, and the graph stays good
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [self._optimizer(self.net[:3].parameters()), self._optimizer(self.net[3:].parameters())]


@pytest.mark.parametrize("raw", [False, True], ids=["lightning", "raw"])
@pytest.mark.parametrize("make", [momentum, APART["amsgrad"], Mixing], ids=["momentum", "adamw", "mixing"])
def test_manual_optimization_with_two_optimizers(make: Callable[..., Optimizer], raw: bool) -> None:
    module, look = ByHand(make, raw=raw), Exact()
    trainer(masked(0.7), look).fit(module)
    assert look.wrong == []
    assert is_exact(module)


@pytest.mark.parametrize("raw", [False, True], ids=["lightning", "raw"])
def test_masks_that_a_network_brings_along(raw: bool) -> None:
    """All events have been: they are held all the same, also those that no step of Lightning would tell of."""
    first, module, look = ByHand(raw=raw), ByHand(raw=raw, seed=9), Exact()
    trainer(masked(0.7)).fit(first)
    module.load_state_dict(first.state_dict())
    hold(module, masks_of(first))
    trainer(masked(0.7, begin=3, end=3), look).fit(module)
    assert look.wrong == []
    assert is_exact(module)


def test_masks_under_which_something_stands_are_refused() -> None:
    module, callback = Module(), masked(0.7)
    trainer(callback).fit(module)
    masks = dict(masks_of(module))
    with torch.no_grad():
        module.net[3].weight[~masks["net.3.weight"]] = 1.0
    was = {name: weight.clone() for name, weight in weights_of(module).items()}
    with pytest.raises(PruningError, match=r"'net\.3\.weight' prunes \d+ weights that are not 0.*`lightning_prune"):
        trainer(masked(0.7)).fit(module)
    assert all(torch.equal(weight, was[name]) for name, weight in weights_of(module).items())


def test_a_fit_that_was_broken_off_is_taken_up_with_the_same_callback() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3 * STEPS + 2:
                raise RuntimeError("power cut")

    module, callback, look = Module(), masked(0.7), Exact()
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(callback, Stop()).fit(module)
    assert all(not optimizer for optimizer in (callback.upkeep._handles, callback.upkeep._bits))
    trainer(callback, look).fit(module)
    assert look.wrong == []
    assert is_exact(module)


def test_nothing_is_left_behind() -> None:
    module, callback = Module(), masked(0.7)
    fit = trainer(callback)
    fit.fit(module)
    assert not callback.upkeep._handles
    assert not callback.upkeep._bits
    assert not fit.optimizers[0]._optimizer_step_post_hooks


def test_masks_are_those_of_the_weights_not_of_others() -> None:
    """Biases and norms move as they would: here all of them, in every step."""
    moved: list[bool] = []
    was: dict[str, Tensor] = {}

    def look(_: pl.Trainer, module: pl.LightningModule) -> None:
        now = {name: weight.clone() for name, weight in weights_of(module).items()}
        masks: Masks = masks_of(module)
        moved.extend(bool((now[name] != was[name]).all()) for name in was if name not in masks)
        was.update(now)

    trainer(masked(0.5, begin=0, end=0), Exact(look), max_epochs=1).fit(Module())
    assert len(moved) == 5 * (STEPS - 1)
    assert all(moved)
