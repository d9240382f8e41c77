"""The signal is gathered while a fit goes on: under accumulation, loss scaling, after a resume, and in windows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fits import EXAMPLE, STEPS, Module, Resumable, equal, images, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD

from lightning_prune import history_of
from lightning_prune.callbacks import PruneCallback
from lightning_prune.criteria import Fisher, Taylor, score_groups
from lightning_prune.errors import ScoreError
from lightning_prune.graph import read
from lightning_prune.types import ChannelGroup


class Noting(Fisher):
    """Keeps what each event has seen."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[tuple[int, int]] = []
        self._used: list[dict[str, Tensor]] = []

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        found = super().score(model, group)
        if (self.steps, self.examples) not in self._noted:
            self._noted.append((self.steps, self.examples))
            self._used.append({})
        self._used[-1][group.name] = found
        return found


class Still(Module):
    """Its weights stay, so that what is gathered can be found again later."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(lambda parameters: SGD(parameters, lr=0.0), **settings)

    def on_train_epoch_start(self) -> None:
        self.eval()


def of_batches(net: nn.Module, count: int) -> dict[str, Tensor]:
    """The scores of the first batches."""
    fisher, net = Fisher(), copy.deepcopy(net).eval()
    with fisher.gathering(net, EXAMPLE):
        for inputs, labels in list(images())[:count]:
            F.cross_entropy(net(inputs), labels).backward()
            fisher.take()
    return score_groups(fisher, net, read(net, EXAMPLE).groups)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare scores; the callback reads the LightningModule, whose names have a prefix."""
    assert {f"net.{name}" for name in expected} <= found.keys()
    for name, scores in expected.items():
        torch.testing.assert_close(found[f"net.{name}"].double(), scores, rtol=1e-5, atol=0)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_accumulation_does_not_change_the_scores(accumulate: int) -> None:
    noting, module = Noting(), Still()
    expected = of_batches(module.net, STEPS)
    cut = PruneCallback(0.5, criterion=noting, begin=1, end=1)
    trainer(cut, max_epochs=2, accumulate_grad_batches=accumulate).fit(module)
    assert noting._noted == [(STEPS, 48)]
    assert_same(noting._used[0], expected)


def test_what_was_gathered_is_forgotten_after_a_cut() -> None:
    noting, module = Noting(), Module()
    trainer(PruneCallback(0.5, criterion=noting, every_n_steps=4, begin=4, end=8, schedule=lambda x: (1 + x) / 2)).fit(
        module
    )
    assert noting._noted == [(4, 32)]
    assert [record.step for record in history_of(module)] == [4, 8]
    assert not noting._handles
    assert not any(layer._forward_pre_hooks for layer in module.modules())


def test_a_window_looks_at_the_last_steps_only() -> None:
    noting = Noting()
    cut = PruneCallback(0.5, criterion=noting, begin=1, end=1)
    cut.gathering.window = 2
    trainer(cut, max_epochs=2).fit(Module())
    assert noting._noted == [(2, 16)]


class Scaled(MixedPrecision):
    """Scales the loss as fp16 training does, in full precision; the scale is too large at first."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=10_000))

    def forward_context(self) -> Any:
        return torch.autocast("cpu", enabled=False)


def test_loss_scaling_is_taken_back() -> None:
    noting, module = Noting(), Still()
    expected = of_batches(module.net, STEPS)
    cut = PruneCallback(0.5, criterion=noting, begin=1, end=1)
    trainer(cut, max_epochs=2, plugins=[Scaled()]).fit(module)
    assert noting._noted == [(STEPS, 48)]
    assert_same(noting._used[0], expected)


def test_steps_that_overflow_are_left_out() -> None:
    class Overflowing(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 and self.current_epoch == 0 else loss

    noting = Noting()
    cut = PruneCallback(0.5, criterion=noting, begin=1, end=1)
    trainer(cut, max_epochs=2, plugins=[Scaled()]).fit(Overflowing())
    assert noting._noted == [(STEPS - 1, 40)]
    assert all(scores.isfinite().all() for scores in noting._used[0].values())


def test_a_fit_that_goes_on_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    def fit(path: Path | None) -> Module:
        cut = PruneCallback(0.5, criterion=Fisher(), every_n_steps=8, begin=8, end=16, schedule=lambda x: (1 + x) / 2)
        module = Resumable()
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer(cut, saving, enable_checkpointing=True).fit(module, ckpt_path=path)
        return module

    unbroken = fit(None)
    for step in (3, 7, 8, 11):
        resumed = fit(tmp_path / f"step={step}.ckpt")
        assert equal(resumed.state_dict(), unbroken.state_dict()), step
        assert history_of(resumed) == history_of(unbroken)


def test_an_event_before_the_first_step_is_refused() -> None:
    for settings in ({"begin": 0, "end": 0}, {"begin": 0, "end": 4, "every_n_steps": 2}):
        with pytest.raises(MisconfigurationException, match=r"what Taylor has seen.*before the first step.*`begin`"):
            trainer(PruneCallback(0.5, criterion=Taylor(), **settings)).fit(Module())


def test_steps_without_a_loss_give_nothing() -> None:
    class Silent(Module):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    fit = trainer(PruneCallback(0.5, criterion=Fisher(), begin=1, end=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning tells of the `None`, once in a process
        with pytest.raises(ScoreError, match="has seen nothing"):
            fit.fit(Silent())


def test_in_a_stream_of_unknown_length_all_steps_are_looked_at() -> None:
    noting, module = Noting(), Module()
    module.train_dataloader = lambda: (batch for batch in images())  # type: ignore[assignment]
    cut = PruneCallback(0.5, criterion=noting, begin=1, end=1)
    cut.gathering.window = 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(cut, max_epochs=2).fit(module)
    assert noting._noted == [(STEPS, 48)]


def test_frozen_layers_are_named() -> None:
    module = Module()
    for layer in list(module.net)[:3]:
        layer.requires_grad_(False)
    with pytest.raises(ScoreError, match=r"no gradient for net\.0.*what net\.3 reads.*ignore"):
        trainer(PruneCallback(0.5, criterion=Fisher(), begin=1, end=1)).fit(module)
    module = Module()
    for layer in list(module.net)[:6]:
        layer.requires_grad_(False)
    with pytest.raises(ScoreError, match=r"has seen nothing .* parameters frozen"):
        trainer(PruneCallback(0.5, criterion=Fisher(), begin=1, end=1)).fit(module)


def test_losses_that_compare_examples_are_warned_of() -> None:
    class Compared(Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = nn.TripletMarginLoss()

    with pytest.warns(UserWarning, match=r"Fisher takes the loss for a mean.*loss \(TripletMarginLoss\)"):
        trainer(PruneCallback(0.5, criterion=Fisher(), begin=1, end=1)).fit(Compared())


def test_a_criterion_is_told_by_its_settings_alone() -> None:
    cut = PruneCallback(0.5, criterion=Fisher("sum"), begin=1, end=1)
    before = cut.state_key
    trainer(cut, max_epochs=2).fit(Module())
    assert cut.state_key == before
    assert "Fisher(reduction='sum')" in before
