"""The Hydra application on a trained network: `lightning-prune method=lasso ckpt_path=...`, trained on or not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import equal
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from test_cli import run

from lightning_prune import history_of, load_pruned, save_pruned
from lightning_prune.cli.building import classifier_from, experiment_from
from lightning_prune.errors import HistoryError
from lightning_prune.workbench import Classifier, Experiment

QUICK = [
    "model=lenet5",
    "trainer=cpu",
    "logger=csv",
    "latency_batches=[1]",
    "trainer.enable_progress_bar=false",
]

# lightning, where a fit of no epochs is asked for
pytestmark = pytest.mark.filterwarnings("ignore:`Trainer.fit` stopped")


def config(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        arguments = [*QUICK, f"hydra.runtime.output_dir={folder}", *overrides]
        found = compose("config", overrides=arguments, return_hydra_config=True)
    HydraConfig.instance().set_config(found)
    return found


def experiment(folder: Path, *overrides: str) -> Experiment:
    return experiment_from(config(folder, *overrides))


def quoted(path: Path) -> str:
    return f"ckpt_path='{path}'"


def dense_from(chosen: DictConfig, epochs: int) -> tuple[Classifier, pl.Trainer]:
    """Train a network, and test it."""
    data = instantiate(chosen.data)
    module = classifier_from(chosen, data)
    made = instantiate(chosen.trainer, logger=False, max_epochs=epochs, enable_checkpointing=False)
    made.fit(module, data)
    made.test(module, data, verbose=False)
    return module, made


@pytest.fixture(autouse=True)
def _clean_hydra() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint, as a Trainer saves it, of a network that has learnt the digits, and its test accuracy."""
    folder = tmp_path_factory.mktemp("dense")
    module, made = dense_from(config(folder), epochs=4)
    made.save_checkpoint(folder / "epoch=3.ckpt")  # an equals sign, as Lightning's names have it
    return {"path": folder / "epoch=3.ckpt", "accuracy": float(made.callback_metrics["test/acc"]), "module": module}


def test_a_run_without_training(trained: dict[str, Any], tmp_path: Path) -> None:
    chosen = ["method=lasso", "trainer.max_epochs=0", quoted(trained["path"]), "hydra.run.dir=out"]
    done = run(tmp_path, *QUICK, "trainer.enable_progress_bar=true", *chosen)
    assert done.returncode == 0, done.stderr
    assert "Dense against pruned" in done.stdout
    assert "Reconstructed" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    accuracy = summary["accuracy"]
    assert trained["accuracy"] > 0.8
    assert accuracy["dense"] == pytest.approx(trained["accuracy"], abs=1e-6)
    assert accuracy["end"] > accuracy["dense"] - 0.05
    assert accuracy["val_before_cut"] is None
    assert len(accuracy["val_after_cut"]) == 1
    (event,) = summary["events"]
    assert (event["epoch"], event["of"], event["asked"]) == (None, "macs", 0.5)
    assert event["reached"] == pytest.approx(0.5, abs=0.03)
    assert summary["macs"]["pruned"] <= 0.5 * summary["macs"]["dense"] == 268_500
    assert set(summary["seconds"]) == {"dense", "pruned"}
    assert "LassoPruneCallback" in (tmp_path / "out" / "config.yaml").read_text()


def test_the_cut_network_of_such_a_run_can_be_loaded(trained: dict[str, Any], tmp_path: Path) -> None:
    settings = ["method=lasso", "trainer.max_epochs=0", "dense_twin=false", quoted(trained["path"])]
    summary = experiment(tmp_path, *settings).run()
    assert "dense" not in summary["accuracy"]
    chosen = config(tmp_path)
    data = instantiate(chosen.data)
    loaded = load_pruned(classifier_from(chosen, data), tmp_path / "pruned" / "checkpoints" / "untrained.ckpt")
    assert len(history_of(loaded)) == 1
    made = instantiate(chosen.trainer, logger=False)
    (found,) = made.test(loaded, data, verbose=False)
    assert found["test/acc"] == pytest.approx(summary["accuracy"]["end"])
    (found,) = made.validate(loaded, data, verbose=False)
    assert found["val/acc"] == pytest.approx(summary["accuracy"]["val_after_cut"][0])


def test_with_an_epoch_of_training_it_is_cut_first(trained: dict[str, Any], tmp_path: Path) -> None:
    settings = ["method=lasso", "trainer.max_epochs=1", "optimizer.lr=0.001", quoted(trained["path"])]
    summary = experiment(tmp_path, *settings).run()
    assert [event["epoch"] for event in summary["events"]] == [0]
    assert summary["accuracy"]["val_before_cut"] is None
    assert summary["accuracy"]["val_after_cut"][0] > 0.8
    assert summary["accuracy"]["end"] > trained["accuracy"] - 0.05


def test_a_run_starts_from_the_weights_of_a_checkpoint(trained: dict[str, Any], tmp_path: Path) -> None:
    chosen = config(tmp_path, quoted(trained["path"]))
    assert equal(
        classifier_from(chosen, instantiate(chosen.data), chosen.ckpt_path).state_dict(), trained["module"].state_dict()
    )


def test_other_methods_go_on_from_a_checkpoint_with_a_refit(trained: dict[str, Any], tmp_path: Path) -> None:
    settings = [
        "method=magnitude",
        "reconstruction=least_squares",
        "reconstruction.images=1000",
        "trainer.max_epochs=2",
    ]
    events = ["schedule.begin=1", "schedule.end=1", "optimizer.lr=0.001", "dense_twin=false"]
    summary = experiment(tmp_path, *settings, *events, quoted(trained["path"])).run()
    assert [event["epoch"] for event in summary["events"]] == [1]
    before, (after,) = (summary["accuracy"][f"val_{when}_cut"] for when in ("before", "after"))
    assert after > before - 0.1


def test_without_an_epoch_only_lasso_cuts(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="max_epochs=0"):
        experiment(tmp_path, "method=magnitude", "trainer.max_epochs=0", "dense_twin=false").run()


@pytest.mark.parametrize("model", ["lenet_300_100", "mnist_fc", "resnet20"])
def test_the_checkpoint_of_another_model_is_refused(trained: dict[str, Any], tmp_path: Path, model: str) -> None:
    with pytest.raises(
        HistoryError, match=r"(?s)do not fit the model.*Choose the model that it was trained with"
    ) as caught:
        experiment(tmp_path, f"model={model}", "method=lasso", quoted(trained["path"])).run()
    assert str(trained["path"]) in str(caught.value)


def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        experiment(tmp_path, "method=lasso", quoted(tmp_path / "nowhere.ckpt")).run()
    with pytest.raises(HistoryError, match=re.escape(str(tmp_path))):
        experiment(tmp_path, "method=lasso", quoted(tmp_path)).run()


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("no weights")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    for name in ("text", "other", "list"):
        with pytest.raises(HistoryError, match=rf"{name}\.ckpt"):
            experiment(tmp_path, "method=lasso", quoted(tmp_path / f"{name}.ckpt")).run()


def test_a_pruned_checkpoint_is_taken_up_as_it_is(trained: dict[str, Any], tmp_path: Path) -> None:
    """What was cut while validating is not cut again; a fit reaches what is asked, counted against the dense model."""
    settings = ["method=lasso", "trainer.max_epochs=0", quoted(trained["path"]), "dense_twin=false"]
    chosen = experiment(tmp_path, *settings)
    chosen.run()
    pruned = tmp_path / "pruned" / "checkpoints" / "untrained.ckpt"
    again = experiment(tmp_path / "again", *settings[:2], quoted(pruned), "dense_twin=false", "method.speed_up=4").run()
    assert len(again["events"]) == 1
    assert again["accuracy"]["val_after_cut"] == []
    assert again["accuracy"]["val_before_cut"] > 0.8
    settings = ["method=lasso", "trainer.max_epochs=1", "method.speed_up=4", "dense_twin=false", quoted(pruned)]
    further = experiment(tmp_path / "further", *settings).run()
    assert [event["asked"] for event in further["events"]] == [0.5, 0.75]


def test_a_saved_network_is_taken_up_too(trained: dict[str, Any], tmp_path: Path) -> None:
    save_pruned(trained["module"], tmp_path / "net.pt")
    chosen = config(tmp_path, quoted(tmp_path / "net.pt"))
    assert equal(
        classifier_from(chosen, instantiate(chosen.data), chosen.ckpt_path).state_dict(), trained["module"].state_dict()
    )
