"""From a config to what it describes: network, data, Trainer, experiment."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from lightning_prune.loading import load_weights
from lightning_prune.workbench import Classifier, Experiment, MemoryImages


def folder() -> Path:
    """Return the folder in which Hydra wants this run to leave its files."""
    return Path(HydraConfig.get().runtime.output_dir)


def limit_threads(config: DictConfig) -> None:
    """Give torch as many CPU threads as the config says."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def experiment_from(config: DictConfig) -> Experiment:
    """Build the experiment that a config describes.

    Raises:
        ValueError: A criterion is chosen for a method that has its own.
    """
    if config.get("criterion") is not None and "criterion" not in config.method:
        raise ValueError(
            f"`criterion` has no effect on {config.method._target_.rpartition('.')[2]}, which has its own. "
            "Use method=prune to choose one."
        )
    data = instantiate(config.data)

    def trainer(name: str, callbacks: list[pl.Callback]) -> pl.Trainer:
        loggers = instantiate(config.logger) if name == "pruned" else False
        more = [instantiate(each) for each in (config.get("callbacks") or {}).values()]
        return trainer_from(
            config, callbacks=[*more, *callbacks], logger=loggers, default_root_dir=str(folder() / name)
        )

    return Experiment(
        data,
        partial(classifier_from, config, data, config.ckpt_path),
        instantiate(config.method),
        trainer,
        config.dense_twin,
        tuple(config.latency_batches),
        _hparams(config),
    )


def _hparams(config: DictConfig) -> dict[str, Any]:
    """Return what tells the runs of a sweep apart: the seed, the choices, and each value given on the command line."""
    if not HydraConfig.initialized():  # a config that was composed by hand
        return {"seed": config.seed}
    known = HydraConfig.get()
    choices = {group: choice for group, choice in known.runtime.choices.items() if "/" not in group and choice}
    given = dict(str(each).lstrip("+").split("=", 1) for each in known.overrides.task if "=" in str(each))
    return {"seed": config.seed, **choices, **{name: value for name, value in given.items() if name not in choices}}


def classifier_from(config: DictConfig, data: MemoryImages, checkpoint: str | None = None) -> pl.LightningModule:
    """Build the network that a config describes, with the weights of its seed or of a checkpoint.

    Raises:
        HistoryError: The checkpoint is none, or does not fit the network.
    """
    net = network_from(config, sizes_of(data))
    example = example_from(data)
    optimizer, lr_scheduler = instantiate(config.optimizer), instantiate(config.lr_scheduler)
    made = Classifier(net, data.num_classes, optimizer=optimizer, lr_scheduler=lr_scheduler, example=example)
    if checkpoint is not None:
        load_weights(made, checkpoint)
    return made


def network_from(config: DictConfig, sizes: Mapping[str, int]) -> nn.Module:
    """Build the bare network that a config describes, with the weights of its seed.

    Of `in_channels`, `image_size` and `num_classes` it is told those that it has arguments for.
    """
    pl.seed_everything(config.seed, verbose=False)
    net: nn.Module = instantiate(config.model, **{name: sizes[name] for name in _taken(config.model, sizes)})
    return net.to(memory_format=torch.channels_last) if config.channels_last else net


def sizes_of(data: MemoryImages) -> dict[str, int]:
    """Return what a network is told of its data."""
    return {"in_channels": data.in_channels, "image_size": data.image_size, "num_classes": data.num_classes}


def example_from(data: MemoryImages) -> Tensor:
    """Return two blank images, of the data's size."""
    return torch.zeros(2, data.in_channels, data.image_size, data.image_size)


def _taken(model: DictConfig, names: Iterable[str]) -> list[str]:
    """Name the arguments that a model takes and the config leaves open."""
    try:
        parameters = inspect.signature(get_method(model._target_)).parameters
    except Exception:  # `instantiate` says what is wrong with the target
        return []
    every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return [name for name in names if (every or name in parameters) and name not in model]


def trainer_from(config: DictConfig, **arguments: Any) -> pl.Trainer:
    """Build the Trainer that a config describes, with further arguments."""
    made: pl.Trainer = instantiate(config.trainer, **arguments)
    return made
