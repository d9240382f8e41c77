"""What a user may get wrong: each stops before the first optimizer step and names argument, value and way out."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from math import nan
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import EXAMPLE, Module, equal, network, trainer, widths
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_prune import ChannelGroup, history_of
from lightning_prune.allocation import Global
from lightning_prune.callbacks import BNSlimmingCallback, MagnitudePruneCallback, PruneCallback
from lightning_prune.criteria import BNScale, Criterion
from lightning_prune.errors import PruningError, ScoreError, TraceError
from lightning_prune.schedules import linear

CALLBACKS: list[Callable[..., PruneCallback]] = [PruneCallback, MagnitudePruneCallback, BNSlimmingCallback]


@pytest.mark.parametrize("make", CALLBACKS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"pruning_ratio": 1.5},
            r"`pruning_ratio` is the fraction of channels to remove, in \[0, 1\); got 1.5.*pass 0.4",
        ),
        ({"pruning_ratio": 1.0}, r"`pruning_ratio` .* got 1.0"),
        ({"pruning_ratio": -0.1}, r"`pruning_ratio` .* got -0.1"),
        ({"pruning_ratio": 50}, r"`pruning_ratio` .* got 50\. For 40 % pass 0\.4"),
        ({"pruning_ratio": nan}, r"`pruning_ratio` .* got nan"),
        ({"of": "flops"}, r"`of` is what the ratio counts, one of 'channels', 'params', 'macs', .*; got 'flops'"),
        ({"begin": 5, "end": 4}, r"`begin` and `end` are epochs with 0 <= begin <= end; got begin=5, end=4"),
        ({"begin": -1}, r"got begin=-1"),
        ({"end": -3}, r"end=-3"),
        ({"every": 0}, r"`every` is the number of epochs between prune events, at least 1; got 0"),
        ({"every_n_steps": 0}, r"`every_n_steps` is the number of steps between prune events, at least 1; got 0"),
        ({"every_n_steps": 5, "begin": 9, "end": 8}, r"`begin` and `end` are steps with 0 <= begin <= end"),
        ({"every": 2, "every_n_steps": 5}, r"`every` counts epochs and `every_n_steps` optimizer steps; got 2 and 5"),
        ({"schedule": lambda t: 1 - t, "begin": 0, "end": 2}, r"`schedule` must rise .* \[1.0, 0.5, 0.0\]"),
        ({"min_channels": 0}, r"`min_channels` is what each group keeps at least, 1 or more; got 0"),
        ({"round_to": 0}, r"`round_to` is the multiple .* 1 or more, .*; got 0"),
    ],
)
def test_arguments_out_of_range(make: Callable[..., PruneCallback], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**({"pruning_ratio": 0.5} | arguments))


@pytest.mark.parametrize("make", CALLBACKS)
def test_a_string_is_no_list_of_patterns(make: Callable[..., PruneCallback]) -> None:
    """Taken letter by letter, "net.8" would ask for a module named "n"."""
    with pytest.raises(TypeError, match=r"`ignore` is a sequence of patterns; got the string 'net\.8'"):
        trainer(make(0.5, ignore="net.8")).fit(Module())


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (MagnitudePruneCallback, {"p": 3}, r"`p` is the order of the norm, 1 or 2; got 3"),
        (BNSlimmingCallback, {"strength": 0.0}, r"`strength` is the lambda of the penalty, above 0; got 0.0"),
        (BNSlimmingCallback, {"update": "l1"}, r"`update` is one of 'auto', 'subgradient', 'proximal'; got 'l1'"),
    ],
)
def test_arguments_of_the_presets(make: Callable[..., PruneCallback], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(0.5, **arguments)


class Misfit(Module):
    """Its forward takes other images than its example."""

    def __init__(self) -> None:
        super().__init__(example=torch.zeros(1, 3, 6, 6))


class BadBatch(Module):
    """Its forward fails on the first batch."""

    def __init__(self) -> None:
        super().__init__(example=None)

    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("no such layer")


def all_frozen() -> Module:
    return Module(net=nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))


class Mute(Criterion):
    def score(self, model: nn.Module, group: ChannelGroup) -> None:
        return None


class Ragged(Criterion):
    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        return torch.ones(group.size + 1)


@pytest.mark.parametrize("example", [EXAMPLE, None], ids=["example", "first batch"])
@pytest.mark.parametrize(
    ("callback", "make", "error", "message"),
    [
        (
            PruneCallback(0.5, ignore=["net.9"]),
            Module,
            ValueError,
            r"`ignore` pattern 'net\.9' matches no module.*example net",
        ),
        (
            PruneCallback(0.5, ignore=["*"]),
            Module,
            ValueError,
            r"(?s)finds nothing to prune in Module: .*loosen `ignore`",
        ),
        (
            PruneCallback(0.97),
            Module,
            ValueError,
            r"`pruning_ratio` 0\.97 would leave no channel in any of the 2 .*ask for",
        ),
        (PruneCallback(0.97, allocation=Global()), Module, ValueError, r"`pruning_ratio` 0\.97 would leave no channel"),
        (
            PruneCallback(0.5),
            BadBatch,
            TraceError,
            r"forward of BadBatch fails on `example_inputs`.*no such layer.*Pass inputs",
        ),
        (
            PruneCallback(0.5),
            Misfit,
            TraceError,
            r"forward of Misfit fails on `example_inputs`.*Pass inputs of the shape",
        ),
        (
            PruneCallback(0.5),
            all_frozen,
            ValueError,
            r"finds nothing to prune in Module: net\.1: reaches the model's output",
        ),
        (
            PruneCallback(0.5, criterion=Mute()),
            Module,
            ValueError,
            r"Mute finds nothing to prune.*Choose another criterion",
        ),
        (
            PruneCallback(0.5, criterion=Ragged()),
            Module,
            ScoreError,
            r"Ragged gave scores of shape \(9,\) for net\.0, .* 8 ch",
        ),
        (PruneCallback(0.5, criterion=BNScale()), all_frozen, ValueError, r"BNScale finds nothing to prune"),
        (
            BNSlimmingCallback(0.5),
            all_frozen,
            MisconfigurationException,
            r"Module has none .*Add BatchNorm layers, or use Mag",
        ),
        (
            BNSlimmingCallback(0.5, ignore=["net.1", "net.4"]),
            Module,
            MisconfigurationException,
            r"none \(ignore=\['net\.1', 'net\.4'\]\)",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_what_cannot_work_stops_the_fit_before_it_starts(
    callback: PruneCallback,
    make: Callable[[], Module],
    error: type[Exception],
    message: str,
    example: Tensor | None,
) -> None:
    module = make()
    if make is not Misfit:
        module.example_input_array = example
    before, fit = deepcopy(module.state_dict()), trainer(deepcopy(callback), num_sanity_val_steps=0)
    with pytest.raises(error, match=message):
        fit.fit(module)
    assert fit.global_step == 0
    assert equal(module.state_dict(), before)
    assert not history_of(module)


# the schedule against max_epochs


@pytest.mark.parametrize("make", CALLBACKS)
def test_a_schedule_that_never_fires(make: Callable[..., PruneCallback]) -> None:
    fit = trainer(make(0.5, begin=4), max_epochs=4)
    message = (
        rf"schedule of {make.__name__} never fires: its first event is at epoch 4, but max_epochs=4.*Lower `begin`"
    )
    with pytest.raises(MisconfigurationException, match=message):
        fit.fit(Module())
    assert fit.global_step == 0


def test_a_schedule_that_steps_never_reach() -> None:
    fit = trainer(PruneCallback(0.5, begin=3), max_epochs=10, max_steps=6)
    with pytest.raises((MisconfigurationException, UserWarning), match=r"(never fires|max_steps)"):
        fit.fit(Module())
    assert fit.global_step == 0


def test_a_schedule_that_is_cut_short_is_warned_about() -> None:
    module = Module()
    with pytest.warns(UserWarning, match=r"ends at epoch 8, but max_epochs=5: this fit reaches only 50% .*Lower `end`"):
        trainer(PruneCallback(0.5, schedule=linear, begin=0, end=8), max_epochs=5).fit(module)
    assert widths(module) == [6, 6]


def test_a_begin_by_default_after_a_given_end() -> None:
    with pytest.raises(ValueError, match="got begin=10, end=3"):
        trainer(PruneCallback(0.5, end=3), max_epochs=30).fit(Module())


def test_without_max_epochs_both_ends_are_needed() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"over the epochs of the fit, and nobody .* Set Trainer\(max_epochs=\.\.\.\)"
    ):
        trainer(PruneCallback(0.5, begin=1), max_epochs=-1, max_steps=12).fit(Module())
    module = Module()
    trainer(PruneCallback(0.5, begin=1, end=1), max_epochs=-1, max_steps=12).fit(module)
    assert widths(module) == [4, 4]


# several devices


@pytest.mark.parametrize("make", CALLBACKS)
@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_spread_the_network_are_refused_by_name(
    make: Callable[..., PruneCallback], kind: type[Strategy]
) -> None:
    fit = trainer()
    fit.strategy.__class__ = kind
    with pytest.raises(
        MisconfigurationException, match=rf"{make.__name__} .*strategy {kind.__name__},.*`lightning_prune\.prune` in"
    ):
        make(0.5).setup(fit, Module(), "fit")


# at the cut


class Poison(Callback):
    """Puts a NaN into a tensor just before an epoch."""

    def __init__(self, name: str, epoch: int) -> None:
        self.name, self.epoch = name, epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            pl_module.state_dict()[self.name].view(-1)[2] = nan
            self.before = deepcopy(pl_module.state_dict())


@pytest.mark.parametrize("name", ["net.0.weight", "net.1.running_var", "net.3.weight", "net.4.weight", "net.8.weight"])
def test_diverged_weights_are_named_and_nothing_is_cut(name: str) -> None:
    module, poison = Module(), Poison(name, epoch=2)
    fit = trainer(poison, PruneCallback(0.5, begin=2, end=2))
    with pytest.raises(
        ScoreError, match=rf"{name} holds NaN or infinite values\. Nothing was cut\. .*learning rate or clip"
    ):
        fit.fit(module)
    assert fit.current_epoch == 2
    assert not history_of(module)
    assert module.state_dict().keys() == poison.before.keys()
    assert all(torch.equal(t.nan_to_num(7), poison.before[key].nan_to_num(7)) for key, t in module.state_dict().items())


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    class Stray(Module):
        def configure_optimizers(self) -> Optimizer:
            return SGD([*self.net.parameters(), nn.Parameter(torch.zeros(3))], lr=0.01)

    module = Stray()
    fit = trainer(PruneCallback(0.5, begin=1, end=1))
    with pytest.raises(
        PruningError, match=r"SGD holds a parameter of shape \(3,\) that is not in the model; build the opt"
    ):
        fit.fit(module)
    assert fit.global_step == 0
    assert widths(module) == [8, 8]
    assert not history_of(module)


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        (PruneCallback(0.75, begin=1, min_channels=5), "keeps 5 channels in place of 2: min_channels=5"),
        (PruneCallback(0.75, begin=1, allocation=Global(cap=0.5)), "cap=0.5"),
        (PruneCallback(0.6, begin=1, of="params", min_channels=6), "min_channels=6"),
    ],
    ids=["min_channels", "cap", "params"],
)
def test_a_shortfall_is_warned_about_and_recorded(callback: PruneCallback, reason: str) -> None:
    module = Module()
    asked = callback.request.pruning_ratio
    with pytest.warns(
        UserWarning, match=rf"Asked {asked:.1%} of {callback.request.of}, reached .* Held back: "
    ) as caught:
        trainer(callback, max_epochs=2).fit(module)
    assert any(reason in str(warning.message) for warning in caught)
    (record,) = history_of(module)
    assert record.reached < asked
    assert reason in record.held_back["net.3"]


def test_frozen_groups_stand_in_the_record() -> None:
    module = Module()
    trainer(PruneCallback(0.5, begin=1, ignore=["net.4"]), max_epochs=2).fit(module)
    (record,) = history_of(module)
    assert record.held_back["net.3"] == "frozen: is ignored by the pattern 'net.4'"
    assert record.held_back["net.8"] == "frozen: reaches the model's output"
    assert widths(module) == [4, 8]
    assert record.reached == 0.5  # of the channels that can go


def test_sizes_of_a_network_that_ignores_nothing_are_unchanged_by_a_ratio_of_0() -> None:
    module = Module(net=network())
    trainer(PruneCallback(0.0, begin=1), max_epochs=2).fit(module)
    assert widths(module) == [8, 8]
    assert [record.reached for record in history_of(module)] == [0.0]
