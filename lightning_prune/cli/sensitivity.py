"""`lightning-prune sensitivity`: how sensitive the layers of a trained network are."""

from __future__ import annotations

import logging

import hydra
import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from lightning_prune.cli.building import folder, limit_threads, sensitivity_from
from lightning_prune.cli.outcome import write_whole
from lightning_prune.cli.words import told

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="pkg://lightning_prune.conf", config_name="sensitivity")
@told
def sensitivity(config: DictConfig) -> None:
    """Scan how sensitive the layers of a trained network are, and leave the figures in the run's folder."""
    limit_threads(config)
    found = sensitivity_from(config)
    found.save(folder() / "sensitivity.json")
    found.picture().save(folder() / "sensitivity.png")
    with SummaryWriter(str(folder() / "tensorboard")) as board:
        board.add_image("prune/sensitivity", np.asarray(found.picture().convert("RGB")), dataformats="HWC")
    write_whole(folder() / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    Console().print(found.table(config.drop))
    log.info("everything about this scan lies in %s", folder())
