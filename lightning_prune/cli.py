"""The Hydra application: `lightning-prune method=slimming data=digits ...`."""

from __future__ import annotations

import json
import logging
import platform
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_prune.__version__ import __version__
from lightning_prune.report import comparison_table, count
from lightning_prune.workbench import Classifier, Experiment

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="pkg://lightning_prune.conf", config_name="config")
def main(config: DictConfig) -> float:
    """Run one experiment, leave its figures in the run's folder, and return the pruned test accuracy."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    summary = {
        "version": __version__,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "choices": {group: choice for group, choice in HydraConfig.get().runtime.choices.items() if "/" not in group},
        **experiment_from(config).run(),
    }
    write_whole(folder / "summary.json", json.dumps(summary, indent=2))
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    Console().print(comparison_table(_rows(summary), f"Dense against pruned, seed {config.seed}"))
    log.info("everything about this run lies in %s", folder)
    return float(summary["accuracy"]["end"])


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

    def classifier() -> pl.LightningModule:
        pl.seed_everything(config.seed, verbose=False)
        sizes = {"in_channels": data.in_channels, "image_size": data.image_size, "num_classes": data.num_classes}
        net = instantiate(config.model, **sizes)
        if config.channels_last:
            net = net.to(memory_format=torch.channels_last)
        example = torch.zeros(2, data.in_channels, data.image_size, data.image_size)
        optimizer, lr_scheduler = instantiate(config.optimizer), instantiate(config.lr_scheduler)
        return Classifier(net, data.num_classes, optimizer=optimizer, lr_scheduler=lr_scheduler, example=example)

    def trainer(name: str, callbacks: list[pl.Callback]) -> pl.Trainer:
        loggers = instantiate(config.logger) if name == "pruned" else False
        folder = Path(HydraConfig.get().runtime.output_dir) / name
        made: pl.Trainer = instantiate(
            config.trainer, callbacks=callbacks, logger=loggers, default_root_dir=str(folder)
        )
        return made

    return Experiment(
        data, classifier, instantiate(config.method), trainer, config.dense_twin, tuple(config.latency_batches)
    )


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _rows(summary: dict[str, Any]) -> dict[str, tuple[str, str]]:
    accuracy = summary["accuracy"]
    dense = f"{accuracy['dense']:.2%}" if "dense" in accuracy else "not trained"
    rows = {"test accuracy": (dense, f"{accuracy['end']:.2%}")}
    for name, label in (("params", "parameters"), ("macs", "MACs")):
        left = summary[name]["pruned"] / summary[name]["dense"]
        rows[label] = (count(summary[name]["dense"]), f"{count(summary[name]['pruned'])} ({left:.0%})")
    for name, times in summary["latency_ms"].items():
        label = f"latency, batch {name.rpartition('_')[2]}"
        rows[label] = (f"{times['dense']:.3f} ms", f"{times['pruned']:.3f} ms")
    return rows
