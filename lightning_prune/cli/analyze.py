"""`lightning-prune analyze`: a look before cutting."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor, nn

from lightning_prune.allocation import Limits, Uniform
from lightning_prune.analysis import analyze as look
from lightning_prune.cli.building import (
    classifier_from,
    example_from,
    folder,
    limit_threads,
    network_from,
)
from lightning_prune.cli.outcome import write_whole
from lightning_prune.cli.trained import trained_from, with_the_run
from lightning_prune.cli.words import told
from lightning_prune.criteria import Magnitude
from lightning_prune.loading import load_weights
from lightning_prune.pruner import Request
from lightning_prune.sensitivity import sensitivity
from lightning_prune.workbench import MemoryImages

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="pkg://lightning_prune.conf", config_name="analyze")
@told
def analyze(config: DictConfig) -> None:
    """Print what a network's groups are and what a cut would give, and leave the same as analysis.json."""
    limit_threads(config)
    request = request_from(config)
    if config.ckpt_path is not None and config.example is None:
        config = with_the_run(config, Path(config.ckpt_path))
    data = instantiate(config.data)
    module, example = _looked_at(config, data)
    found = look(module, example, request)
    write_whole(folder() / "analysis.json", json.dumps(found.plain(), indent=2))
    write_whole(folder() / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    console = Console()
    console.print(found)
    if config.sensitivity:
        scan = sensitivity(
            module,
            data,
            config.ratios,
            of="channels",
            criterion=instantiate(config.get("criterion")),
            ignore=config.ignore,
            batches=config.batches,
        )
        scan.save(folder() / "sensitivity.json")
        console.print(scan.table())
    log.info("the same figures: %s", folder() / "analysis.json")


def request_from(config: DictConfig) -> Request:
    """Return what the dry run asks for.

    Raises:
        ValueError: An argument is wrong.
    """
    return Request(
        config.pruning_ratio,
        config.of,
        instantiate(config.get("criterion")) or Magnitude(),
        instantiate(config.get("allocation")) or Uniform(),
        list(config.ignore),
        config.heads,
        Limits(config.min_channels, config.round_to),
        config.constants,
        config.trunks,
    )


def _sizes(shape: Sequence[int]) -> dict[str, int]:
    """Return what the shape of a batch of images tells; of another input it tells nothing."""
    return {"in_channels": shape[1], "image_size": shape[-1]} if len(shape) == 4 else {}


def _looked_at(config: DictConfig, data: MemoryImages) -> tuple[nn.Module, Tensor]:
    """Return what is looked at: the classifier of a run, with its names; or a network that takes another input."""
    if config.example is None:
        if config.ckpt_path is None:
            return classifier_from(config, data), example_from(data)
        return trained_from(config, data, Path(config.ckpt_path)), example_from(data)
    net = network_from(config, _sizes(config.example) | {"num_classes": data.num_classes})
    if config.ckpt_path is not None:
        load_weights(net, config.ckpt_path)
    return net, torch.zeros(*config.example)
