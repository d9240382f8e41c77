"""The Hydra applications: `lightning-prune method=slimming data=digits ...`, and `lightning-prune-sensitivity ...`."""

from __future__ import annotations

import json
import logging
import platform
from functools import partial
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
from lightning_prune.errors import HistoryError
from lightning_prune.history import KEY, load_pruned
from lightning_prune.report import comparison_table, count
from lightning_prune.sensitivity import Sensitivity, sensitivity
from lightning_prune.workbench import Classifier, Experiment, MemoryImages

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="pkg://lightning_prune.conf", config_name="config")
def main(config: DictConfig) -> float:
    """Run one experiment, leave its figures in the run's folder, and return the pruned test accuracy."""
    folder = _folder()
    _limit_threads(config)
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


@hydra.main(version_base="1.3", config_path="pkg://lightning_prune.conf", config_name="sensitivity")
def scan(config: DictConfig) -> None:
    """Scan how sensitive the layers of a trained network are, and leave the figures in the run's folder."""
    folder = _folder()
    _limit_threads(config)
    found = sensitivity_from(config)
    found.save(folder / "sensitivity.json")
    found.picture().save(folder / "sensitivity.png")
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    Console().print(found.table(config.drop))
    log.info("everything about this scan lies in %s", folder)


def _folder() -> Path:
    return Path(HydraConfig.get().runtime.output_dir)


def _limit_threads(config: DictConfig) -> None:
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
        return _trainer(config, callbacks=[*more, *callbacks], logger=loggers, default_root_dir=str(_folder() / name))

    return Experiment(
        data,
        partial(classifier_from, config, data),
        instantiate(config.method),
        trainer,
        config.dense_twin,
        tuple(config.latency_batches),
    )


def sensitivity_from(config: DictConfig) -> Sensitivity:
    """Train the network that a config describes, or load it, and scan its layers.

    Raises:
        HistoryError: The checkpoint is none, or does not fit the model.
        ValueError: An argument of the scan is wrong.
    """
    data = instantiate(config.data)
    module = classifier_from(config, data)
    trainer = _trainer(config, logger=False, default_root_dir=str(_folder()))
    if config.checkpoint is None:
        trainer.fit(module, data)
    else:
        _load(module, config.checkpoint)
    return sensitivity(
        module.to(trainer.strategy.root_device),
        data,
        config.ratios,
        of=config.of,
        criterion=instantiate(config.get("criterion")),
        ignore=config.ignore,
        batches=config.batches,
    )


def classifier_from(config: DictConfig, data: MemoryImages) -> pl.LightningModule:
    """Build the network that a config describes, with the weights of its seed or of a checkpoint.

    Raises:
        HistoryError: The checkpoint is none, or does not fit the model.
    """
    pl.seed_everything(config.seed, verbose=False)
    sizes = {"in_channels": data.in_channels, "image_size": data.image_size, "num_classes": data.num_classes}
    net = instantiate(config.model, **sizes)
    if config.channels_last:
        net = net.to(memory_format=torch.channels_last)
    example = torch.zeros(2, data.in_channels, data.image_size, data.image_size)
    optimizer, lr_scheduler = instantiate(config.optimizer), instantiate(config.lr_scheduler)
    made = Classifier(net, data.num_classes, optimizer=optimizer, lr_scheduler=lr_scheduler, example=example)
    if config.get("ckpt_path") is not None:
        _load(made, config.ckpt_path)
    return made


def _load(module: pl.LightningModule, path: str) -> None:
    """Load the weights of a checkpoint, dense or pruned."""
    weights = _dense_weights(path)
    if weights is None:
        load_pruned(module, path)
        return
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise HistoryError(
            f"The weights of {path} do not fit the model: {error}. Choose the model= that it was trained with."
        ) from error


def _dense_weights(path: str) -> dict[str, Any] | None:
    """Return the weights of a checkpoint without a history; None of all else, with which `load_pruned` deals."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # `load_pruned` says what is wrong with the file
        return None
    return content.get("state_dict") if isinstance(content, dict) and KEY not in content else None


def _trainer(config: DictConfig, **arguments: Any) -> pl.Trainer:
    made: pl.Trainer = instantiate(config.trainer, **arguments)
    return made


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
    if "sparsity" in summary:
        rows["zeros in masked weights"] = ("", f"{summary['sparsity']:.1%}")
    for name, times in summary["latency_ms"].items():
        label = f"latency, batch {name.rpartition('_')[2]}"
        rows[label] = (f"{times['dense']:.3f} ms", f"{times['pruned']:.3f} ms")
    return rows
