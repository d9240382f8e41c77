"""`lightning-prune sensitivity` from outside: a scan that trains, scans that load, and wrong arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from PIL import Image

from lightning_prune import prune
from lightning_prune.cli.building import classifier_from
from lightning_prune.cli.sensitivity import sensitivity_from
from lightning_prune.errors import HistoryError
from lightning_prune.history import save_pruned
from lightning_prune.sensitivity import Sensitivity
from lightning_prune.workbench import Digits


def cli(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightning_prune", "sensitivity", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


SHORT = ("model=lenet_300_100", "trainer=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false", "batches=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scan")
    done = cli(folder, *SHORT, "ratios=[0.5,0.9]", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    assert "accuracy as one layer alone loses weights" in " ".join(done.stdout.split())
    return folder / "out"


class TestCommandLine:
    def test_it_trains_and_leaves_the_scan(self, trained: Path) -> None:
        scan = Sensitivity.load(trained / "sensitivity.json")
        assert [row.size for row in scan.rows] == [64 * 300, 300 * 100, 1000]
        assert scan.ratios == (0.5, 0.9)
        with Image.open(trained / "sensitivity.png") as picture:
            assert picture.size == scan.picture().size
        assert "ratios" in (trained / "config.yaml").read_text()

    def test_it_loads_what_was_trained(self, trained: Path) -> None:
        (checkpoint,) = trained.rglob("*.ckpt")
        found = from_config(f"checkpoint='{checkpoint}'", "ratios=[0.5,0.9]")
        assert found == Sensitivity.load(trained / "sensitivity.json")

    def test_it_loads_a_pruned_network(self, tmp_path: Path) -> None:
        module = classifier_from(config_of(), Digits())
        prune(module, module.example_input_array, pruning_ratio=0.5)
        save_pruned(module, tmp_path / "pruned.ckpt")
        scan = from_config(
            f"checkpoint='{tmp_path / 'pruned.ckpt'}'", "of=channels", "criterion=random", "ratios=[0.5]"
        )
        assert [row.size for row in scan.rows] == [150, 50]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("ratios=[0.5,0.2]",), "`ratios` are the fractions to prune"),
            (("of=heads",), "`of` is what is pruned"),
            (("criterion=random",), "`criterion` is about channels"),
        ],
    )
    def test_wrong_arguments(self, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
        save_pruned(classifier_from(config_of(), Digits()), tmp_path / "dense.ckpt")
        with pytest.raises(ValueError, match=words):
            from_config(f"checkpoint='{tmp_path / 'dense.ckpt'}'", *arguments)

    def test_checkpoints_that_are_none(self, tmp_path: Path) -> None:
        torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.ckpt")
        (tmp_path / "damaged.ckpt").write_text("no")
        for name, words in (("other", "do not fit the model"), ("damaged", "is no checkpoint")):
            with pytest.raises(HistoryError, match=words):
                from_config(f"checkpoint='{tmp_path / name}.ckpt'")
        with pytest.raises(FileNotFoundError):
            from_config("checkpoint=nowhere.ckpt")


def config_of(*overrides: str) -> Any:
    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        return compose("sensitivity", overrides=[*SHORT, *overrides], return_hydra_config=True)


def from_config(*overrides: str) -> Sensitivity:
    config = config_of(*overrides, "hydra.runtime.output_dir=unused")
    HydraConfig.instance().set_config(config)
    try:
        return sensitivity_from(config)
    finally:
        HydraConfig.instance().cfg = None
