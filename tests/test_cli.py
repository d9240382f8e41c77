"""The Hydra application from outside: one run, a sweep, and wrong arguments."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_prune.cli.building import experiment_from


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightning_prune", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    done = run(folder, "experiment=smoke", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    assert "Dense against pruned" in done.stdout
    return folder / "out"


def test_a_run_leaves_a_summary(one_run: Path) -> None:
    summary = json.loads((one_run / "summary.json").read_text())
    assert summary["params"]["pruned"] < summary["params"]["dense"] == 131_080
    assert summary["macs"]["pruned"] < summary["macs"]["dense"]
    assert set(summary["latency_ms"]["batch_1"]) == {"dense", "pruned"}
    (event,) = summary["events"]
    assert (event["epoch"], event["of"], event["asked"]) == (1, "channels", 0.3)
    assert event["reached"] == pytest.approx(0.3, abs=0.01)
    assert event["macs"] == {"before": summary["macs"]["dense"], "after": summary["macs"]["pruned"]}
    assert summary["widths"]["net.conv1"]["pruned"] < summary["widths"]["net.conv1"]["dense"] == 20
    assert "scales" not in summary, "a LeNet has no BatchNorm"
    accuracy = summary["accuracy"]
    assert len(accuracy["val_after_cut"]) == 1
    assert all(0 <= value <= 1 for value in (accuracy["dense"], accuracy["end"], accuracy["val_before_cut"]))


def test_a_run_leaves_its_config_and_metrics(one_run: Path) -> None:
    assert "BNSlimmingCallback" not in (one_run / "config.yaml").read_text()
    assert "MagnitudePruneCallback" in (one_run / "config.yaml").read_text()
    rows = list(csv.DictReader((one_run / "csv" / "metrics.csv").read_text().splitlines()))
    ratios = [float(row["prune/pruning_ratio"]) for row in rows if row["prune/pruning_ratio"]]
    assert ratios == [0.0, pytest.approx(0.3, abs=0.01)]


def test_a_run_leaves_a_tensorboard_log(one_run: Path) -> None:
    events = EventAccumulator(str(one_run / "tensorboard"))
    events.Reload()
    assert {"prune/params", "prune/macs", "prune/channels/net.conv1"} <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {"prune/groups", "prune/widths"}


def test_a_sweep_leaves_a_folder_for_each_run(tmp_path: Path) -> None:
    overrides = ["schedule=one_shot,cubic", "method.pruning_ratio=0.3,0.5", "schedule.begin=0", "dense_twin=false"]
    done = run(tmp_path, "--multirun", "experiment=smoke", *overrides, "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("sweep/*/summary.json")]
    asked = {(summary["choices"]["schedule"], summary["events"][-1]["asked"]) for summary in summaries}
    assert asked == {("one_shot", 0.3), ("one_shot", 0.5), ("cubic", 0.3), ("cubic", 0.5)}


@pytest.fixture
def _clean_hydra() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("method.pruning_ratio=1.5", "`pruning_ratio` is the fraction of channels to remove, in [0, 1); got 1.5"),
        ("method.of=flops", "`of` is what the ratio counts"),
        ("criterion=random", "Use method=prune to choose one"),
        ("schedule.begin=7 schedule.end=9", "max_epochs=2"),
        ("schedule.begin=1 schedule.end=0", "0 <= begin <= end"),
        ("method=slimming", "BNSlimmingCallback needs BatchNorm scales"),
        ("method.ignore=[nothing]", "'nothing' matches no module"),
        ("data=mnist data.root=nowhere", "nowhere"),
    ],
)
@pytest.mark.usefixtures("_clean_hydra")
def test_wrong_arguments_are_refused_in_words(tmp_path: Path, arguments: str, words: str) -> None:
    overrides = ["experiment=smoke", "dense_twin=false", f"hydra.runtime.output_dir={tmp_path}", *arguments.split()]
    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        config = compose("config", overrides=overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with pytest.raises(Exception, match=re.escape(words)):
        experiment_from(config).run()


def test_an_unknown_choice_lists_the_known_ones(tmp_path: Path) -> None:
    done = run(tmp_path, "model=resnet19")
    assert done.returncode != 0
    assert "resnet20" in done.stderr + done.stdout
