"""`lightning-prune sensitivity`: how sensitive the layers of a trained network are."""

from __future__ import annotations

import logging
from pathlib import Path

import hydra
import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from lightning_prune.cli.building import classifier_from, folder, limit_threads, trainer_from
from lightning_prune.cli.outcome import write_whole
from lightning_prune.cli.trained import trained_from, with_the_run
from lightning_prune.cli.words import told
from lightning_prune.sensitivity import Sensitivity
from lightning_prune.sensitivity import sensitivity as scan

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="pkg://lightning_prune.conf", config_name="sensitivity")
@told
def sensitivity(config: DictConfig) -> None:
    """Scan how sensitive the layers of a trained network are, and leave the figures in the run's folder."""
    limit_threads(config)
    if config.checkpoint is not None:
        config = with_the_run(config, Path(config.checkpoint))
    found = sensitivity_from(config)
    found.save(folder() / "sensitivity.json")
    found.picture().save(folder() / "sensitivity.png")
    with SummaryWriter(str(folder() / "tensorboard")) as board:
        board.add_image("prune/sensitivity", np.asarray(found.picture().convert("RGB")), dataformats="HWC")
    write_whole(folder() / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    Console().print(found.table(config.drop))
    log.info("everything about this scan lies in %s", folder())


def sensitivity_from(config: DictConfig) -> Sensitivity:
    """Train the network that a config describes, or load what a run has trained, and scan its layers.

    Raises:
        HistoryError: The checkpoint is none, or does not fit the network.
        ValueError: An argument of the scan is wrong.
    """
    data = instantiate(config.data)
    trainer = trainer_from(config, logger=False, default_root_dir=str(folder()))
    if config.checkpoint is None:
        module = classifier_from(config, data)
        trainer.fit(module, data)
    else:
        module = trained_from(config, data, Path(config.checkpoint))
    return scan(
        module.to(trainer.strategy.root_device),
        data,
        config.ratios,
        of=config.of,
        criterion=instantiate(config.get("criterion")),
        ignore=config.ignore,
        batches=config.batches,
    )
