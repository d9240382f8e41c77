"""The network that a run has trained: built as its config tells, and loaded."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_prune.callbacks import ChannelEquilibriumCallback
from lightning_prune.cli.building import classifier_from, example_from
from lightning_prune.equilibrium import equilibrate
from lightning_prune.loading import load_weights
from lightning_prune.workbench import MemoryImages

_OF_THE_RUN = ("data", "model", "channels_last", "seed", "callbacks")
"""What is taken from the config of the run that wrote the checkpoint, unless the command line says otherwise."""


def trained_from(config: DictConfig, data: MemoryImages, checkpoint: Path) -> pl.LightningModule:
    """Build the network of a run, with the blocks that a callback put into it, and load the checkpoint.

    Raises:
        HistoryError: The checkpoint is none, or does not fit the network.
    """
    module = classifier_from(config, data)
    for callback in instantiate(config.get("callbacks") or {}).values():
        if isinstance(callback, ChannelEquilibriumCallback) and callback.where != "there":
            equilibrate(module, example_from(data), where=callback.where, equilibrium=callback.equilibrium)
    load_weights(module, checkpoint)
    return module


def with_the_run(config: DictConfig, checkpoint: Path) -> DictConfig:
    """Fill in what the run's own config says; what is chosen on the command line stays, single values too."""
    overrides = [str(each).lstrip("+").partition("=")[0] for each in HydraConfig.get().overrides.task]
    run = _config_above(checkpoint)
    merged = config.copy()
    OmegaConf.set_struct(merged, False)
    for name in _OF_THE_RUN:
        if name in run and name not in overrides:
            merged[name] = run[name]
            for key in overrides:
                if key.startswith(f"{name}."):
                    OmegaConf.update(merged, key, OmegaConf.select(config, key), force_add=True)
    return merged


def _config_above(checkpoint: Path) -> DictConfig:
    """Return the config of the nearest folder above that has one of ours; an empty one if there is none."""
    for folder in checkpoint.resolve().parents:
        for path in (folder / "config.yaml", folder / ".hydra" / "config.yaml"):
            found = _read(path) if path.is_file() else None
            if isinstance(found, DictConfig) and OmegaConf.select(found, "model._target_") and "data" in found:
                return found
    return OmegaConf.create({})


def _read(path: Path) -> object:
    try:
        return OmegaConf.load(path)
    except Exception:  # somebody else's, which happens to lie there
        return None
