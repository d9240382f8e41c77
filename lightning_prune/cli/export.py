"""`lightning-prune export`: a checkpoint becomes a file that others can run."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from lightning_prune.cli.building import classifier_from, example_from, limit_threads
from lightning_prune.cli.words import told
from lightning_prune.cost import batch_of, measure_latency
from lightning_prune.exporting import Exported, onnx_latency
from lightning_prune.exporting import export as write
from lightning_prune.inputs import Inputs

ENDINGS = {"onnx": ".onnx", "torch_export": ".pt2", "torchscript": ".ts"}

_OF_THE_RUN = ("data", "model", "channels_last", "seed")
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
    module = classifier_from(config, data)
    out = checkpoint.with_suffix(ENDINGS.get(config.format, "")) if config.out is None else Path(config.out)
    inputs = Inputs((example_from(data),))
    done = write(module, out, format=config.format, example_inputs=inputs, batch=config.batch)
    console = Console()
    console.print(str(done), soft_wrap=True)
    if config.latency_batch is not None:
        times = batch_of(inputs, config.latency_batch) if config.batch == "dynamic" else inputs
        console.print(_latency(module, done, times), soft_wrap=True)


def _with_the_run(config: DictConfig, checkpoint: Path) -> DictConfig:
    """Fill in what the run's own config says, from the nearest folder above the checkpoint that has one."""
    given = {str(each).lstrip("+~").partition("=")[0].partition(".")[0] for each in HydraConfig.get().overrides.task}
    run = _config_above(checkpoint)
    names = [name for name in _OF_THE_RUN if name not in given and name in run]
    merged = config.copy()
    for name in names:
        merged[name] = run[name]
    return merged


def _config_above(checkpoint: Path) -> DictConfig:
    for folder in checkpoint.resolve().parents:
        for path in (folder / "config.yaml", folder / ".hydra" / "config.yaml"):
            found = OmegaConf.load(path) if path.is_file() else None
            if isinstance(found, DictConfig):
                return found
    return OmegaConf.create({})


def _latency(module: nn.Module, done: Exported, inputs: Inputs) -> str:
    """Tell the time of a forward pass in torch, and for an ONNX file in onnxruntime beside it."""
    size = len(inputs.args[0])
    told = f"batch {size}: torch {measure_latency(module, inputs):.3f} ms"
    return told + (f", onnxruntime {onnx_latency(done.path, inputs):.3f} ms" if done.format == "onnx" else "")
