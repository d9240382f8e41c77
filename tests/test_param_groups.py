"""A param group of our own: it follows the user's schedule in proportion, and nobody else notices."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import Module
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop, lr_scheduler
from torch.optim.swa_utils import SWALR
from versions import needs

from lightning_prune.callbacks.param_groups import join, leave

S = lr_scheduler
STEPS, JOINED, LEFT = 12, 4, 9
LR = 0.02


def decay(step: int) -> float:
    return 0.9**step


class Decay:
    """A schedule with memory of its own."""

    def __init__(self, rate: float) -> None:
        self.rate, self.calls = rate, 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return self.rate**self.calls


MAKERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: S.LambdaLR(o, decay),
    "LambdaLR with memory": lambda o: S.LambdaLR(o, [Decay(0.9), Decay(0.8)]),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, [decay, lambda step: 0.95]),
    "StepLR": lambda o: S.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [3, 6], 0.5),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 6),
    "LinearLR": lambda o: S.LinearLR(o, 0.25, total_iters=8),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 5, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3, 2, eta_min=0.01),
    "CyclicLR": lambda o: S.CyclicLR(o, [0.1, 0.2], [0.3, 0.5], 3),
    "OneCycleLR": lambda o: S.OneCycleLR(o, [0.3, 0.5], total_steps=STEPS + 1),
    "OneCycleLR three phases": lambda o: S.OneCycleLR(o, 0.3, total_steps=STEPS + 1, three_phase=True),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=1, factor=0.5, min_lr=[0.01, 0.05]),
    "ReduceLROnPlateau one floor": lambda o: S.ReduceLROnPlateau(o, patience=0, factor=0.5, min_lr=0.01),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.5, total_iters=5), S.StepLR(o, 2)], [5]),
    "SequentialLR of two milestones": lambda o: S.SequentialLR(
        o, [S.ConstantLR(o, 0.5, 2), S.ExponentialLR(o, 0.9), S.CosineAnnealingLR(o, 5, 0.01)], [3, 7]
    ),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.ExponentialLR(o, 0.9), S.ConstantLR(o, 0.5, 6)]),
    "SWALR": lambda o: SWALR(o, [0.05, 0.02], anneal_epochs=6),
}
ABSTRACT = {"LRScheduler", "_LRScheduler"}
WITH_MOMENTA = ("CyclicLR", "OneCycleLR")


class Foreign(S.LRScheduler):
    """Keeps values per group under a name of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.rates = [0.9, 0.8]
        self.marks = (3, 5)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [b * r**self.last_epoch for b, r in zip(self.base_lrs, self.rates, strict=True)]


class TwoMarks(S.LRScheduler):
    """Has a list that is as long as there are groups, and must not be touched."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.marks = [6, 8]
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [
            base * 0.5 ** sum(self.last_epoch >= mark for mark in self.marks) / len(self.marks)
            for base in self.base_lrs
        ]


class Around(S.LRScheduler):
    """Warms up, then hands over to another one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.after_scheduler = Foreign(optimizer)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [base * (self.last_epoch + 1) / 20 for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "after_scheduler": self.after_scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.after_scheduler.load_state_dict(state["after_scheduler"])
        super().load_state_dict({**state, "after_scheduler": self.after_scheduler})

    def step(self, epoch: int | None = None) -> None:
        super().step()
        if self.last_epoch > 5:
            self.after_scheduler.step()


class Stubborn(S.LRScheduler):
    """Knows two groups and no more."""

    def get_lr(self) -> list[float]:
        first, second = self.base_lrs
        return [first * 0.9**self.last_epoch, second]


class Hopeless(S.LRScheduler):
    """Cannot be copied."""

    def get_lr(self) -> list[float]:
        return list(self.base_lrs)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")


FOREIGN: dict[str, Callable[[Optimizer], Any]] = {"Foreign": Foreign, "TwoMarks": TwoMarks, "Around": Around}
ALL = {**MAKERS, **FOREIGN}

sgd = partial(SGD, lr=0.1, momentum=0.9)
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": sgd,
    "nesterov foreach": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": partial(SGD, lr=0.1, momentum=0.9, fused=True),
    "sgd tensor lr": partial(SGD, lr=torch.tensor(0.1), momentum=0.9),
    "adam": partial(Adam, lr=0.01, maximize=True),
    "adam fused": partial(Adam, lr=0.01, fused=True),
    "adam tensor lr": partial(Adam, lr=torch.tensor(0.01)),
    "adamw foreach": partial(AdamW, lr=0.01, foreach=True, amsgrad=True),
    "rmsprop": partial(RMSprop, lr=0.01, momentum=0.5),
}


class Run:
    """Two groups of the user's, a scheduler, and gates that come and go."""

    def __init__(self, make: Callable[..., Optimizer], schedule: Callable[[Optimizer], Any]) -> None:
        torch.manual_seed(0)
        self.users = [nn.Parameter(torch.randn(4)) for _ in range(3)]
        self.gates = [nn.Parameter(torch.randn(3)) for _ in range(2)]
        make = deepcopy(make)  # a tensor learning rate is changed in place
        self.optimizer = make([{"params": self.users[:2]}, {"params": self.users[2:], "lr": self.second(make)}])
        self.optimizer.param_groups[1]["weight_decay"] = 0.1
        self.scheduler = schedule(self.optimizer)

    @staticmethod
    def second(make: Any) -> Any:
        return make.keywords["lr"] * 2

    def join(self) -> Any:
        return join(self.optimizer, self.gates, LR, schedulers=[self.scheduler], name="gates")

    def leave(self) -> Any:
        return leave(self.optimizer, self.gates, [self.scheduler])

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in (*self.users, *self.gates):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()

    def schedule(self) -> None:
        args = (1.0,) if isinstance(self.scheduler, S.ReduceLROnPlateau) else ()
        self.scheduler.step(*args)

    def options(self) -> list[dict[str, Any]]:
        """All options of the user's groups, as plain numbers."""
        groups = [group for group in self.optimizer.param_groups if group.get("name") != "gates"]
        return [
            {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"} for group in groups
        ]

    def lr(self, place: int) -> float:
        return float(self.optimizer.param_groups[place]["lr"])

    def everything(self) -> list[Tensor]:
        held = [self.optimizer.state[parameter] for parameter in (*self.users, *self.gates)]
        state = [value for each in held for value in each.values() if isinstance(value, Tensor)]
        return [*self.users, *self.gates, *state]

    def save(self) -> BytesIO:
        file = BytesIO()
        weights = [parameter.detach() for parameter in (*self.users, *self.gates)]
        torch.save((weights, self.optimizer.state_dict(), self.scheduler.state_dict()), file)
        return file

    def load(self, file: BytesIO) -> None:
        file.seek(0)
        weights, optimizer, scheduler = torch.load(file, weights_only=False)
        with torch.no_grad():
            for parameter, value in zip((*self.users, *self.gates), weights, strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(scheduler)


def only(run: Run, steps: range) -> list[list[dict[str, Any]]]:
    course = []
    for number in steps:
        run.step(number)
        course.append(run.options())
        run.schedule()
    return course


def test_every_scheduler_of_torch_is_made_here() -> None:
    classes = {name for name, kind in vars(S).items() if inspect.isclass(kind) and issubclass(kind, S.LRScheduler)}
    made = {
        type(make(sgd([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)]))).__name__
        for make in MAKERS.values()
    }
    assert classes - made == ABSTRACT
    assert made - classes == {"SWALR"}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@pytest.mark.parametrize(
    "kind", [sgd, OPTIMIZERS["sgd tensor lr"], OPTIMIZERS["adam"]], ids=["sgd", "tensor lr", "adam"]
)
def test_nobody_else_notices_and_ours_follows_in_proportion(make: Any, kind: Any) -> None:
    alone, run = Run(kind, make), Run(kind, make)
    plain = only(alone, range(STEPS))
    ours = []
    for number in range(STEPS):
        if number == JOINED:
            first = run.optimizer.param_groups[0]
            # ReduceLROnPlateau notes no initial one; OneCycleLR starts low and notes its highest
            initial = float(first.get("max_lr", first.get("initial_lr", first["lr"])))
            run.join()
            assert run.lr(2) == pytest.approx(LR * run.lr(0) / initial)
        if number == LEFT:
            run.leave()
        run.step(number)
        assert run.options() == plain[number], number
        if JOINED <= number < LEFT:
            ours.append(run.lr(2) / run.lr(0))
            assert len(run.scheduler.get_last_lr()) == 3
        run.schedule()
    assert ours == pytest.approx([LR / initial] * len(ours), rel=1e-5)
    assert len(run.scheduler.get_last_lr()) == len(run.optimizer.param_groups) == 2
    assert all(torch.equal(*pair) for pair in zip(alone.users, run.users, strict=True))
    assert not run.optimizer._optimizer_step_pre_hooks
    assert all(gate not in run.optimizer.state for gate in run.gates)


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith(WITH_MOMENTA)])
def test_momenta_follow(name: str) -> None:
    run = Run(sgd, ALL[name])
    run.join()
    for number in range(6):
        run.step(number)
        first, _, own = run.optimizer.param_groups
        assert own["momentum"] == first["momentum"]
        run.schedule()


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_resumes_bit_for_bit(make: Any) -> None:
    resumes(sgd, make)


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_resumes_with_every_optimizer(kind: Any) -> None:
    resumes(kind, MAKERS["CosineAnnealingLR"])


def resumes(kind: Any, make: Any) -> None:
    run = Run(kind, make)
    only(run, range(JOINED))
    run.join()
    only(run, range(JOINED, 6))
    file = run.save()
    again = Run(kind, make)
    again.join()
    again.load(file)
    assert only(again, range(6, LEFT)) == only(run, range(6, LEFT))
    assert all(torch.equal(*pair) for pair in zip(run.everything(), again.everything(), strict=True))
    again.leave()
    run.leave()
    assert only(again, range(LEFT, STEPS)) == only(run, range(LEFT, STEPS))
    assert all(torch.equal(*pair) for pair in zip(run.users, again.users, strict=True))


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_other_options_are_those_of_the_first_group(kind: Any) -> None:
    run = Run(kind, MAKERS["StepLR"])
    run.join()
    first, _, own = run.optimizer.param_groups
    apart = {"params", "lr", "initial_lr", "weight_decay", "name", "follows"}
    assert {key: own[key] for key in own.keys() - apart} == {key: first[key] for key in first.keys() - apart}
    assert (own["weight_decay"], own["name"]) == (0, "gates")
    assert type(own["lr"]) is type(first["lr"])
    assert own["lr"] is not own["initial_lr"] or not isinstance(own["lr"], Tensor)
    before = [gate.detach().clone() for gate in run.gates]
    run.step(0)
    assert all(not torch.equal(*pair) for pair in zip(before, run.gates, strict=True))


def test_a_rate_set_by_hand_on_all_groups_is_put_in_proportion() -> None:
    run = Run(sgd, MAKERS["StepLR"])
    run.join()
    for group in run.optimizer.param_groups:  # the recipe for warm-up in Lightning's documentation
        group["lr"] = 0.05

    def closure() -> float:
        run.optimizer.param_groups[2]["lr"] = 7.0
        return 1.0

    assert run.optimizer.step(closure) == 1.0  # positional
    assert run.lr(2) == pytest.approx(LR / 2)
    assert run.optimizer.step(closure=closure) == 1.0
    assert run.lr(2) == pytest.approx(LR / 2)


def test_parameters_are_taken_out_of_other_groups() -> None:
    gates = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    body = nn.Parameter(torch.ones(2))
    optimizer = sgd([gates[0], body, gates[1]])
    undo = join(optimizer, gates, LR, schedulers=[], name="gates")
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [[id(body)], [*map(id, gates)]]
    undo()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(gates[0]), id(body), id(gates[1])]
    assert len(optimizer.param_groups) == 1
    assert not optimizer._optimizer_step_pre_hooks


def test_named_parameters_keep_their_names() -> None:
    net = nn.ModuleDict({"body": nn.Linear(2, 2), "gate": nn.Linear(2, 1)})
    try:
        optimizer = sgd(list(net.named_parameters()))
    except TypeError:
        pytest.skip("this torch knows no names of parameters")
    undo = join(optimizer, list(net["gate"].parameters()), LR, schedulers=[], name="gates")
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["body.weight", "body.bias"],
        ["gate.weight", "gate.bias"],
    ]
    undo()
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in net.named_parameters()]


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_both_can_be_taken_back(make: Any) -> None:
    alone, run = Run(sgd, make), Run(sgd, make)
    run.join()()
    assert only(run, range(JOINED)) == only(alone, range(JOINED))
    for each in (run, alone):
        each.join()
    assert only(run, range(JOINED, 6)) == only(alone, range(JOINED, 6))
    run.leave()()
    assert only(run, range(6, LEFT)) == only(alone, range(6, LEFT))
    assert all(torch.equal(*pair) for pair in zip(run.everything(), alone.everything(), strict=True))


@pytest.mark.parametrize("name", ["LambdaLR", "CosineAnnealingLR", "Foreign"])
def test_groups_that_came_later_stay(name: str) -> None:
    run = Run(sgd, ALL[name])
    run.join()
    late = nn.Parameter(torch.ones(2))
    run.optimizer.add_param_group({"params": [late], "lr": 0.3, "initial_lr": 0.3})
    values = {"base_lrs": 0.3, "_last_lr": 0.3, "lr_lambdas": decay, "rates": 0.7}
    for key in values.keys() & vars(run.scheduler).keys():
        getattr(run.scheduler, key).append(values[key])
    run.leave()
    assert [id(p) for p in run.optimizer.param_groups[2]["params"]] == [id(late)]
    assert run.scheduler.base_lrs == [0.1, 0.2, 0.3]
    assert getattr(run.scheduler, "rates", [0.7])[-1] == 0.7
    only(run, range(3))


def test_joining_twice_changes_nothing() -> None:
    run = Run(sgd, MAKERS["CyclicLR"])
    run.join()
    before = deepcopy(run.scheduler.state_dict())
    run.join()
    assert run.scheduler.state_dict().keys() == before.keys()
    assert run.scheduler.base_lrs == before["base_lrs"]
    assert len(run.optimizer.param_groups) == 3


def test_schedulers_of_other_optimizers_are_left_alone() -> None:
    run, other = Run(sgd, MAKERS["StepLR"]), Run(sgd, MAKERS["StepLR"])
    join(run.optimizer, run.gates, LR, schedulers=[other.scheduler, run.scheduler], name="gates")
    assert (len(run.scheduler.base_lrs), len(other.scheduler.base_lrs)) == (3, 2)


def test_trying_out_leaves_a_foreign_scheduler_as_it_was() -> None:
    run = Run(sgd, Foreign)
    before = (run.scheduler.last_epoch, run.options())
    run.join()
    assert (run.scheduler.last_epoch, run.options()) == before
    assert run.scheduler.rates == [0.9, 0.8, 0.9]
    assert run.scheduler.marks == (3, 5)
    marks = Run(sgd, TwoMarks)
    marks.join()
    assert marks.scheduler.marks == [6, 8]


def test_a_scheduler_that_cannot_follow_is_refused_and_nothing_has_changed() -> None:
    run, alone = Run(sgd, Stubborn), Run(sgd, Stubborn)
    with pytest.raises(MisconfigurationException, match="Stubborn would not go on as it does now with 3 param groups"):
        run.join()
    assert only(run, range(5)) == only(alone, range(5))
    assert len(run.scheduler.base_lrs) == 2


def test_a_scheduler_that_cannot_be_tried_out_is_warned_of() -> None:
    run = Run(sgd, Hopeless)
    with pytest.warns(UserWarning, match="Hopeless could not be tried out"):
        run.join()
    only(run, range(3))


def test_bad_input() -> None:
    run = Run(sgd, MAKERS["StepLR"])
    optimizer, gates = run.optimizer, run.gates
    with pytest.raises(ValueError, match="got none"):
        join(optimizer, [], LR, schedulers=[], name="gates")
    for lr in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"above 0; got {lr}"):
            join(optimizer, gates, lr, schedulers=[], name="gates")
    optimizer.param_groups[1]["name"] = "gates"
    with pytest.raises(ValueError, match="has one named 'gates'"):
        join(optimizer, gates, LR, schedulers=[], name="gates")
    with pytest.raises(ValueError, match="has no param group that was made for just these 2"):
        leave(optimizer, gates, [])
    with pytest.raises(ValueError, match="has no param group that was made"):
        leave(optimizer, run.users[2:], [])  # a group, but not of ours
    with pytest.raises(MisconfigurationException, match="LBFGS takes all parameters in one group"):
        join(LBFGS(run.users), gates, LR, schedulers=[], name="gates")
    with pytest.raises(MisconfigurationException, match="learning rate 0"):
        join(sgd([run.users[0]], lr=0.0), gates, LR, schedulers=[], name="gates")


class Gates(pl.Callback):
    """Joins at a step and leaves at another; joins before the state is loaded where a fit is resumed."""

    def __init__(self, start: int = 8, end: int = 20, resumed: bool = False) -> None:
        self.start, self.end, self.resumed = start, end, resumed
        self.rates: list[tuple[float, float]] = []

    def move(self, act: Any, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        act(trainer.optimizers[0], self.parameters, *args, schedulers=schedulers, **kwargs)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        torch.manual_seed(1)
        pl_module.gates = nn.Parameter(torch.randn(4))
        self.parameters = [pl_module.gates]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.resumed:
            self.move(join, trainer, LR, name="gates")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.start and not self.resumed:
            self.move(join, trainer, LR, name="gates")
        if trainer.global_step == self.end:
            self.move(leave, trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        pl_module.gates.grad = pl_module.gates.detach() - 1

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        self.rates.append((groups[0]["lr"], groups[1]["lr"] if len(groups) > 1 else 0.0))


def scheduled(interval: str, optimizer: Optimizer) -> dict[str, Any]:
    scheduler = S.ExponentialLR(optimizer, 0.9)
    return {"lr_scheduler": {"scheduler": scheduler, "interval": interval}}


def fit(
    folder: Path, interval: str, *callbacks: pl.Callback, epochs: int = 4, resume: Path | None = None
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version=""),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        limit_val_batches=0,
    )
    trainer.fit(Module(scheduler=partial(scheduled, interval)), ckpt_path=resume, weights_only=False)
    return trainer


def column(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@needs("lightning", "2.6", "has no fit(weights_only=)")
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_in_a_fit_with_a_monitor(tmp_path: Path, interval: str) -> None:
    gates, monitor = Gates(), LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    monitor_plain = LearningRateMonitor()
    trainer = fit(tmp_path / "gates", interval, monitor, gates)
    fit(tmp_path / "plain", interval, Gates(start=99, end=99), monitor_plain)
    body = column(tmp_path / "gates", "lr-SGD") + column(tmp_path / "gates", "lr-SGD/pg1")
    assert sorted(body, reverse=True) == column(tmp_path / "plain", "lr-SGD")
    own, beside = column(tmp_path / "gates", "lr-SGD/gates"), column(tmp_path / "gates", "lr-SGD/pg1")
    assert len(own) == len(beside) > 0
    assert own == pytest.approx([LR / 0.05 * lr for lr in beside])
    assert len(trainer.optimizers[0].param_groups) == 1
    inside = gates.rates[8:20]
    assert all(own > 0 for _, own in inside)


@needs("lightning", "2.6", "has no fit(weights_only=)")
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_fit_resumes_bit_for_bit(tmp_path: Path, interval: str) -> None:
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    whole = fit(tmp_path / "a", interval, Gates(), Save())
    again = fit(tmp_path / "b", interval, Gates(resumed=True), LearningRateMonitor(), resume=tmp_path / "last.ckpt")
    states = [trainer.lightning_module.state_dict() for trainer in (whole, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not torch.equal(states[0]["gates"], Module().net[8].bias)
