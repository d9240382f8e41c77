"""The monitor of channels' health in real fits: what it logs, what it draws, and what it leaves alone."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_prune.callbacks import ChannelHealthMonitor, MagnitudePruneCallback
from lightning_prune.charts import curve_picture, tiles_picture
from lightning_prune.errors import PruningError
from lightning_prune.metrics import CumulativeAblationCurve, InhibitedChannels
from lightning_prune.workbench import Classifier


def images(seed: int, examples: int = 16) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    data = TensorDataset(torch.randn(examples, 1, 6, 6, generator=generator), torch.arange(examples) % 4)
    return DataLoader(data, batch_size=8)


def module(*, norms: bool = True) -> Classifier:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8) if norms else nn.Identity()
    net = nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    if norms:
        norm.bias.data[:3] = -9.0
    return Classifier(net, 4, optimizer=partial(torch.optim.SGD, lr=0.01), example=torch.zeros(2, 1, 6, 6))


def trainer(folder: Path, *callbacks: pl.Callback, epochs: int = 2, **settings: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    return pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), default_root_dir=folder, **(quiet | settings))


class Sizes(pl.Callback):
    """Notes how many epochs the monitor has seen by the end of the sanity check."""

    def __init__(self, monitor: ChannelHealthMonitor) -> None:
        self.monitor = monitor
        self.seen: list[int] = []

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append(len(self.monitor.epochs))


def test_what_is_logged_is_what_the_metric_measures(tmp_path: Path) -> None:
    monitor, model = ChannelHealthMonitor(), module()
    sizes, logger = Sizes(monitor), CSVLogger(tmp_path)
    fit = trainer(tmp_path, monitor, sizes, logger=logger)
    fit.fit(model, images(0), images(1))
    metric = InhibitedChannels()
    for batch, _ in images(1):
        metric.update(model, batch)
    assert float(metric.compute()) == 3 / 8
    logged = fit.callback_metrics
    assert float(logged["health/inhibited"]) == 3 / 8
    assert float(logged["health/inhibited/net.1"]) == 3 / 8
    assert float(logged["health/activity/net.1"]) == pytest.approx(float(metric.activities()["net.1"].mean()))
    assert sizes.seen == [0], "the sanity check does not count"
    assert (monitor.epochs, monitor.shares) == ([0, 1], {"net.1": [3 / 8, 3 / 8]})
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["health/inhibited"]]
    assert len(rows) == 2
    assert not any(each._forward_hooks for each in model.modules())


def test_pictures_in_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    curve = CumulativeAblationCurve((0.0, 0.5, 1.0), orders=2)
    trainer(tmp_path, ChannelHealthMonitor(ablation=curve), logger=logger).fit(module(), images(0), images(1))
    board = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    board.Reload()
    assert set(board.Tags()["images"]) == {"health/inhibited", "health/ablation"}
    assert len(board.Images("health/inhibited")) == 2
    (area,) = board.Scalars("health/ablation_area")
    assert area.value == pytest.approx(float(curve.area()))


@pytest.mark.parametrize(
    ("own", "validations", "told"), [(2, 1, [1, 3, 5]), (2, 2, [1, 3, 5]), (2, 3, [5]), (3, 2, [5]), (1, 4, [3])]
)
def test_every_n_epochs(tmp_path: Path, own: int, validations: int, told: list[int]) -> None:
    monitor, logger = ChannelHealthMonitor(every_n_epochs=own), CSVLogger(tmp_path)
    fit = trainer(tmp_path, monitor, epochs=6, check_val_every_n_epoch=validations, logger=logger)
    fit.fit(module(), images(0), images(1))
    assert monitor.epochs == told
    with Path(logger.log_dir, "metrics.csv").open() as file:
        logged = [int(row["epoch"]) for row in csv.DictReader(file) if row["health/inhibited"]]
    assert logged == told


def test_the_sanity_check_does_not_count(tmp_path: Path) -> None:
    """Neither is it logged, nor do its batches, twice as many as those of a validation, enter the first one."""

    class Sanity(pl.Callback):
        seen: dict[str, Any]

        def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.seen = {**trainer.callback_metrics, **trainer.logged_metrics}

    monitor, sanity, model = ChannelHealthMonitor(), Sanity(), module()
    fit = trainer(tmp_path, monitor, sanity, epochs=1, num_sanity_val_steps=2, limit_val_batches=1)
    fit.fit(model, images(0), images(1))
    assert not [name for name in sanity.seen if name.startswith("health/")]
    assert (monitor.epochs, int(monitor.metric.count)) == ([0], 8 * 4 * 4)


class Branches(pl.LightningModule):
    """Each validation loader goes through a branch of its own, and the second from its second epoch on."""

    def __init__(self, shifts: tuple[float, float] = (-9.0, 9.0)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(36, 4)) for _ in shifts)
        for branch, shift in zip(self.branches, shifts, strict=True):
            branch[0].bias.data.fill_(shift)  # type: ignore[index]

    def forward(self, x: Tensor, at: int = 0) -> Tensor:
        logits: Tensor = self.branches[at](x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]) + self(batch[0], 1), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0], min(dataloader_idx, self.current_epoch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_validation_loaders_that_run_other_layers(tmp_path: Path) -> None:
    monitor, logger = ChannelHealthMonitor(), TensorBoardLogger(tmp_path)
    fit = trainer(tmp_path, monitor, logger=logger)
    fit.fit(Branches(), images(0), [images(1), images(2)])
    first, second = "branches.0.0", "branches.1.0"
    assert monitor.shares[first] == [1.0, 1.0]
    assert math.isnan(monitor.shares[second][0])
    assert monitor.shares[second][1:] == [0.0]
    assert float(fit.callback_metrics["health/inhibited"]) == 0.5
    assert float(fit.callback_metrics[f"health/inhibited/{second}"]) == 0.0


class OneBranchEach(Branches):
    """Each rank runs a branch of its own, and the second rank none in the first epoch."""

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.global_rank <= self.current_epoch:
            self(batch[0], self.global_rank)

    def on_fit_start(self) -> None:
        warnings.filterwarnings("error", "It is recommended to use `self.log")

    def on_fit_end(self) -> None:
        (monitor,) = (each for each in self.trainer.callbacks if isinstance(each, ChannelHealthMonitor))  # type: ignore[attr-defined]
        told = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        torch.save((monitor.shares, told), Path(self.trainer.default_root_dir) / f"{self.global_rank}.pt")


@pytest.mark.slow
def test_ranks_that_hear_other_layers_or_none(tmp_path: Path) -> None:
    fit = trainer(tmp_path, ChannelHealthMonitor(), strategy="ddp_spawn", devices=2, num_sanity_val_steps=0)
    fit.fit(OneBranchEach(), images(0), images(1))
    for rank in range(2):
        shares, told = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert shares["branches.0.0"] == [1.0, 1.0]
        assert math.isnan(shares["branches.1.0"][0])
        assert shares["branches.1.0"][1:] == [0.0]
        assert told["health/inhibited"] == 0.5


def test_a_layer_that_is_gone_keeps_its_past(tmp_path: Path) -> None:
    class Leaves(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                pl_module.net[1] = nn.Identity()  # type: ignore[index,operator]

    monitor, model = ChannelHealthMonitor(), module()
    model.net.append(nn.BatchNorm1d(4))
    trainer(tmp_path, monitor, Leaves(), logger=TensorBoardLogger(tmp_path)).fit(model, images(0), images(1))
    gone = monitor.shares["net.1"]
    assert (gone[0], math.isnan(gone[1]), len(monitor.shares["net.6"])) == (3 / 8, True, 2)


def test_history_of_the_picture_resumes(tmp_path: Path) -> None:
    first, again = ChannelHealthMonitor(), ChannelHealthMonitor()
    fit = trainer(tmp_path, first)
    fit.fit(module(), images(0), images(1))
    fit.save_checkpoint(tmp_path / "two.ckpt")
    trainer(tmp_path, again, epochs=3).fit(module(), images(0), images(1), ckpt_path=tmp_path / "two.ckpt")
    assert again.epochs == [0, 1, 2]
    assert [len(shares) for shares in again.shares.values()] == [3]


def test_it_goes_on_after_a_cut(tmp_path: Path) -> None:
    monitor, prune = ChannelHealthMonitor(), MagnitudePruneCallback(0.5, of="channels", begin=1, end=1)
    model = module()
    trainer(tmp_path, monitor, prune, epochs=3).fit(model, images(0), images(1))
    assert model.net[1].num_features == 4
    assert monitor.epochs == [0, 1, 2]


def test_it_does_not_change_the_fit(tmp_path: Path) -> None:
    plain, watched = module(), module()
    trainer(tmp_path).fit(plain, images(0), images(1))
    curve = CumulativeAblationCurve((0.0, 0.5), orders=2)
    trainer(tmp_path, ChannelHealthMonitor(ablation=curve)).fit(watched, images(0), images(1))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name


def test_ablation_draws_no_random_numbers(tmp_path: Path) -> None:
    def state_after(*callbacks: pl.Callback) -> Tensor:
        torch.manual_seed(0)
        trainer(tmp_path, *callbacks).fit(module(), images(0), images(1))  # each pass over a loader draws a number
        return torch.random.get_rng_state()

    curve = CumulativeAblationCurve((0.0, 0.5), orders=2)
    assert torch.equal(state_after(), state_after(ChannelHealthMonitor(ablation=curve)))


def test_ablation_reads_all_validation_loaders(tmp_path: Path) -> None:
    curve = CumulativeAblationCurve((0.0, 1.0), orders=1, layers=["branches.0.0"])
    monitor = ChannelHealthMonitor(ablation=curve, ablation_batches=2)
    model, loaders = Branches(), [images(1, 32), images(2, 8)]
    trainer(tmp_path, monitor, epochs=1).fit(model, images(0), loaders)
    own = CumulativeAblationCurve((0.0, 1.0), orders=1, layers=["branches.0.0"])
    for x, targets in (*list(loaders[0])[:2], *loaders[1]):
        own.update(model, x, targets)
    assert int(curve.count) == 8 + 8 + 8
    assert torch.equal(curve.compute(), own.compute())


class Stream(IterableDataset[Any]):
    """A data set without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(images(1).dataset)


def test_ablation_on_a_stream_reads_no_more_than_the_validation(tmp_path: Path) -> None:
    curve = CumulativeAblationCurve((0.0, 0.5), orders=1)
    fit = trainer(tmp_path, ChannelHealthMonitor(ablation=curve), limit_val_batches=1, epochs=1)
    fit.fit(module(), images(0), DataLoader(Stream(), batch_size=8))
    assert int(curve.count) == 8


class Notes(nn.Module):
    """Notes how its input comes, and whether autocast is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return x


@pytest.mark.parametrize(
    ("precision", "told"), [("bf16-true", (torch.bfloat16, False)), ("bf16-mixed", (torch.float32, True))]
)
def test_ablation_runs_in_the_precision_of_the_fit(
    tmp_path: Path, precision: str, told: tuple[torch.dtype, bool]
) -> None:
    curve, model, notes = CumulativeAblationCurve((0.0, 0.5), orders=1), module(), Notes()
    model.net.insert(0, notes)
    monitor = ChannelHealthMonitor(ablation=curve)
    trainer(tmp_path, monitor, precision=precision).fit(model, images(0), images(1))
    assert set(notes.seen) == {told}
    assert len(notes.seen) >= 2 * 2 * 2 + 2 + 2 * 2, "training, validation, and the curve's two fractions"
    assert curve.compute().dtype == torch.float32
    assert float(curve.compute()[0, 0]) == pytest.approx(accuracy(model, precision))
    assert monitor.shares == {"net.2": [3 / 8, 3 / 8]}


def accuracy(model: Classifier, precision: str) -> float:
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    model.to(dtype).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        right = [model(x.to(dtype)).argmax(1) == targets for x, targets in images(1)]
    return float(torch.cat(right).float().mean())


def test_other_validations_leave_the_picture_alone(tmp_path: Path) -> None:
    monitor, model = ChannelHealthMonitor(), module()
    fit = trainer(tmp_path, monitor)
    told = fit.validate(model, images(1), verbose=False)
    assert told[0]["health/inhibited"] == 3 / 8
    assert monitor.epochs == []


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_without_validation_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="listens to the validation, and there is none"):
        trainer(tmp_path, ChannelHealthMonitor()).fit(module(), images(0))


def test_without_norms_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(PruningError, match="has no norms behind which"):
        trainer(tmp_path, ChannelHealthMonitor()).fit(module(norms=False), images(0), images(1))


@pytest.mark.parametrize("name", ["every_n_epochs", "ablation_batches"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_bad_arguments(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is 1 or more; got {value}"):
        ChannelHealthMonitor(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_bad_thresholds(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"`threshold` is the activity below .* got {threshold}"):
        ChannelHealthMonitor(threshold)


def test_layers_that_return_several_tensors_are_refused_in_words(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.lstm(x)[0]
            return y

    model = module()
    model.net.insert(5, Recurrent())
    with pytest.raises(PruningError, match=r"The layer 'net.5.lstm' .LSTM. returns a tuple; name a layer"):
        trainer(tmp_path, ChannelHealthMonitor(layers=["*.lstm"])).fit(model, images(0), images(1))
    assert not any(each._forward_hooks for each in model.modules())


def test_tiles_are_redder_where_more_is_inhibited() -> None:
    picture = tiles_picture({"pale": [0.0, 0.0], "full": [1.0, 1.0]}, [0, 1], "title")
    assert picture.shape[2] == 3
    pale, full = picture[34 + 7, 250 + 10], picture[34 + 18 + 7, 250 + 10]
    assert int(pale[1]) - int(full[1]) > 100


def test_the_band_spans_all_curves() -> None:
    curves = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64).numpy()
    picture = curve_picture([0.0, 1.0], curves, "title")
    column = torch.from_numpy(picture[44:324, 56 + 470].astype("int64"))
    coloured: Tensor = (column[:, 0] - column[:, 2]) > 20
    assert float(coloured.float().mean()) > 0.9
    left = torch.from_numpy(picture[44:324, 56 + 20].astype("int64"))
    assert float(((left[:, 0] - left[:, 2]) > 20).float().mean()) < 0.2


def ink(picture: Any) -> Any:
    """Where a picture is dark, as its letters are."""
    return picture.max(2) < 160


def test_the_columns_are_named_and_the_last_name_ends_with_its_tile() -> None:
    columns = [8, 9, 10, 11, 12345]
    plain = tiles_picture({"row": [0.0] * 5}, columns, "title")
    named = tiles_picture({"row": [0.0] * 5}, columns, "title", axes=("epoch", "layer"))
    right, bottom = 250 + 5 * 28, 34 + 18
    numbers = ink(plain)[bottom + 2 : bottom + 18].any(0).nonzero()[0]
    assert numbers[0] - 250 <= 3, "the first begins with its tile"
    assert 0 <= right - numbers[-1] <= 5, "the last ends with its own"
    assert not ink(plain)[bottom + 18 :].any()
    names = ink(named)[bottom + 18 :].any(0).nonzero()[0]
    below_rows, below_tiles = names[names < 250], names[names >= 250]
    assert len(below_rows) > 10
    assert abs((below_tiles[0] + below_tiles[-1]) / 2 - (250 + right) / 2) <= 3, "in the middle"
    assert (named[:bottom] == plain[:bottom]).all()


def test_a_place_without_a_value_stays_blank() -> None:
    picture = tiles_picture({"late": [math.nan, 1.0], "gone": [1.0, math.nan]}, [0, 1], "title")
    blank, full = picture[34 + 7, [250 + 10, 250 + 38]]
    assert (blank == 255).all()
    assert full[1] < 100
    assert ink(picture)[34 : 34 + 15, 250 + 58 :].any(), "the last value of the first row"
    assert (picture[34 + 18 : 34 + 33, 250 + 58 :] == 255).all(), "the second row has none"


def test_a_single_epoch_is_named_once() -> None:
    one = tiles_picture({"row": [0.0]}, [7], "title")
    two = tiles_picture({"row": [0.0, 0.0]}, [7, 7], "title")
    assert 2 * ink(one)[34 + 18 :].sum() == ink(two)[34 + 18 :].sum()


def test_the_axes_of_the_curve_are_named() -> None:
    curves = torch.tensor([[1.0, 0.0]], dtype=torch.float64).numpy()
    plain = curve_picture([0.0, 1.0], curves, "title")
    named = curve_picture([0.0, 1.0], curves, "title", axes=("share of channels silenced", "accuracy"))
    differs = (plain != named).any(2)
    assert differs[:44].any()
    assert not differs[44 : 44 + 280 + 20].any(), "above the curve and below its ticks"
    assert not (ink(plain) & differs).any(), "over nothing else"
    below = differs[44 + 280 :].any(0).nonzero()[0]
    assert abs((below[0] + below[-1]) / 2 - (56 + 240)) <= 3
