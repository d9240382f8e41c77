"""`lightning-prune export`: a checkpoint becomes a file that others can run."""

from __future__ import annotations

from pathlib import Path

import hydra
import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from lightning_prune.callbacks import ChannelEquilibriumCallback
from lightning_prune.cli.building import classifier_from, example_from, limit_threads
from lightning_prune.cli.words import told
from lightning_prune.cost import batch_of, measure_latency
from lightning_prune.equilibrium import equilibrate
from lightning_prune.exporting import Exported, onnx_latency
from lightning_prune.exporting import export as write
from lightning_prune.inputs import Inputs
from lightning_prune.loading import load_weights
from lightning_prune.workbench import MemoryImages

ENDINGS = {"onnx": ".onnx", "torch_export": ".pt2", "torchscript": ".ts"}

_OF_THE_RUN = ("data", "model", "channels_last", "seed", "callbacks")
"""What is taken from the config of the run that wrote the checkpoint, unless the command line says otherwise."""


@hydra.main(version_base="1.3", config_path="pkg://lightning_prune.conf", config_name="export")
@told
def export(config: DictConfig) -> None:
    """Write the network of a checkpoint to a file, and tell how fast it runs."""
    limit_threads(config)
    checkpoint = Path(config.ckpt_path)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"`ckpt_path` is a checkpoint that a run has written; {checkpoint} is no file.")
    config = _with_the_run(config, checkpoint)
    data = instantiate(config.data)
    module = _trained(config, data)
    out = checkpoint.with_suffix(ENDINGS.get(config.format, "")) if config.out is None else Path(config.out)
    inputs = batch_of(Inputs((example_from(data),)), _batch_size(config.latency_batch))
    done = write(module, out, format=config.format, example_inputs=inputs, batch=config.batch)
    console = Console()
    console.print(str(done), soft_wrap=True)
    if config.latency_batch is not None:
        console.print(_latency(module, done, inputs), soft_wrap=True)


def _trained(config: DictConfig, data: MemoryImages) -> pl.LightningModule:
    """Build the network of the run, with the blocks that a callback put into it, and load the checkpoint."""
    bare = config.copy()
    bare.ckpt_path = None
    module = classifier_from(bare, data)
    for callback in instantiate(config.get("callbacks") or {}).values():
        if isinstance(callback, ChannelEquilibriumCallback) and callback.where != "there":
            equilibrate(module, example_from(data), where=callback.where, equilibrium=callback.equilibrium)
    load_weights(module, config.ckpt_path)
    return module


def _batch_size(given: object) -> int:
    """Return how many examples latency is taken with, and a fixed batch has.

    Raises:
        ValueError: It is no such number.
    """
    if given is None:
        return 1
    if type(given) is not int or given < 1:
        raise ValueError(f"`latency_batch` is a number of examples, at least 1, or null; got {given}.")
    return given


def _with_the_run(config: DictConfig, checkpoint: Path) -> DictConfig:
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


def _latency(module: nn.Module, done: Exported, inputs: Inputs) -> str:
    """Tell the time of a forward pass in torch, and for an ONNX file in onnxruntime beside it."""
    size = len(inputs.args[0])
    told = f"batch {size}: torch {measure_latency(module, inputs):.3f} ms"
    return told + (f", onnxruntime {onnx_latency(done.path, inputs):.3f} ms" if done.format == "onnx" else "")
