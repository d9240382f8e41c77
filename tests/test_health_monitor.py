"""The monitor of channels' health in real fits: what it logs, what it draws, and what it leaves alone."""

from __future__ import annotations

import csv
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
from torch.utils.data import DataLoader, TensorDataset

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


def test_every_n_epochs(tmp_path: Path) -> None:
    monitor = ChannelHealthMonitor(every_n_epochs=2)
    trainer(tmp_path, monitor, epochs=4).fit(module(), images(0), images(1))
    assert monitor.epochs == [1, 3]


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
def test_bad_arguments(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is 1 or more; got 0"):
        ChannelHealthMonitor(**{name: 0})  # type: ignore[arg-type]


def test_tiles_are_redder_where_more_is_inhibited() -> None:
    picture = tiles_picture({"pale": [0.0, 0.0], "full": [1.0, 1.0]}, [0, 1], "title")
    assert picture.shape[2] == 3
    pale, full = picture[34 + 7, 250 + 10], picture[34 + 18 + 7, 250 + 10]
    assert int(pale[1]) - int(full[1]) > 100


def test_the_band_spans_all_curves() -> None:
    curves = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64).numpy()
    picture = curve_picture([0.0, 1.0], curves, "title")
    column = torch.from_numpy(picture[36:316, 56 + 470].astype("int64"))
    coloured: Tensor = (column[:, 0] - column[:, 2]) > 20
    assert float(coloured.float().mean()) > 0.9
    left = torch.from_numpy(picture[36:316, 56 + 20].astype("int64"))
    assert float(((left[:, 0] - left[:, 2]) > 20).float().mean()) < 0.2
