"""Every yaml of conf/ composes, and what it describes can be built: a new file is tested without writing a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning_prune.conf
import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_prune.allocation import Allocation, WeightAllocation
from lightning_prune.callbacks import PruneCallback, RigLCallback
from lightning_prune.criteria import Criterion
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


@pytest.mark.parametrize("name", ["uniform", "global", "by_cost", "isomorphic"])
@pytest.mark.parametrize("method", ["magnitude", "prune", "slimming"])
def test_allocations_of_channels_can_be_chosen(name: str, method: str) -> None:
    callback = instantiate(composed(f"method={method}", f"allocation={name}").method)
    assert isinstance(callback.request.allocation, Allocation)
    assert type(callback.request.allocation).__name__.lower() == name.replace("_", "")


@pytest.mark.parametrize("name", [name for name in names("allocation") if name not in ("by_cost", "isomorphic")])
def test_allocations_of_weights_can_be_chosen(name: str) -> None:
    callback = instantiate(composed("method=weights", f"allocation={name}").method)
    assert isinstance(callback.weight_allocation, WeightAllocation)
    assert type(callback.weight_allocation).__name__.lower() == name.replace("_", "")


@pytest.mark.parametrize("name", names("schedule"))
def test_schedules_fire(name: str) -> None:
    callback = instantiate(composed("method=magnitude", f"schedule={name}").method)
    curve: Callable[[float], float] = callback.timing.schedule
    assert max(events(curve, 2, 8).values()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", names("model"))
def test_models_are_built_for_the_digits(name: str) -> None:
    net = instantiate(composed(f"model={name}").model, in_channels=1, image_size=8, num_classes=10)
    assert isinstance(net, nn.Module)
    assert any(True for _ in net.parameters())
