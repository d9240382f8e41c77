"""What people see: metrics in every logger, a histogram and a picture in TensorBoard, tables in the terminal."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fits import EXAMPLE, STEPS, Module, trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_prune import history_of, prune
from lightning_prune.callbacks import MagnitudePruneCallback, PruneCallback, SparsityMonitor
from lightning_prune.masks import masks_of
from lightning_prune.report import comparison_table, count, history_table, record_table, widths_picture
from lightning_prune.schedules import linear
from lightning_prune.types import Change, PruneRecord

PARAMS = {8: 72 + 16 + 576 + 16 + 36, 6: 54 + 12 + 324 + 12 + 28, 4: 36 + 8 + 144 + 8 + 20}
"""Parameters of the small network, by the channels of its convolutions."""
MACS = {width: 36 * (9 * width + 9 * width**2) + 4 * width for width in PARAMS}


def gradual() -> PruneCallback:
    """A quarter at epoch 1, a half at epoch 2."""
    return PruneCallback(0.5, schedule=linear, begin=0, end=2)


@pytest.mark.parametrize("example", [EXAMPLE, None], ids=["example", "first batch"])
def test_metrics_are_those_of_the_network(example: Tensor | None) -> None:
    fit = trainer(gradual(), SparsityMonitor())
    fit.fit(Module(example=example))
    found = {name: float(value) for name, value in fit.callback_metrics.items() if name.startswith("prune/")}
    assert found == {
        "prune/pruning_ratio": 0.5,
        "prune/params": PARAMS[4],
        "prune/macs": MACS[4],
        "prune/channels/net.0": 4,
        "prune/channels/net.3": 4,
        "prune/channels/net.8": 4,
    }


def test_masks_are_told_with_their_sparsity(tmp_path: Path) -> None:
    masking = MagnitudePruneCallback(0.75, granularity="weights", schedule=linear, begin=0, end=3)
    logger, module = CSVLogger(tmp_path, version=0), Module()
    fit = trainer(masking, SparsityMonitor(), logger=logger, log_every_n_steps=STEPS)
    fit.fit(module)
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        told = [float(row["prune/sparsity"]) for row in csv.DictReader(file) if row["prune/sparsity"]]
    assert told == pytest.approx([0.25, 0.5, 0.75], abs=1e-2)  # nothing was masked in the first epoch
    weights = {name: weight for name, weight in module.named_parameters() if name in masks_of(module)}
    zeros = {f"prune/sparsity/{name}": float((weight == 0).float().mean()) for name, weight in weights.items()}
    assert {name: float(fit.callback_metrics[name]) for name in zeros} == pytest.approx(zeros)
    assert len(zeros) > 1


@pytest.mark.parametrize("example", [EXAMPLE, None], ids=["example", "first batch"])
def test_csv_has_a_line_for_each_epoch(tmp_path: Path, example: Tensor | None) -> None:
    logger = CSVLogger(tmp_path, version=0)
    trainer(gradual(), SparsityMonitor(), logger=logger, log_every_n_steps=STEPS).fit(Module(example=example))
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["prune/params"]]
    expected = [8, 6, 4, 4]
    assert [float(row["prune/params"]) for row in rows] == [PARAMS[width] for width in expected]
    assert [float(row["prune/macs"]) for row in rows] == [MACS[width] for width in expected]
    assert [float(row["prune/pruning_ratio"]) for row in rows] == [0, 0.25, 0.5, 0.5]
    assert [row["prune/channels/net.3"] for row in rows if row["prune/channels/net.3"]] == ["8.0", "6.0", "4.0", "4.0"]


def test_tensorboard_gets_scalars_histogram_and_picture(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, version=0)
    trainer(gradual(), SparsityMonitor(), logger=logger, log_every_n_steps=STEPS).fit(Module())
    events = EventAccumulator(
        str(tmp_path / "lightning_logs" / "version_0"), size_guidance={"images": 0, "histograms": 0}
    )
    events.Reload()
    tags = events.Tags()
    assert {"prune/pruning_ratio", "prune/params", "prune/macs", "prune/channels/net.0"} <= set(tags["scalars"])
    assert [point.value for point in events.Scalars("prune/params")] == [PARAMS[width] for width in (8, 6, 4, 4)]
    assert tags["histograms"] == ["prune/bn_scales"]
    assert [round(point.histogram_value.num) for point in events.Histograms("prune/bn_scales")] == [16, 12, 8, 8]
    assert set(tags["images"]) == {"prune/groups", "prune/widths"}
    assert [point.step for point in events.Images("prune/widths")] == [2 * STEPS, 3 * STEPS]  # one for each cut


def test_several_loggers_at_once(tmp_path: Path) -> None:
    loggers: list[Any] = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    fit = trainer(gradual(), SparsityMonitor(), logger=loggers, log_every_n_steps=STEPS)
    fit.fit(Module())
    assert float(fit.callback_metrics["prune/pruning_ratio"]) == 0.5
    assert list(tmp_path.rglob("metrics.csv"))
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_other_callbacks_can_watch_the_metrics(tmp_path: Path) -> None:
    stop = EarlyStopping("prune/params", stopping_threshold=PARAMS[6] + 1, check_on_train_epoch_end=True)
    keep = ModelCheckpoint(tmp_path, monitor="prune/macs", filename="best")
    fit = trainer(gradual(), SparsityMonitor(), stop, keep, enable_checkpointing=True)
    fit.fit(Module())
    assert fit.current_epoch == 2
    assert float(keep.best_model_score) == MACS[6]


def test_a_network_without_batchnorm(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4))
    logger = TensorBoardLogger(tmp_path, version=0)
    trainer(gradual(), SparsityMonitor(), logger=logger, log_every_n_steps=STEPS).fit(Module(net=net))
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    assert events.Tags()["histograms"] == []
    assert set(events.Tags()["images"]) == {"prune/groups", "prune/widths"}


def test_monitor_alone_and_fast_dev_run() -> None:
    fit = pl.Trainer(
        fast_dev_run=True, accelerator="cpu", callbacks=[SparsityMonitor(), gradual()], enable_progress_bar=False
    )
    fit.fit(Module())
    assert fit.state.finished


def test_a_monitor_goes_on_after_resuming(tmp_path: Path) -> None:
    first = trainer(gradual(), SparsityMonitor(), max_epochs=4)
    first.fit(Module())
    first.save_checkpoint(tmp_path / "net.ckpt")
    fit = trainer(gradual(), SparsityMonitor(), max_epochs=5)
    fit.fit(Module(), ckpt_path=tmp_path / "net.ckpt")
    assert float(fit.callback_metrics["prune/params"]) == PARAMS[4]
    assert float(fit.callback_metrics["prune/macs"]) == MACS[4]


# tables


def text(table: Table, width: int = 200) -> str:
    console = Console(record=True, width=width, file=StringIO())
    console.print(table)
    return console.export_text()


def record() -> PruneRecord:
    module = Module()
    return prune(module, EXAMPLE, pruning_ratio=0.75, min_channels=3)


def test_a_record_as_a_table() -> None:
    shown = text(record_table(record(), "Slimming"))
    assert "Slimming: asked 75.0% of channels, reached 62.5%" in shown
    for part in (
        "net.0",
        "net.3",
        "net.8",
        "parameters",
        "MACs",
        "dense",
        "before",
        "after",
        "removed",
        "held back by",
    ):
        assert part in shown
    assert "keeps 3 channels in place of 2: min_channels=3" in shown
    assert "frozen: reaches the model's output" in shown
    (row,) = [line for line in shown.splitlines() if "net.0" in line]
    assert row.replace("│", " ").split()[:5] == ["net.0", "8", "8", "3", "62.5%"]


def test_a_narrow_terminal_folds_the_reasons() -> None:
    shown = text(record_table(record()), width=80)
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "min_channels=3" in shown.replace("\n", "")


def test_a_history_as_a_table() -> None:
    module = Module()
    trainer(gradual()).fit(module)
    shown = text(history_table(history_of(module)))
    rows = [line.replace("│", " ").split() for line in shown.splitlines() if "channels" in line]
    assert [row[:2] for row in rows] == [["1", str(STEPS)], ["2", str(2 * STEPS)]]
    assert rows[1][2:6] == ["50.0%", "of", "channels", "50.0%"]
    assert rows[1][6] == str(PARAMS[4])
    assert rows[1][-3:] == [f"{1 - MACS[4] / MACS[8]:.1%}", "of", "MACs"]


def test_a_long_history_is_told_by_its_ends() -> None:
    net = nn.Sequential(nn.Linear(4, 30), nn.Linear(30, 2))
    records = [prune(net, torch.zeros(1, 4), pruning_ratio=(at + 1) / 30) for at in range(25)]
    table = history_table(records)
    assert table.row_count == 21
    assert list(table.columns[3].cells)[9:12] == ["33.3%", "...", "53.3%"]
    assert history_table(records[:20]).row_count == 20


def test_a_cut_without_a_trainer_has_no_epoch() -> None:
    shown = text(history_table([record()]))
    assert "75.0% of channels" in shown
    assert "None" not in shown


def test_a_comparison_as_a_table() -> None:
    shown = text(comparison_table({"accuracy": ("98.1%", "97.9%"), "latency": ("4 ms", "2 ms")}, "Digits"))
    for part in ("Digits", "dense", "pruned", "accuracy", "98.1%", "97.9%", "latency", "2 ms"):
        assert part in shown


def test_tables_are_printed_where_the_progress_bar_is(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(gradual()).fit(Module())
    assert "Prune events" not in capsys.readouterr().out
    trainer(gradual(), enable_progress_bar=True).fit(Module())
    shown = capsys.readouterr().out
    assert "PruneCallback, epoch 1: asked 25.0% of channels, reached 25.0%" in shown.replace("\n", " ")
    assert "Prune events" in shown


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0"), (9999, "9999"), (10_000, "10 k"), (123_456, "123 k"), (11_689_512, "11.7 M"), (4.1e9, "4.1 G")],
)
def test_counts_in_words(number: float, words: str) -> None:
    assert count(number) == words


@pytest.mark.parametrize("number", [999_999, 999_700, 999_950_000])
def test_counts_just_below_a_unit(number: int) -> None:
    assert "e+" not in count(number)


def test_the_picture_shows_a_bar_for_each_group() -> None:
    one = widths_picture({"a": Change(8, 8, 4)})
    two = widths_picture(
        {"a": Change(8, 8, 4), "b.with.a.very.long.name.that.does.not.fit.in.here": Change(16, 16, 16)}
    )
    assert one.dtype == np.uint8
    assert one.shape[2] == two.shape[2] == 3
    assert two.shape[0] > one.shape[0]
    full, pale = (torch.from_numpy(one.copy()) == torch.tensor(colour) for colour in ((38, 110, 180), (205, 212, 222)))
    ratio = full.all(-1).sum() / (full.all(-1).sum() + pale.all(-1).sum())
    assert float(ratio) == pytest.approx(0.5, abs=0.01)


def test_a_picture_of_nothing() -> None:
    assert widths_picture({}).ndim == 3
