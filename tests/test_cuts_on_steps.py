"""Cuts on optimizer steps: counted as the fit counts them, never inside an accumulation window, resumed exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.nn.functional as F
from beside import Moves, beside, cut, either_side
from fits import EXAMPLE, STEPS, Module, Resumable, equal, images, momentum, states, trainer, widths
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import history_of
from lightning_prune.callbacks import BNSlimmingCallback, MagnitudePruneCallback, PruneCallback
from lightning_prune.schedules import linear


class Windows(Callback):
    """Notes behind the prune callback where in an accumulation window it cut, and that no gradient was waiting."""

    def __init__(self) -> None:
        self.cuts: list[tuple[int, int, int]] = []
        self.fresh: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if len(history_of(pl_module)) > len(self.cuts):
            self.cuts.append((trainer.current_epoch, index, trainer.global_step))
            self.fresh.append(index % trainer.accumulate_grad_batches == 0)


@pytest.mark.parametrize(
    ("accumulate", "batches", "cuts"),
    [
        (1, 6, [(0, 4, 4), (1, 0, 6), (1, 2, 8)]),
        (3, 6, [(2, 0, 4), (3, 0, 6), (4, 0, 8)]),
        (3, 5, [(2, 0, 4), (3, 0, 6), (4, 0, 8)]),
        (4, 6, [(2, 0, 4), (3, 0, 6), (4, 0, 8)]),
        (2, 6, [(1, 2, 4), (2, 0, 6), (2, 4, 8)]),
    ],
)
def test_steps_are_counted_and_windows_are_whole(
    accumulate: int, batches: int, cuts: list[tuple[int, int, int]]
) -> None:
    module, windows = Module(example=EXAMPLE if accumulate % 2 else None), Windows()
    gradual = PruneCallback(0.75, schedule=linear, begin=2, end=8, every_n_steps=2)
    settings = {"accumulate_grad_batches": accumulate, "limit_train_batches": batches, "max_epochs": 6}
    trainer(gradual, windows, **settings).fit(module)
    assert windows.cuts == cuts
    assert windows.fresh == [True] * 3
    assert [(record.epoch, record.step) for record in history_of(module)] == [(epoch, step) for epoch, _, step in cuts]
    assert [record.reached for record in history_of(module)] == [0.25, 0.5, 0.75]


@either_side
def test_windows_that_change_from_epoch_to_epoch(side: int) -> None:
    """1, 3 and 4 batches a window: steps 0 to 5, 6 and 7, 8 and 9, 10 and 11."""
    module, windows = Module(), Windows()
    gradual = PruneCallback(0.75, schedule=linear, begin=4, end=10, every_n_steps=3)
    accumulate = GradientAccumulationScheduler({1: 3, 2: 4})
    trainer(*beside(gradual, accumulate, side=side), windows).fit(module)
    assert windows.cuts == [(1, 3, 7), (3, 0, 10)]
    assert windows.fresh == [True] * 2


@either_side
def test_thirds_of_all_steps_with_windows_that_change(side: int) -> None:
    """6 + 3 * 2 steps."""
    module = Module()
    one = PruneCallback(0.5, every_n_steps=1)
    trainer(*beside(one, GradientAccumulationScheduler({1: 3}), side=side)).fit(module)
    assert [record.step for record in history_of(module)] == [4]


def test_steps_that_the_fit_never_reaches_are_refused_with_windows_that_change() -> None:
    """8 steps."""
    with pytest.raises(MisconfigurationException, match="never fires"):
        trainer(PruneCallback(0.5, begin=12, every_n_steps=1, end=12), GradientAccumulationScheduler({0: 3})).fit(
            Module()
        )


@either_side
def test_max_steps_with_windows_that_change(side: int) -> None:
    """Two steps an epoch: six steps are three epochs."""
    module = Module()
    accumulate = GradientAccumulationScheduler({0: 3})
    trainer(*beside(cut(1), accumulate, side=side), max_steps=6).fit(module)
    assert [record.epoch for record in history_of(module)] == [1]


class TwoOptimizers(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> list[Optimizer]:
        return [momentum(self.net[:3].parameters()), Adam(self.net[3:].parameters(), lr=0.01)]


def test_steps_of_several_optimizers_count_each() -> None:
    """As in `trainer.global_step`: two in a batch."""
    module, moves = TwoOptimizers(), Moves()
    trainer(PruneCallback(0.5, schedule=linear, begin=3, end=9, every_n_steps=3), moves).fit(module)
    assert [record.step for record in history_of(module)] == [6, 10]
    assert moves.still == [[]] * 4 * STEPS


def test_thirds_of_all_steps_of_several_optimizers() -> None:
    """48 steps."""
    module = TwoOptimizers()
    trainer(PruneCallback(0.5, every_n_steps=1)).fit(module)
    assert [record.step for record in history_of(module)] == [16]


def test_max_steps_of_several_optimizers() -> None:
    """Twelve steps are one epoch."""
    with pytest.raises(MisconfigurationException, match="never fires"):
        trainer(cut(1), max_steps=12).fit(TwoOptimizers())


class Endless(IterableDataset[tuple[Tensor, ...]]):
    """48 images, and nobody knows how many."""

    def __iter__(self) -> Any:
        return iter(images().dataset)


class Streamed(Module):
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(Endless(), batch_size=8)


@pytest.mark.parametrize("settings", [{}, {"max_steps": 20}, {"max_epochs": -1, "max_steps": 20}], ids=str)
@pytest.mark.parametrize("timing", [{"begin": 1, "end": 2}, {"begin": 4, "end": 8, "every_n_steps": 4}], ids=str)
def test_a_stream_of_unknown_length(timing: dict[str, Any], settings: dict[str, int]) -> None:
    module = Streamed()
    trainer(PruneCallback(0.5, schedule=linear, **timing), **settings).fit(module)
    assert widths(module) == [4, 4]


STEP_METHODS: dict[str, Callable[[], PruneCallback]] = {
    "magnitude": lambda: MagnitudePruneCallback(0.5, schedule=linear, begin=3, end=9, every_n_steps=3),
    "slimming": lambda: BNSlimmingCallback(0.5, strength=0.01, schedule=linear, begin=3, end=9, every_n_steps=3),
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", STEP_METHODS.values(), ids=STEP_METHODS)
def test_a_fit_resumed_within_an_epoch_is_the_unbroken_one(
    tmp_path: Path, method: Callable[[], PruneCallback], accumulate: int
) -> None:
    """From just before, at and just after the cuts; not from the end of an epoch, where Lightning 2.6 skips one."""
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    unbroken = Resumable()
    whole = trainer(method(), keep, enable_checkpointing=True, **settings)
    whole.fit(unbroken)
    assert [record.step for record in history_of(unbroken)] == [6, 9]
    expected = states(unbroken, whole.optimizers)
    for step in (at for at in (5, 7, 8, 9, 10) if at % (STEPS // accumulate)):
        resumed, callback = Resumable(seed=9), method()
        rest = trainer(callback, **settings)
        rest.fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert history_of(resumed) == history_of(unbroken), step
        assert equal(resumed.state_dict(), unbroken.state_dict()), step
        found = states(resumed, rest.optimizers)
        assert all(equal(found[name], state) for name, state in expected.items()), step
        assert callback.is_finished


class SaveWithinAWindow(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if (trainer.current_epoch, index) == (1, 0):
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_an_event_that_was_missed_waits_for_the_end_of_the_window(tmp_path: Path) -> None:
    """Resumed after one of three batches, with an event that lies behind."""
    path, module, windows = tmp_path / "within.ckpt", Resumable(seed=9), Windows()
    trainer(SaveWithinAWindow(path), accumulate_grad_batches=3).fit(Resumable())
    late = PruneCallback(0.5, begin=1, end=1, every_n_steps=1)
    trainer(late, windows, accumulate_grad_batches=3).fit(module, ckpt_path=path)
    assert windows.cuts == [(1, 3, 3)]
    assert windows.fresh == [True]
