"""The same values in every logger: what a fit logs, and what an experiment tells in the end."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fits import STEPS, Module, trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_prune.callbacks import MagnitudePruneCallback, PruneCallback, SparsityMonitor
from lightning_prune.schedules import linear
from lightning_prune.workbench.final_figures import log_final_figures

SUMMARY: dict[str, Any] = {
    "accuracy": {"dense": 0.9, "end": 0.8},
    "params": {"dense": 100, "pruned": 40},
    "macs": {"dense": 1000, "pruned": 300},
    "latency_ms": {"batch_1": {"dense": 2.0, "pruned": 1.5}},
}
HPARAMS = {"method": "slimming", "seed": 3, "criterion": None}
FINAL = {
    "final/dense_accuracy": 0.9,
    "final/end_accuracy": 0.8,
    "final/params": 40.0,
    "final/macs": 300.0,
    "final/latency_ms/batch_1": 1.5,
}


def fitted(logger: Logger) -> dict[str, float]:
    """Cut in a fit, tell the end, and return what the fit itself holds."""
    cutting = PruneCallback(0.5, schedule=linear, begin=0, end=2)
    fit = trainer(cutting, SparsityMonitor(), logger=logger, log_every_n_steps=STEPS)
    fit.fit(Module())
    log_final_figures([logger], HPARAMS, SUMMARY)
    return {name: float(value) for name, value in fit.callback_metrics.items() if name.startswith("prune/")}


def test_csv(tmp_path: Path) -> None:
    told = fitted(CSVLogger(tmp_path, name=None, version="csv"))
    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").read_text().splitlines()))
    last = {name: [float(row[name]) for row in rows if row[name]][-1] for name in [*told, *FINAL]}
    assert last == {**told, **FINAL}
    assert "method: slimming" in (tmp_path / "csv" / "hparams.yaml").read_text()


def test_tensorboard(tmp_path: Path) -> None:
    told = fitted(TensorBoardLogger(tmp_path, name=None, version="board"))
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for name, value in {**told, **FINAL}.items():
        assert events.Scalars(name)[-1].value == pytest.approx(value)
    assert "prune/bn_scales" in events.Tags()["histograms"]
    assert {"prune/widths", "prune/groups"} <= set(events.Tags()["images"])


def test_tensorboard_compares_a_sweep(tmp_path: Path) -> None:
    """What the HPARAMS tab reads: values of this run, and the metrics to compare by."""
    log_final_figures([TensorBoardLogger(tmp_path, name=None, version="board")], HPARAMS, SUMMARY)
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert (values["method"].string_value, values["seed"].number_value) == ("slimming", 3)
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == set(FINAL)


def test_masks_are_drawn(tmp_path: Path) -> None:
    masking = MagnitudePruneCallback(0.75, granularity="weights", schedule=linear, begin=0, end=3)
    board = TensorBoardLogger(tmp_path, name=None, version="board")
    trainer(masking, SparsityMonitor(), logger=board, log_every_n_steps=STEPS).fit(Module())
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    pictures = events.Images("prune/mask_density")
    assert pictures[-1].width >= pictures[0].width


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_loggers import fitted
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
import json
logger = {logger}
told = fitted(logger)
{after}
print(json.dumps(told))
"""


def in_a_process(folder: Path, logger: str, after: str = "", **environment: str) -> dict[str, float]:
    """Loggers that start threads and change settings of the process get one of their own."""
    code = SCRIPT.format(tests=str(Path(__file__).parent), logger=logger, after=after)
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.slow
def test_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed")
    logger = 'MLFlowLogger("cuts", tracking_uri="file:./runs")'
    told = in_a_process(tmp_path, logger, MLFLOW_ALLOW_FILE_STORE="true")
    (metrics,) = tmp_path.glob("runs/*/*/metrics")
    for name, value in {**told, **FINAL}.items():
        assert float((metrics / name).read_text().splitlines()[-1].split()[1]) == pytest.approx(value)
    assert (metrics.parent / "params" / "method").read_text() == "slimming"


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed")
    after = (
        "summary = {name: logger.experiment.summary[name] for name in [*told, 'final/macs']}\n"
        "told = {'summary': summary, 'told': told, 'method': logger.experiment.config['method']}\n"
        "logger.experiment.finish()"
    )
    found: Any = in_a_process(tmp_path, 'WandbLogger(offline=True, save_dir=".")', after, WANDB_SILENT="true")
    assert found["summary"] == pytest.approx({**found["told"], "final/macs": 300.0})
    assert found["method"] == "slimming"
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
