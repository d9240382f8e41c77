"""One cut in the middle of a fit: every optimizer, every LR scheduler and every precision goes on over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import pairwise, product
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fits import Module, equal, kept_of, momentum, network, states, trainer, widths
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn, optim
from torch.optim import LBFGS, SGD, Adafactor, Adam, AdamW, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from versions import needs, older

from lightning_prune import history_of
from lightning_prune.callbacks import MagnitudePruneCallback, PruneCallback
from lightning_prune.criteria import Random

pytestmark = pytest.mark.filterwarnings(
    "ignore:LBFGS keeps one flat history .* it was dropped",
    "ignore:A `OneCycleLR` scheduler is using 'interval'. 'epoch'",
)

EPOCHS, CUT, STEPS = 4, 2, 2

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=4.0),
    "momentum": partial(SGD, lr=0.5, momentum=0.9),
    "momentum foreach": partial(SGD, lr=0.5, momentum=0.9, foreach=True),
    "momentum fused": partial(SGD, lr=0.5, momentum=0.9, fused=True),
    "nesterov": partial(SGD, lr=0.5, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": partial(Adam, lr=0.05),
    "adam amsgrad": partial(Adam, lr=0.05, amsgrad=True),
    "adam foreach": partial(Adam, lr=0.05, foreach=True),
    "adam fused": partial(Adam, lr=0.05, fused=True),
    "adam fused amsgrad": partial(Adam, lr=0.05, fused=True, amsgrad=True),
    "adamw": partial(AdamW, lr=0.05),
    "rmsprop": partial(optim.RMSprop, lr=0.05),
    "rmsprop centered": partial(optim.RMSprop, lr=0.05, centered=True, momentum=0.9),
    "adagrad": partial(optim.Adagrad, lr=0.1),
    "adadelta": partial(optim.Adadelta, lr=20.0),
    "nadam": partial(optim.NAdam, lr=0.05),
    "radam": partial(optim.RAdam, lr=4.0),
    "adamax": partial(optim.Adamax, lr=0.05),
    "asgd": partial(optim.ASGD, lr=4.0, t0=1),
    "rprop": partial(optim.Rprop, lr=0.05),
    "lbfgs": partial(LBFGS, lr=4.0, max_iter=2),
    "adafactor": partial(Adafactor, lr=0.5, d=10.0),
}
if hasattr(optim, "Muon"):  # torch 2.9
    OPTIMIZERS["muon"] = partial(optim.Muon, lr=0.5)

LENGTH = EPOCHS * STEPS


def chained(optimizer: Optimizer) -> LRScheduler:
    warm_up = lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=2)
    return lr_scheduler.ChainedScheduler([warm_up, lr_scheduler.ExponentialLR(optimizer, 0.9)])


def one_cycle(optimizer: Optimizer) -> LRScheduler:
    has_momentum = bool({"momentum", "betas"} & optimizer.defaults.keys())
    return lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=LENGTH + 1, cycle_momentum=has_momentum)


def sequential(optimizer: Optimizer) -> LRScheduler:
    stages: list[LRScheduler] = [
        lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2),
        lr_scheduler.ExponentialLR(optimizer, 0.9),
    ]
    return lr_scheduler.SequentialLR(optimizer, stages, milestones=[2])


SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]] = {
    "ConstantLR": partial(lr_scheduler.ConstantLR, factor=0.5, total_iters=3),
    "LinearLR": partial(lr_scheduler.LinearLR, start_factor=0.5, total_iters=LENGTH),
    "StepLR": partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[1, 3, 7], gamma=0.5),
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, total_iters=LENGTH + 1, power=2.0),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=LENGTH + 1),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=0.5, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": one_cycle,
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda count: 1 / (count + 1)),
    "MultiplicativeLR": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda count: 0.9),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": partial(ReduceLROnPlateau, mode="min", factor=0.5, patience=0, threshold=0.0),
}

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "64-true"]

ALWAYS_THE_SAME = "always the same"

SHORT: dict[str, Any] = {"max_epochs": EPOCHS, "limit_train_batches": STEPS, "limit_val_batches": 0}


class Task(Module):
    """Logs a number that no weight changes, for the plateau. Muon takes matrices only: no convolution, no bias."""

    def __init__(self, optimizer: str, scheduler: str, interval: str) -> None:
        super().__init__(OPTIMIZERS[optimizer], net=matrices() if optimizer == "muon" else network())
        self.scheduler, self.interval = SCHEDULERS[scheduler], interval

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log(ALWAYS_THE_SAME, 1.0)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.parameters())
        config = {"scheduler": self.scheduler(optimizer), "interval": self.interval, "monitor": ALWAYS_THE_SAME}
        return {"optimizer": optimizer, "lr_scheduler": config}


def matrices() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [36, 8, 8, 4]
    layers = [nn.Linear(have, want, bias=False) for have, want in pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), layers[0], nn.LeakyReLU(), layers[1], nn.LeakyReLU(), layers[2])


class Watch(Callback):
    """Notes the learning rate of each step and what there is at the start of the epoch of the cut.

    Of the two around a prune callback, the first notes what was before it and the second what is after it.
    """

    def __init__(self) -> None:
        self.rates: list[tuple[float, ...]] = []
        self.notes: dict[str, dict[str, Tensor]] = {}
        self.optimizers: list[int] = []
        self.weights: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.still: list[str] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.optimizers.append(id(trainer.optimizers[0]))
        if trainer.current_epoch == CUT:
            self.notes = states(pl_module, trainer.optimizers)
            found = {name: parameter.grad for name, parameter in pl_module.named_parameters()}
            self.gradients = {name: gradient.clone() for name, gradient in found.items() if gradient is not None}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.rates.append(tuple(float(group["lr"]) for item in trainer.optimizers for group in item.param_groups))
        self.weights = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if (trainer.current_epoch, index) == (CUT, 0):
            now = dict(pl_module.named_parameters())
            self.still = [name for name, was in self.weights.items() if torch.equal(was, now[name])]


def random_cut() -> PruneCallback:
    return PruneCallback(0.5, criterion=Random(1), begin=CUT, end=CUT, constants="drop")


def sizes_of(module: nn.Module) -> list[int]:
    return widths(module) or [layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear)]


def broadcasts(value: Tensor, parameter: Tensor) -> bool:
    return bool(torch.broadcast_shapes(value.shape, parameter.shape) == parameter.shape)


def unlike_their_parameters(optimizers: Iterable[Optimizer]) -> list[tuple[Any, ...]]:
    """List state tensors that have neither their parameter's shape nor, in Adafactor, one that broadcasts with it."""
    return [
        (key, value.shape, parameter.shape)
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.dim() and not isinstance(optimizer, LBFGS)
        if value.shape != parameter.shape and not (isinstance(optimizer, Adafactor) and broadcasts(value, parameter))
    ]


@cache
def rates_without_a_cut(optimizer: str, scheduler: str, interval: str) -> list[tuple[float, ...]]:
    watch = Watch()
    trainer(watch, **SHORT).fit(Task(optimizer, scheduler, interval))
    return watch.rates


CASES = dict.fromkeys(
    [
        *((name, "CosineAnnealingLR", "step", precision) for name, precision in product(OPTIMIZERS, PRECISIONS)),
        *((name, "OneCycleLR", "step", "32-true") for name in OPTIMIZERS),
        *((*names, "32-true") for names in product(["momentum", "adam"], SCHEDULERS, ["step", "epoch"])),
    ]
)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "interval", "precision"), [pytest.param(*case, id=", ".join(case)) for case in CASES]
)
def test_a_fit_goes_on_over_a_cut(optimizer: str, scheduler: str, interval: str, precision: str) -> None:
    if older("torch", "2.6") and (optimizer, scheduler, precision) == (
        "momentum fused",
        "CosineAnnealingLR",
        "bf16-true",
    ):
        pytest.skip(
            "torch before 2.6 rounds another way in fused bf16 steps: two weights of this fit stand still in one"
        )
    module, before, after = Task(optimizer, scheduler, interval), Watch(), Watch()
    dense = sizes_of(module)
    fit = trainer(before, random_cut(), after, precision=precision, **SHORT)
    fit.fit(module)

    (record,) = history_of(module)
    assert record.epoch == CUT
    assert sizes_of(module) == [*(width // 2 for width in dense[:2]), *dense[2:]]
    assert after.still == []
    assert after.rates == rates_without_a_cut(optimizer, scheduler, interval)
    assert len(set(after.rates)) > 1
    assert len({*before.optimizers, *after.optimizers, id(fit.optimizers[0])}) == 1
    assert unlike_their_parameters(fit.optimizers) == []
    if optimizer != "lbfgs":
        for name, old in before.notes.items():
            assert equal(after.notes[name], {key: kept_of(value, record, name) for key, value in old.items()}), name
            assert len(old) > 1 or optimizer == "sgd", "no state to compare"
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_the_matrix_holds_all_that_torch_has() -> None:
    """`SparseAdam` takes sparse gradients only, which no layer that can be pruned gives."""
    others = {"Optimizer", "SparseAdam", "lr_scheduler", "swa_utils"}
    classes = {name for name in optim.__all__ if isinstance(getattr(optim, name), type)} - others
    assert classes == {cast("partial[Optimizer]", make).func.__name__ for make in OPTIMIZERS.values()}
    assert set(lr_scheduler.__all__) - {"LRScheduler"} == SCHEDULERS.keys()


# how parameters are shared out over optimizers and groups


def step_and_watch(module: pl.LightningModule, **settings: Any) -> tuple[pl.Trainer, Watch, Watch]:
    before, after = Watch(), Watch()
    fit = trainer(before, random_cut(), after, **(SHORT | settings))
    fit.fit(module)
    assert widths(module) == [4, 4]
    return fit, before, after


def assert_state_followed(module: nn.Module, before: Watch, after: Watch) -> None:
    (record,) = history_of(module)
    for name, old in before.notes.items():
        assert equal(after.notes[name], {key: kept_of(value, record, name) for key, value in old.items()}), name


class ByHand(Module):
    """Muon for the matrix, AdamW for all else: manual optimization, with clipping, accumulation and schedules."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        self.automatic_optimization, self.accumulate = False, accumulate
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]) / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
                self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")
                self.norms.append(norm(p for group in optimizer.param_groups for p in group["params"]))
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()

    def configure_optimizers(self) -> Any:
        head = self.net[8]
        made = [optim.Muon([head.weight], lr=0.05), AdamW([*self.net[:8].parameters(), head.bias], lr=0.05)]
        return made, [lr_scheduler.CosineAnnealingLR(optimizer, 4 * EPOCHS + 1) for optimizer in made]


def norm(parameters: Iterable[nn.Parameter]) -> float:
    return float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())


@needs("torch", "2.9", "has no Muon")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_manual_optimization_with_muon_and_adamw(accumulate: int, precision: str) -> None:
    module = ByHand(accumulate)
    settings = {"limit_train_batches": 4, "precision": precision}
    fit, before, after = step_and_watch(module, **settings)
    assert_state_followed(module, before, after)
    assert "momentum_buffer" in after.notes["net.8.weight"]
    assert "exp_avg" in after.notes["net.0.weight"]
    assert accumulate > 1 or after.still == []
    assert unlike_their_parameters(fit.optimizers) == []
    assert module.norms == pytest.approx([0.01] * (2 * EPOCHS * 4 // accumulate), rel=0.02)
    dense, plain = Watch(), ByHand(accumulate)
    trainer(dense, **(SHORT | settings)).fit(plain)
    assert after.rates == dense.rates
    assert len(set(after.rates)) == len(module.norms) / 2


class Groups(Module):
    """Three groups of parameters, each with a learning rate and a momentum of its own."""

    def __init__(self, scheduler: Callable[[Optimizer], LRScheduler], kind: Callable[..., Optimizer]) -> None:
        super().__init__()
        self.scheduler, self.kind = scheduler, kind

    def configure_optimizers(self) -> Any:
        parts = [self.net[:2], self.net[2:6], self.net[6:]]
        groups = [{"params": part.parameters(), "lr": 0.1 * (at + 1)} for at, part in enumerate(parts)]
        optimizer = self.kind(groups)
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]


FOR_GROUPS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=[lambda at: 1.0, lambda at: 0.9**at, lambda at: 0.8**at]),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=[0.1, 0.2, 0.4], total_steps=LENGTH + 1),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=[0.1, 0.2, 0.3], max_lr=[0.2, 0.3, 0.4], step_size_up=3),
}


@pytest.mark.parametrize("kind", [partial(SGD, lr=0.1, momentum=0.9), Adam], ids=["momentum", "adam"])
@pytest.mark.parametrize("scheduler", FOR_GROUPS.values(), ids=FOR_GROUPS)
def test_param_groups_keep_their_own_schedules(
    scheduler: Callable[[Optimizer], LRScheduler], kind: Callable[..., Optimizer]
) -> None:
    module, plain = Groups(scheduler, kind), Watch()
    fit, before, after = step_and_watch(module)
    assert_state_followed(module, before, after)
    assert after.still == []
    trainer(plain, **SHORT).fit(Groups(scheduler, kind))
    assert after.rates == plain.rates
    assert all(len(set(rates)) == 3 for rates in after.rates[1:])
    assert [[id(p) for p in group["params"]] for group in fit.optimizers[0].param_groups] == [
        [id(p) for p in part.parameters()] for part in (module.net[:2], module.net[2:6], module.net[6:])
    ]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam fused", "adafactor", "lbfgs"])
def test_frozen_parameters_are_cut_and_stay_frozen(optimizer: str, precision: str) -> None:
    module = Task(optimizer, "CosineAnnealingLR", "step")
    frozen = ["net.0.weight", "net.4.weight", "net.4.bias"]
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    was = {name: module.get_parameter(name).detach().clone() for name in frozen}
    fit, *_, after = step_and_watch(module, precision=precision)
    (record,) = history_of(module)
    assert after.still == frozen
    for name in frozen:
        parameter = module.get_parameter(name)
        assert torch.equal(parameter, kept_of(was[name], record, name).to(parameter.dtype))
        assert not parameter.requires_grad
        assert parameter.grad is None
    assert unlike_their_parameters(fit.optimizers) == []


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_parameters_in_no_optimizer_are_cut_with_the_gradients_that_pile_up_on_them(algorithm: str) -> None:
    """Nobody ever clears those gradients."""

    class Half(Module):
        def configure_optimizers(self) -> Optimizer:
            return momentum(self.net[3:].parameters())

    module = Half()
    was = {name: parameter.detach().clone() for name, parameter in module.net[:3].named_parameters()}
    _, before, after = step_and_watch(module, gradient_clip_val=0.01, gradient_clip_algorithm=algorithm)
    (record,) = history_of(module)
    assert_state_followed(module, before, after)
    assert after.still == [f"net.{name}" for name in was]
    for name, old in was.items():
        parameter = module.net[:3].get_parameter(name)
        assert torch.equal(parameter, kept_of(old, record, f"net.{name}"))
        gradient = before.gradients[f"net.{name}"]
        assert torch.equal(after.gradients[f"net.{name}"], kept_of(gradient, record, f"net.{name}"))
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape


# clipping and accumulation


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam foreach"])
def test_gradients_are_clipped_and_accumulated_over_the_cut(
    optimizer: str, algorithm: str, accumulate: int, precision: str
) -> None:
    """Four batches make windows of three and of one."""

    class Clipped(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []
            self.unclipped: list[float] = []
            self.step = 0

        def _measure(self, module: nn.Module) -> float:
            gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
            assert len(gradients) == len(list(module.parameters()))
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            return float(flat.norm() if algorithm == "norm" else flat.abs().max())

        def on_before_optimizer_step(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
        ) -> None:
            self.unclipped.append(self._measure(pl_module))

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step > self.step:
                self.step = trainer.global_step
                self.seen.append(self._measure(pl_module))

    clipped = Clipped()
    callback = MagnitudePruneCallback(0.5, begin=1, end=3, every=1)
    module = Task(optimizer, "StepLR", "step")
    settings = {"limit_train_batches": 4, "accumulate_grad_batches": accumulate, "precision": precision}
    limit = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    fit = trainer(callback, clipped, **(SHORT | settings | limit))
    fit.fit(module)
    assert [record.epoch for record in history_of(module)] == [2, 3]
    assert [record.step for record in history_of(module)] == [step * (4 if accumulate == 1 else 2) for step in (2, 3)]
    assert min(clipped.unclipped) > 2e-3
    assert clipped.seen == pytest.approx([1e-3] * EPOCHS * (4 if accumulate == 1 else 2), rel=0.01)
    assert unlike_their_parameters(fit.optimizers) == []
