"""Gates beside callbacks that average weights, and beside monitors and loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from beside import either_side
from fits import EXAMPLE, widths
from gated import EAGER, Outputs, fitted, mlp, nothing_left
from lightning.pytorch import callbacks as neighbours
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_prune import history_of
from lightning_prune.callbacks import L0PruneCallback
from lightning_prune.callbacks.averages import averaged_copies
from lightning_prune.layers.gates import gates_of

# averages


needs_averages = pytest.mark.skipif(not hasattr(neighbours, "EMAWeightAveraging"), reason="this Lightning has none")


class Copies(Callback):
    """Looks at averaged copies: they are gated while the network is, and of its sizes."""

    def __init__(self) -> None:
        self.gated: list[bool] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for copy in averaged_copies(trainer):
            assert (gates_of(copy) is None) == (gates_of(pl_module) is None)
            assert copy.state_dict().keys() == pl_module.state_dict().keys()
            own = {name: value.shape for name, value in pl_module.named_parameters()}
            assert {name: value.shape for name, value in copy.named_parameters()} == own
            self.gated.append(gates_of(copy) is not None)
            if gates_of(copy) is not None:
                assert gates_of(copy) is not gates_of(pl_module)
            else:
                nothing_left(copy)


@needs_averages
@either_side
@pytest.mark.parametrize("buffers", [True, False])
def test_the_average_is_gated_cut_and_folded_too(side: int, buffers: bool) -> None:
    own = L0PruneCallback(0.5, of="channels", gate_lr=0.3, begin=24, end=36, every_n_steps=6)
    average, look = neighbours.EMAWeightAveraging(decay=0.9, use_buffers=buffers), Copies()
    module, fit = fitted([own, average][::side][0], [own, average][::side][1], look, steps=42, limit_val_batches=2)
    assert look.gated == [True] * 36 + [False] * 6
    assert [record.step for record in history_of(module)] == [24, 30, 36]
    nothing_left(module)
    assert module(EXAMPLE).isfinite().all()
    assert float(fit.callback_metrics["val_loss"]) > 0


@needs_averages
def test_the_averaged_network_answers_alike_before_and_after_it_closes() -> None:
    class Look(Outputs):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *given: Any) -> None:
            for copy in averaged_copies(trainer):
                super().on_train_batch_start(trainer, copy, *given)  # type: ignore[arg-type]

    before, after = Look(30), Look(30)
    own = L0PruneCallback(strength=1e-6, gate_lr=0.055, begin=30, every_n_steps=1, drop_rate=0.7)
    average = neighbours.EMAWeightAveraging(decay=0.99)
    fitted(before, own, after, average, steps=36, net=mlp())  # type: ignore[arg-type]
    assert len(before.sizes[0]) > len(after.sizes[0]), "the gates have gone"
    torch.testing.assert_close(before.seen, after.seen, atol=1e-5, rtol=1e-4)


@either_side
def test_stochastic_weight_averaging_over_the_closing(side: int) -> None:
    own = L0PruneCallback(0.5, of="channels", gate_lr=0.3, begin=6)
    average = StochasticWeightAveraging(0.02, swa_epoch_start=3, annealing_epochs=2)
    one, two = [own, average][::side]
    module, fit = fitted(one, two, Copies(), steps=54)  # type: ignore[arg-type]
    assert len(history_of(module)) == 1
    assert sum(widths(module)) <= 8
    nothing_left(module)
    assert not fit.optimizers[0]._optimizer_step_pre_hooks


# logs


def test_what_is_logged(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, "", "")
    own = L0PruneCallback(0.5, of="params", begin=12, **EAGER)
    _, fit = fitted(own, LearningRateMonitor("step"), steps=18, logger=board, log_every_n_steps=1)
    logged = {name for name in fit.logged_metrics if name.startswith("l0/")}
    assert logged == {"l0/open/net.0", "l0/open/net.3", "l0/expected_params", "l0/pruning_ratio", "l0/multiplier"}
    assert fit.callback_metrics["l0/open/net.0"] in range(1, 9)
    assert 0 < float(fit.callback_metrics["l0/expected_params"]) < 716
    events = EventAccumulator(str(tmp_path), {"histograms": 0})
    events.Reload()
    assert [found.step for found in events.Histograms("l0/log_alpha")] == [6, 12]
    assert any("gates" in tag for tag in events.Tags()["scalars"]), "the learning rate of the gates"


def test_a_strength_has_no_multiplier() -> None:
    _, fit = fitted(L0PruneCallback(strength=0.1, of="channels", begin=12, **EAGER), steps=18)
    assert "l0/expected_channels" in fit.callback_metrics
    assert "l0/multiplier" not in fit.callback_metrics


@pytest.mark.filterwarnings("ignore:You are running with .Trainer.barebones=True", "ignore:.*barebones=True.* is conf")
def test_a_barebones_trainer() -> None:
    module, fit = fitted(L0PruneCallback(0.5, of="channels", begin=12, **EAGER), steps=18, barebones=True)
    nothing_left(module, fit)
    assert sum(widths(module)) <= 8
