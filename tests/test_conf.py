"""Every yaml of conf/ composes, and what it describes can be built: a new file is tested without writing a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning_prune.conf
import pytest
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_prune.allocation import Allocation, WeightAllocation
from lightning_prune.callbacks import PruneCallback, RigLCallback
from lightning_prune.criteria import Criterion
from lightning_prune.reconstruction import Reconstruction
from lightning_prune.schedules import events

CONF = Path(lightning_prune.conf.__file__).parent
CHOICES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


def names(group: str) -> list[str]:
    return [name for folder, name in CHOICES if folder == group]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes_and_resolves(group: str, name: str) -> None:
    config = composed(f"{group}={name}")
    assert config.hydra.runtime.choices[group] == name
    assert OmegaConf.to_container(config, resolve=False)
    first = (CONF / group / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# "), "the first line of a config says in words what it is"


@pytest.mark.parametrize("name", names("method"))
def test_methods_are_prune_callbacks(name: str) -> None:
    assert isinstance(instantiate(composed(f"method={name}").method), PruneCallback | RigLCallback)


@pytest.mark.parametrize("name", names("criterion"))
def test_criteria_can_be_chosen_for_the_engine(name: str) -> None:
    method = instantiate(composed("method=prune", f"criterion={name}").method)
    assert isinstance(method.request.criterion, Criterion)
    assert type(method.request.criterion).__name__.lower() == name.replace("_", "")


OF_CHANNELS = ["by_cost", "isomorphic", "shallow_to_deep", "in_proportion"]
"""Allocations that share out channels only."""


@pytest.mark.parametrize("name", ["uniform", "global", *OF_CHANNELS])
@pytest.mark.parametrize("method", ["magnitude", "prune", "slimming", "lasso"])
def test_allocations_of_channels_can_be_chosen(name: str, method: str) -> None:
    callback = instantiate(composed(f"method={method}", f"allocation={name}").method)
    assert isinstance(callback.request.allocation, Allocation)
    assert type(callback.request.allocation).__name__.lower() == name.replace("_", "")


@pytest.mark.parametrize("name", [name for name in names("allocation") if name not in OF_CHANNELS])
def test_allocations_of_weights_can_be_chosen(name: str) -> None:
    callback = instantiate(composed("method=weights", f"allocation={name}").method)
    assert isinstance(callback.weight_allocation, WeightAllocation)
    assert type(callback.weight_allocation).__name__.lower() == name.replace("_", "")


@pytest.mark.parametrize("name", names("reconstruction"))
@pytest.mark.parametrize("method", ["magnitude", "prune", "slimming", "fisher", "lasso"])
def test_reconstructions_can_be_chosen(name: str, method: str) -> None:
    callback = instantiate(composed(f"method={method}", f"reconstruction={name}").method)
    assert callback.request.reconstruction == Reconstruction(), "the defaults in the file are those of the class"


def test_reconstruction_is_left_out_unless_chosen() -> None:
    assert instantiate(composed("method=magnitude").method).request.reconstruction is None
    assert instantiate(composed("method=lasso").method).request.reconstruction == Reconstruction()


@pytest.mark.parametrize("name", names("criterion"))
def test_criteria_can_be_chosen_for_lasso(name: str) -> None:
    callback = instantiate(composed("method=lasso", f"criterion={name}").method)
    assert type(callback.request.criterion).__name__.lower() == name.replace("_", "")


def test_how_much_goes_is_said_in_one_way() -> None:
    assert instantiate(composed("method=lasso").method).request.pruning_ratio == 0.5
    named = ["method.speed_up=null", "method.pruning_ratio=0.3", "method.of=channels"]
    assert instantiate(composed("method=lasso", *named).method).request.of == "channels"
    with pytest.raises(InstantiationException, match=r"Either `pruning_ratio` or `speed_up` is given; got 0\.3 and 2"):
        instantiate(composed("method=lasso", "method.pruning_ratio=0.3").method)


@pytest.mark.parametrize("name", names("schedule"))
def test_schedules_fire(name: str) -> None:
    callback = instantiate(composed("method=magnitude", f"schedule={name}").method)
    curve: Callable[[float], float] = callback.timing.schedule
    assert max(events(curve, 2, 8).values()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", [name for name in names("model") if name != "own"])
def test_models_are_built_for_the_digits(name: str) -> None:
    net = instantiate(composed(f"model={name}").model, in_channels=1, image_size=8, num_classes=10)
    assert isinstance(net, nn.Module)
    assert any(True for _ in net.parameters())
