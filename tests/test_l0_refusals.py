"""What gates cannot do is refused, or told, before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fits import Module, equal, images, trainer
from gated import EAGER, fitted, nothing_left
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import history_of
from lightning_prune.callbacks import L0PruneCallback, MagnitudePruneCallback
from lightning_prune.gates import fold
from lightning_prune.layers.gates import gates_of


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Either `pruning_ratio` or `strength`"),
        ({"pruning_ratio": 0.5, "strength": 0.1}, "Either `pruning_ratio` or `strength`"),
        ({"strength": 0.0}, "`strength` is the lambda of the penalty, above 0; got 0.0"),
        ({"strength": {"net.0": 0.1, "*": -1.0}}, r"got -1.0 for '\*'"),
        ({"strength": {}}, "`strength` is one value, or pattern -> value; got no pattern"),
        ({"pruning_ratio": 1.0}, r"in \(0, 1\); got 1.0"),
        ({"pruning_ratio": 0.0}, r"in \(0, 1\); got 0.0"),
        ({"pruning_ratio": 0.5, "granularity": "filters"}, "`granularity` is what has a gate.*got 'filters'"),
        ({"pruning_ratio": 0.5, "granularity": {"net": "layers"}}, "got 'layers' for 'net'"),
        ({"pruning_ratio": 0.5, "of": "latency"}, "`of` is what gates cost.*got 'latency'"),
        ({"pruning_ratio": 0.5, "estimator": "reinforce"}, "`estimator` is.*got 'reinforce'"),
        ({"pruning_ratio": 0.5, "estimator": "bernoulli", "per_example": True}, "`per_example` goes with hard"),
        ({"pruning_ratio": 0.5, "gate_lr": 0.0}, "`gate_lr` is"),
        ({"pruning_ratio": 0.5, "drop_rate": 1.0}, "`drop_rate` is"),
        ({"pruning_ratio": 0.5, "weight_decay": -1.0}, "`weight_decay` is 0 or more"),
        ({"pruning_ratio": 0.5, "start": -1}, "`start` is"),
        ({"pruning_ratio": 0.5, "start": 3, "begin": 3}, "`begin` comes after `start`=3"),
        ({"pruning_ratio": 0.5, "begin": 0}, "`begin` comes after `start`=0"),
        ({"pruning_ratio": 0.5, "begin": 5, "end": 3}, "5.*3"),
    ],
)
def test_wrong_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L0PruneCallback(**settings)


class Unmoved(Module):
    def configure_optimizers(self) -> Optimizer:
        return SGD([self.net[1].weight], lr=0.1)


class Endless(Module):
    def train_dataloader(self) -> Any:
        class Images(IterableDataset[Any]):
            def __iter__(self) -> Any:
                return iter(images().dataset)  # type: ignore[call-overload]

        return DataLoader(Images(), batch_size=8)


class Lbfgs(Module):
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.LBFGS(self.parameters())


REFUSED: list[tuple[str, type[Module], dict[str, Any], type[Exception], str]] = [
    ("frozen", Module, {"granularity": {"net.8": "channels"}}, ValueError, "only what cannot be gated.*net.8: frozen"),
    ("no such layer", Module, {"granularity": {"nett*": "inputs"}}, ValueError, "matches no linear layer"),
    ("masks save no MACs", Module, {"granularity": "inputs", "of": "macs"}, ValueError, "become masks"),
    ("no optimizer", Unmoved, {}, MisconfigurationException, "No optimizer moves a layer that reads through gates"),
    ("one group only", Lbfgs, {}, MisconfigurationException, "LBFGS takes all parameters in one group"),
    ("no length", Endless, {"strength": 0.1}, MisconfigurationException, "`strength` is divided by the examples"),
    ("no strength", Module, {"strength": {"net.0": 0.1}}, ValueError, "no pattern for the gates of 'net.3'"),
    ("too late a start", Module, {"start": 9}, MisconfigurationException, "`start` is 9"),
    ("an end before the start", Module, {"start": 3, "end": 2}, MisconfigurationException, "at epoch 2, and `start`"),
]


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"), [one[1:] for one in REFUSED], ids=[x[0] for x in REFUSED]
)
@pytest.mark.parametrize("late", [False, True])
def test_what_cannot_be_is_refused_before_the_first_step(
    kind: type[Module], settings: dict[str, Any], error: type[Exception], message: str, late: bool
) -> None:
    """Also where the gates would come later than the first step."""
    module = kind()
    own = {"start": 1, "gate_lr": 0.4} if late else {"gate_lr": 0.4}
    options = {**own, **({} if "strength" in settings else {"pruning_ratio": 0.3}), **settings}
    fit = trainer(L0PruneCallback(**options), max_epochs=12)
    with pytest.raises(error, match=message):
        fit.fit(module)
    assert fit.global_step == 0
    assert gates_of(module) is None
    assert equal(module.state_dict(), kind().state_dict())


def test_two_callbacks_with_gates_are_refused() -> None:
    both = [
        L0PruneCallback(0.5, granularity={"net.0": "channels"}),
        L0PruneCallback(0.3, granularity={"net.3": "channels"}),
    ]
    with pytest.raises(MisconfigurationException, match="Two L0PruneCallback would gate the same model"):
        trainer(*both).fit(Module())


def test_a_network_that_is_gated_already_is_refused() -> None:
    module = Module()
    own = L0PruneCallback(0.5, of="channels", gate_lr=0.4, begin=4, end=30, every=4)
    with pytest.warns(
        UserWarning, match=r"last event .* is at epoch 30, but max_epochs=6: this fit leaves .* gates on"
    ):
        trainer(own, max_epochs=6).fit(module)
    assert gates_of(module) is not None
    fit = trainer(L0PruneCallback(0.5, of="channels", gate_lr=0.4, begin=8), max_epochs=12)
    with pytest.raises(MisconfigurationException, match=r"gated already.*fold\(model\)"):
        fit.fit(module)
    assert fit.global_step == 0
    fold(module)
    trainer(max_epochs=1).fit(module)
    nothing_left(module)


def test_a_fit_that_has_passed_the_events_without_gates_is_refused(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "last")
    trainer(keep, MagnitudePruneCallback(0.5, begin=1), max_epochs=9, enable_checkpointing=True).fit(Module())
    own = L0PruneCallback(0.6, of="channels", gate_lr=0.4, begin=8)
    with (
        pytest.warns(UserWarning, match="Be aware that when using `ckpt_path`"),
        pytest.raises(MisconfigurationException, match="At epoch 8 gates are to close, and Module has none"),
    ):
        trainer(own, max_epochs=12, enable_checkpointing=True).fit(Module(), ckpt_path=tmp_path / "last.ckpt")


class Stop(Exception):  # noqa: N818
    """The first step has come."""


class Stops(Callback):
    def on_before_zero_grad(self, *_: Any) -> None:
        raise Stop


def test_a_target_that_is_out_of_reach_is_told_before_the_first_step() -> None:
    """With net.3 at 1 channel: of 716 parameters 7 x 72 + 7 x 2 + 7 x 4 = 546 go."""
    own = L0PruneCallback(0.9, granularity={"net.3": "channels"}, begin=20, **EAGER)
    with (
        pytest.warns(UserWarning, match=r"pruning_ratio=0.9 cannot be reached: .* one of each group, 76.3% would be"),
        pytest.raises(Stop),
    ):
        fitted(own, Stops(), steps=30)


def test_what_was_cut_earlier_counts_for_what_can_be_reached() -> None:
    """With half of all channels gone before, one left of each group makes 1 - 30/716."""
    module = Module()
    trainer(MagnitudePruneCallback(0.5, begin=1), max_epochs=2).fit(module)
    trainer(L0PruneCallback(0.93, begin=20, **EAGER), max_epochs=4).fit(module)
    assert history_of(module)[-1].reached >= 0.93
    nothing_left(module)


@pytest.mark.parametrize(
    "settings", [{"begin": 12, "every_n_steps": 1}, {"begin": 2}, {"start": 2, "begin": 4}], ids=str
)
def test_too_few_steps_are_told_before_the_first_one(settings: dict[str, Any]) -> None:
    own = L0PruneCallback(0.5, of="channels", gate_lr=0.1, **settings)
    with (
        pytest.warns(UserWarning, match=r"Gates cannot close in time: .* makes 1.2 in the 12 steps .* 3.8 to go"),
        pytest.raises(Stop),
    ):
        fitted(own, Stops(), steps=30)
