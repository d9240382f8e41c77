"""Lightning's own callbacks beside a prune callback: each still does what it is for."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from beside import CUT, Moves, beside, cut, either_side, weights
from fits import EXAMPLE, STEPS, Module, equal, images, kept_of, momentum, trainer, widths
from lightning.pytorch import callbacks as neighbours
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from versions import needs, older

from lightning_prune import history_of, load_pruned
from lightning_prune.callbacks import MagnitudePruneCallback, PruneCallback
from lightning_prune.history import KEY
from lightning_prune.schedules import linear

# stopping


class Scored(Module):
    """Its score is best at epoch 1."""

    def on_validation_epoch_end(self) -> None:
        self.log("score", abs(self.current_epoch - 1.0))


@either_side
@pytest.mark.parametrize(("epoch", "patience"), [(1, 2), (3, 2), (3, 4)])
def test_early_stopping_counts_on_across_the_cut(side: int, epoch: int, patience: int) -> None:
    module, stop = Scored(), EarlyStopping("score", patience=patience)
    fit = trainer(*beside(cut(epoch), stop, side=side), max_epochs=9)
    fit.fit(module)
    assert stop.wait_count == patience
    assert stop.stopped_epoch == 1 + patience
    assert fit.global_step == (2 + patience) * STEPS
    assert [record.epoch for record in history_of(module)] == [epoch]


def test_early_stopping_before_the_cut_leaves_the_network_dense() -> None:
    module = Scored()
    trainer(cut(5), EarlyStopping("score", patience=1), max_epochs=9).fit(module)
    assert widths(module) == [8, 8]


@either_side
def test_a_timer_stops_after_the_cut(side: int) -> None:
    class Late(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == CUT * STEPS + 2:
                timer._offset = 3600

    timer, module = Timer(timedelta(hours=1)), Module()
    fit = trainer(*beside(cut(), timer, side=side), Late())
    fit.fit(module)
    assert fit.global_step == CUT * STEPS + 3
    assert widths(module) == [4, 4]


# files


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@either_side
def test_checkpoints_every_few_steps_and_the_last_one(tmp_path: Path, side: int) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1, save_last=True)
    module = Module()
    trainer(*beside(cut(), keep, side=side), enable_checkpointing=True).fit(module)
    found = {}
    for file in tmp_path.glob("step=*.ckpt"):
        loaded = load_pruned(Module(seed=9), file)
        found[int(file.stem[5:])] = widths(loaded)
        trainer().validate(loaded, verbose=False)
    assert found == {step: [8, 8] if step <= CUT * STEPS else [4, 4] for step in range(4, 25, 4)}
    last = Path(keep.last_model_path)
    assert last.name == "last.ckpt"
    assert equal(load_pruned(Module(seed=9), last).state_dict(), module.state_dict())


class Fail(Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._fail)

    def _fail(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == CUT:
            raise RuntimeError("power cut")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:.*there is no last checkpoint")
@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=None.. was called without a model")
@either_side
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start", "on_before_optimizer_step"])
def test_what_is_saved_on_an_exception_knows_of_the_cut(tmp_path: Path, hook: str, side: int) -> None:
    """The resumed fit cuts once in all; Lightning 2.6 itself loses the epoch that had not begun."""
    unbroken, broken, resumed = Module(), Module(), Module(seed=9)
    trainer(cut()).fit(unbroken)
    save = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(*beside(cut(), Fail(hook), side=side), save, enable_checkpointing=True).fit(broken)
    was_cut = side == 1 or hook != "on_train_epoch_start"
    assert widths(broken) == ([4, 4] if was_cut else [8, 8])
    assert len(torch.load(save.ckpt_path, weights_only=True)[KEY]) == was_cut
    assert equal(load_pruned(Module(seed=9), save.ckpt_path).state_dict(), broken.state_dict())
    trainer(cut()).fit(resumed, ckpt_path=save.ckpt_path)
    assert history_of(resumed) == history_of(unbroken)


# averages


class Shadow(Callback):
    """The average by hand: in the list behind the prune callback, whose cuts it follows."""

    def __init__(self, mix: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        self.mix, self.count, self.cuts = mix, 0, 0
        self.average: dict[str, Tensor] = {}

    def update(self, module: nn.Module) -> None:
        for name, value in weights(module).items():
            self.average[name] = self.mix(self.average[name], value, self.count) if self.count else value
        self.count += 1

    def follow(self, module: nn.Module) -> None:
        for record in history_of(module)[self.cuts :]:
            self.average = {name: kept_of(value, record, name) for name, value in self.average.items()}
            self.cuts += 1


class ShadowOfSteps(Shadow):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.follow(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.update(pl_module)


def mean(average: Tensor, value: Tensor, count: int) -> Tensor:
    return average + (value - average) / (count + 1)


def moving(average: Tensor, value: Tensor, count: int) -> Tensor:
    return 0.8 * average + 0.2 * value


AVERAGES: dict[str, tuple[Callable[[], Callback], Callable[[Tensor, Tensor, int], Tensor], Tensor | None]] = {
    "mean": (lambda: neighbours.WeightAveraging(), mean, EXAMPLE),
    "mean, no buffers": (lambda: neighbours.WeightAveraging(use_buffers=False), mean, None),
    "moving": (lambda: neighbours.EMAWeightAveraging(decay=0.8), moving, None),
    "moving, no buffers": (lambda: neighbours.EMAWeightAveraging(decay=0.8, use_buffers=False), moving, EXAMPLE),
}


@pytest.mark.skipif(not hasattr(neighbours, "EMAWeightAveraging"), reason="this Lightning has none")
@either_side
@pytest.mark.parametrize(("make", "mix", "example"), AVERAGES.values(), ids=AVERAGES)
def test_the_average_is_that_of_the_weights_that_stay(
    make: Callable[[], Callback], mix: Callable[[Tensor, Tensor, int], Tensor], example: Tensor | None, side: int
) -> None:
    module, shadow = Module(example=example), ShadowOfSteps(mix)
    gradual = PruneCallback(0.5, schedule=linear, begin=0, end=2, constants="drop")
    trainer(*beside(gradual, make(), side=side), shadow).fit(module)
    assert [record.epoch for record in history_of(module)] == [1, 2]
    assert shadow.count == 4 * STEPS
    for name, value in weights(module).items():
        torch.testing.assert_close(value, shadow.average[name], msg=name)


class ShadowOfEpochs(Shadow):
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.follow(pl_module)
        if 1 <= trainer.current_epoch < 4:
            self.update(pl_module)


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)


@either_side
@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_stochastic_weight_averaging_before_at_and_after_its_start(epoch: int, side: int) -> None:
    module, shadow = Module(), ShadowOfEpochs(mean)
    fit = trainer(*beside(cut(epoch), swa(), side=side), shadow)
    fit.fit(module)
    assert fit.current_epoch == 5  # the last one is for BatchNorm
    assert [record.epoch for record in history_of(module)] == [epoch]
    assert shadow.count == 3
    for name, value in weights(module).items():
        torch.testing.assert_close(value, shadow.average[name], msg=name)
    statistics = [layer.running_mean for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert [tuple(value.shape) for value in statistics if value is not None] == [(4,), (4,)]


@pytest.mark.filterwarnings("ignore:The schedule of PruneCallback ends at")
@pytest.mark.parametrize(("example", "side"), [(EXAMPLE, 1), (None, -1)], ids=["example", "first batch"])
def test_no_cut_falls_into_the_epoch_that_updates_batchnorm(example: Tensor | None, side: int) -> None:
    """The last event of the schedule lies just behind the fit."""
    module = Module(example=example)
    gradual = PruneCallback(0.5, schedule=linear, begin=2, end=4)
    trainer(*beside(gradual, swa(), side=side)).fit(module)
    assert [record.epoch for record in history_of(module)] == [3]


@pytest.mark.filterwarnings("ignore:The schedule of PruneCallback ends at")
@either_side
def test_no_step_is_counted_in_the_epoch_that_updates_batchnorm(side: int) -> None:
    module = Module()
    gradual = PruneCallback(0.5, schedule=linear, begin=0, end=4 * STEPS, every_n_steps=2 * STEPS)
    trainer(*beside(gradual, swa(), side=side)).fit(module)
    assert [record.step for record in history_of(module)] == [2 * STEPS]


# freezing


class Transfer(Module):
    """The head is trained from the start, the backbone once it is unfrozen."""

    def __init__(self, optimizer: Callable[..., Optimizer] = momentum) -> None:
        super().__init__(optimizer)
        self.backbone, self.head = self.net[:6], self.net[6:]
        del self.net

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def configure_optimizers(self) -> Any:
        return self._optimizer(self.head.parameters())


class InStages(BaseFinetuning):
    """Unfreezes the second half of the backbone at one epoch and the first half at the next."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch in (self.epoch, self.epoch + 1):
            part = pl_module.backbone[3:] if epoch == self.epoch else pl_module.backbone[:3]
            self.unfreeze_and_add_param_group(part, optimizer, lr=0.02)


@either_side
@pytest.mark.parametrize("epoch", [CUT - 1, CUT, CUT + 1], ids=["before", "at", "after"])
@pytest.mark.parametrize(
    ("kind", "optimizer"), [("backbone", momentum), ("stages", partial(Adam, lr=0.01))], ids=["momentum", "adam"]
)
def test_a_backbone_is_unfrozen_around_the_cut(
    optimizer: Callable[..., Optimizer], kind: str, epoch: int, side: int
) -> None:
    module, moves = Transfer(optimizer), Moves()
    was = weights(module)
    unfreeze = BackboneFinetuning(epoch, backbone_initial_lr=0.02) if kind == "backbone" else InStages(epoch)
    fit = trainer(*beside(cut(), unfreeze, side=side), moves, max_epochs=5)
    fit.fit(module)
    (record,) = history_of(module)
    assert widths(module) == [4, 4]
    first = {name for name in was if "backbone" in name}
    kept = first if kind == "backbone" else {name for name in first if int(name.split(".")[1]) < 3}
    assert set(moves.still[epoch * STEPS - 1]) == first
    assert set(moves.still[epoch * STEPS]) == (set() if kind == "backbone" else kept)
    assert moves.still[-1] == []
    held = [id(p) for group in fit.optimizers[0].param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())
    state = fit.optimizers[0].state
    assert all(v.shape == p.shape for p in module.parameters() for v in state[p].values() if v.dim())
    assert record.epoch == CUT


# searches


class Searched(Module):
    """What the searches for a learning rate and a batch size look for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.lr, self.batch_size = 0.05, 4
        self.sizes: list[int] = []

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(images().dataset, batch_size=self.batch_size)


@pytest.mark.parametrize(
    ("example", "timing"),
    [(EXAMPLE, {"begin": 0, "end": 1}), (None, {"begin": 0, "end": 13, "every_n_steps": 5})],
    ids=["epochs", "steps"],
)
@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_a_learning_rate_is_searched_before_the_fit(example: Tensor | None, timing: dict[str, Any]) -> None:
    """The search neither cuts nor uses up an event, and the fit is that without a search."""
    searched, plain = Searched(example=example), Searched(example=example)
    was = deepcopy(searched.state_dict())
    fit = trainer(MagnitudePruneCallback(0.5, **timing))
    found = Tuner(fit).lr_find(searched, num_training=20, update_attr=False)
    assert found is not None
    assert len(found.results["lr"]) == 20
    assert equal(searched.state_dict(), was)
    assert history_of(searched) == ()
    fit.fit(searched)
    trainer(MagnitudePruneCallback(0.5, **timing)).fit(plain)
    assert len(history_of(plain)) >= 1
    assert history_of(searched) == history_of(plain)
    assert equal(searched.state_dict(), plain.state_dict())


class LaterSearch(LearningRateFinder):
    def __init__(self, epoch: int) -> None:
        super().__init__(num_training_steps=8, update_attr=False)
        self.epoch = epoch

    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            # Without these two lines Lightning 2.6 searches without a single batch after the first epoch.
            trainer.fit_loop.epoch_loop.batch_progress.reset_on_run()
            trainer.fit_loop._combined_loader = None
            trainer.fit_loop.setup_data()
            self.lr_find(trainer, pl_module)


@either_side
@pytest.mark.parametrize(
    ("epoch", "of_cut", "example"),
    [(0, 0, EXAMPLE), (1, 2, None), (2, 2, EXAMPLE), (2, 2, None), (3, 2, EXAMPLE)],
    ids=["at the start", "before", "at", "at, first batch", "after"],
)
@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_a_later_search_changes_nothing_around_the_cut(
    epoch: int, of_cut: int, example: Tensor | None, side: int
) -> None:
    if older("lightning", "2.6") and epoch == 0:
        pytest.skip("lightning before 2.6: a search at the start changes the fit without any cut, too")
    searched, plain = Searched(example=example), Searched(example=example)
    search = LaterSearch(epoch)
    trainer(*beside(cut(of_cut), search, side=side)).fit(searched)
    trainer(cut(of_cut)).fit(plain)
    assert search.optimal_lr is not None
    assert len(search.optimal_lr.results["loss"]) >= 1
    assert history_of(searched) == history_of(plain)
    assert equal(searched.state_dict(), plain.state_dict())


@needs("lightning", "2.6", "searches batch sizes without a margin")
@either_side
@pytest.mark.parametrize(("mode", "example"), [("power", EXAMPLE), ("binsearch", None)], ids=["power", "binsearch"])
@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_a_batch_size_is_searched_before_the_fit(mode: str, example: Tensor | None, side: int) -> None:
    module = Searched(example=example)
    search = BatchSizeFinder(mode, steps_per_trial=1, init_val=2, max_trials=3)
    search._margin = 0.0
    fit = trainer(*beside(cut(), search, side=side))
    fit.fit(module)
    assert module.batch_size == search.optimal_batch_size == 8
    assert [(record.epoch, record.step) for record in history_of(module)] == [(CUT, CUT * STEPS)]
    assert fit.global_step == 4 * STEPS


# views


class Total(ModelSummary):
    def __init__(self) -> None:
        super().__init__()
        self.parameters: list[int] = []

    def summarize(self, summary_data: Any, total_parameters: int, *_: Any, **__: Any) -> None:  # type: ignore[override]
        self.parameters.append(total_parameters)


@either_side
def test_a_summary_counts_what_is_left(side: int) -> None:
    module, summary = Module(), Total()
    for prune in (cut(1), cut(0)):
        callbacks = beside(prune, summary, side=side)
        trainer(*callbacks, enable_model_summary=True, max_epochs=2).fit(module)
    assert summary.parameters == [716, 216]


@either_side
@pytest.mark.parametrize("kind", [ModelSummary, RichModelSummary])
def test_summaries_are_printed_beside_a_cut(
    kind: type[ModelSummary], side: int, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    module = Module()
    trainer(*beside(cut(1), kind(max_depth=2), side=side), enable_model_summary=True, max_epochs=2).fit(module)
    assert widths(module) == [4, 4]
    assert "Total params" in capsys.readouterr().out + caplog.text


@either_side
@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
def test_progress_bars_count_on_below_the_tables(kind: Any, side: int, capsys: pytest.CaptureFixture[str]) -> None:
    class Done(Callback):
        def __init__(self, bar: Any) -> None:
            self.bar, self.counts = bar, []  # type: ignore[var-annotated]

        def on_train_epoch_end(self, *_: Any) -> None:
            rich = isinstance(self.bar, RichProgressBar)
            progress = self.bar.progress.tasks[self.bar.train_progress_bar_id] if rich else self.bar.train_progress_bar
            self.counts.append(int(progress.completed if rich else progress.n))

    bar, module = kind(), Module()
    done = Done(bar)
    trainer(*beside(cut(), bar, side=side), done, enable_progress_bar=True).fit(module)
    assert widths(module) == [4, 4]
    assert done.counts == [STEPS] * 4
    printed = capsys.readouterr().out
    assert "PruneCallback, epoch 2" in printed
    assert "Epoch 3/3" in printed or kind is TQDMProgressBar


@either_side
def test_the_monitor_sees_the_rates_of_a_fit_without_a_cut(tmp_path: Path, side: int) -> None:
    seen = []
    for prunes in ([], [cut()]):
        monitor, logger = LearningRateMonitor("step", log_momentum=True), CSVLogger(tmp_path)
        module = Module(scheduler=cosine)
        trainer(*[*prunes, monitor][::side], logger=logger, log_every_n_steps=1).fit(module)
        seen.append(monitor.lrs)
        assert widths(module) == ([4, 4] if prunes else [8, 8])
    assert seen[0] == seen[1]
    assert {len(rates) for rates in seen[0].values()} == {4 * STEPS}


def cosine(optimizer: Optimizer) -> dict[str, Any]:
    return {"lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, 4 * STEPS), "interval": "step"}}
