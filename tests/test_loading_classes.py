"""Checkpoints loaded through classes: hyper-parameters, layers made late, the mixin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import Module, equal, network, trainer, widths
from lightning.pytorch.callbacks import ModelCheckpoint
from proof import same_state, snapshot
from torch import Tensor, nn

from lightning_prune import history_of, load_pruned
from lightning_prune.callbacks import PruneCallback, PrunedStateMixin
from lightning_prune.errors import HistoryError
from lightning_prune.history import KEY

INPUT = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(5))


class Wide(Module):
    """Takes its width; its second convolution has 8 channels."""

    def __init__(self, width: int, seed: int = 0) -> None:
        net = network(seed)
        net[0], net[1] = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        net[3] = nn.Conv2d(width, 8, 3, padding=1, bias=False)
        super().__init__(net=net)
        self.save_hyperparameters()


class Mixed(PrunedStateMixin, Wide):
    """Brings its shapes along."""


class Loose(Wide):
    """Takes whatever it is given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(options["width"], options.get("seed", 0))


class Configured(Module):
    """Takes a dict."""

    def __init__(self, config: dict[str, int], seed: int = 0) -> None:
        super().__init__(net=Wide(config["width"], seed).net)
        self.save_hyperparameters(config)


class Listed(Wide):
    """Has written down its hyper-parameters under no name."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.save_hyperparameters({"width": width, "made": "here"})


class Free(Loose):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.save_hyperparameters({"width": options["width"]})


class Late(Module):
    """Its layers are made in `configure_model`."""

    def __init__(self, width: int) -> None:
        super().__init__(net=nn.Identity())
        self.save_hyperparameters()

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = Wide(self.hparams["width"]).net


def trained(module: pl.LightningModule, folder: Path) -> tuple[Path, Path]:
    """Train over a cut, and return the files of before and after it."""
    keep = ModelCheckpoint(folder, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    trainer(PruneCallback(0.5, begin=1, end=1), keep, max_epochs=2, enable_checkpointing=True).fit(module)
    assert widths(module) == [5, 4]
    return folder / "0.ckpt", folder / "1.ckpt"


def weights(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def holds(module: nn.Module, path: Path, cuts: int) -> bool:
    shape = module.eval()(INPUT).shape
    return equal(module.state_dict(), weights(path)) and len(history_of(module)) == cuts and shape == (3, 4)


CLASSES: dict[str, tuple[type[pl.LightningModule], dict[str, Any]]] = {
    "arguments": (Wide, {"width": 10}),
    "mixin": (Mixed, {"width": 10}),
    "kwargs": (Loose, {"width": 10, "seed": 3}),
    "dict": (Configured, {"config": {"width": 10}}),
    "dict of no name": (Listed, {"width": 10}),
    "kwargs of no name": (Free, {"width": 10}),
    "layers made late": (Late, {"width": 10}),
}


@pytest.mark.parametrize(("kind", "arguments"), CLASSES.values(), ids=CLASSES)
def test_a_class_is_built_with_its_hyper_parameters(
    tmp_path: Path, kind: type[pl.LightningModule], arguments: dict[str, Any]
) -> None:
    files = trained(kind(**arguments), tmp_path)
    for cuts, path in enumerate(files):
        assert holds(load_pruned(kind, path), path, cuts)


@pytest.mark.parametrize(("kind", "arguments"), CLASSES.values(), ids=CLASSES)
def test_an_instance_goes_back_and_forth_between_the_files(
    tmp_path: Path, kind: type[pl.LightningModule], arguments: dict[str, Any]
) -> None:
    module = kind(**arguments)
    files = trained(module, tmp_path)
    for cuts in (0, 1, 1, 0, 0, 1):
        assert holds(load_pruned(module, files[cuts]), files[cuts], cuts)


def test_arguments_override_hyper_parameters(tmp_path: Path) -> None:
    path = trained(Wide(width=10), tmp_path)[1]
    loaded = load_pruned(Wide, path, seed=4)
    assert dict(loaded.hparams) == {"width": 10, "seed": 4}
    assert holds(loaded, path, 1)
    with pytest.raises(HistoryError, match=r"shape \(10, 1, 3, 3\), but the model's is \(12, 1, 3, 3\)"):
        load_pruned(Wide, path, width=12)
    assert holds(load_pruned(Loose, path, seed=7, extra=1), path, 1)


def test_an_argument_that_the_class_does_not_take_is_an_error(tmp_path: Path) -> None:
    path = trained(Wide(width=10), tmp_path)[1]
    with pytest.raises(TypeError, match="sed"):
        load_pruned(Wide, path, sed=4)


@pytest.mark.parametrize("hyper", [3, None, "width", [1], {"width": 12}, {1: 2}, {"wide": 10}])
@pytest.mark.parametrize("kind", [Wide, Loose])
def test_hyper_parameters_that_were_tampered_with(
    tmp_path: Path, hyper: object, kind: type[pl.LightningModule]
) -> None:
    file = torch.load(trained(Wide(width=10), tmp_path)[1], weights_only=True)
    torch.save({**file, "hyper_parameters": hyper}, tmp_path / "net.ckpt")
    with pytest.raises((HistoryError, TypeError, KeyError)):
        load_pruned(kind, tmp_path / "net.ckpt")


def test_load_from_checkpoint_brings_the_shapes_of_the_file(tmp_path: Path) -> None:
    """Those of the mixin, and those that only a prune callback has written, without the mixin's metadata."""
    files = [*trained(Mixed(width=10), tmp_path / "mixed"), *trained(Wide(width=10), tmp_path / "plain")]
    for cuts, path in zip((0, 1, 0, 1), files, strict=True):
        assert holds(Mixed.load_from_checkpoint(path), path, cuts)
        assert holds(Mixed.load_from_checkpoint(path, seed=5), path, cuts)


def test_load_state_dict_goes_back_and_forth_between_the_files(tmp_path: Path) -> None:
    module = Mixed(width=10)
    files = trained(module, tmp_path)
    for target in (module, Mixed(width=10, seed=5)):
        for cuts in (0, 1, 1, 0, 0, 1):
            assert not any(target.load_state_dict(weights(files[cuts])))
            assert holds(target, files[cuts], cuts)


def test_load_state_dict_of_another_network_is_refused(tmp_path: Path) -> None:
    path = trained(Mixed(width=10), tmp_path)[1]
    other = Mixed(width=12)
    before = snapshot(other)
    with pytest.raises(HistoryError, match="Build the model with the arguments that it was trained with"):
        other.load_state_dict(weights(path))
    assert same_state(snapshot(other), before)


def test_load_state_dict_that_fails_leaves_the_shapes(tmp_path: Path) -> None:
    state = weights(trained(Mixed(width=10), tmp_path)[1])
    state["net.8.weight"] = torch.zeros(4, 7)
    module = Mixed(width=10)
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict(state)
    assert widths(module) == [10, 8]
    assert not history_of(module)


def test_weights_whose_metadata_tell_of_other_cuts_are_refused(tmp_path: Path) -> None:
    file = torch.load(trained(Mixed(width=10), tmp_path)[1], weights_only=True)
    records = file["state_dict"]._metadata[""][KEY]
    records[0]["kept"]["net.8.weight"] = {0: [0, 1], **records[0]["kept"]["net.8.weight"]}
    torch.save(file, tmp_path / "net.ckpt")
    module = Mixed(width=10, seed=5)
    before = snapshot(module)
    with pytest.raises(HistoryError):
        load_pruned(module, tmp_path / "net.ckpt")
    assert same_state(snapshot(module), before)
