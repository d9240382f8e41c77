"""`lightning-prune export`: a checkpoint becomes a file that others can run."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from lightning_prune.cli.building import example_from, limit_threads
from lightning_prune.cli.trained import trained_from, with_the_run
from lightning_prune.cli.words import told
from lightning_prune.cost import batch_of, measure_latency
from lightning_prune.exporting import Exported, onnx_latency
from lightning_prune.exporting import export as write
from lightning_prune.inputs import Inputs

ENDINGS = {"onnx": ".onnx", "torch_export": ".pt2", "torchscript": ".ts"}


@hydra.main(version_base="1.3", config_path="pkg://lightning_prune.conf", config_name="export")
@told
def export(config: DictConfig) -> None:
    """Write the network of a checkpoint to a file, and tell how fast it runs."""
    limit_threads(config)
    checkpoint = Path(config.ckpt_path)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"`ckpt_path` is a checkpoint that a run has written; {checkpoint} is no file.")
    config = with_the_run(config, checkpoint)
    data = instantiate(config.data)
    module = trained_from(config, data, checkpoint)
    out = checkpoint.with_suffix(ENDINGS.get(config.format, "")) if config.out is None else Path(config.out)
    inputs = batch_of(Inputs((example_from(data),)), _batch_size(config.latency_batch))
    done = write(module, out, format=config.format, example_inputs=inputs, batch=config.batch)
    console = Console()
    console.print(str(done), soft_wrap=True)
    if config.latency_batch is not None:
        console.print(_latency(module, done, inputs), soft_wrap=True)


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


def _latency(module: nn.Module, done: Exported, inputs: Inputs) -> str:
    """Tell the time of a forward pass in torch, and for an ONNX file in onnxruntime beside it."""
    size = len(inputs.args[0])
    told = f"batch {size}: torch {measure_latency(module, inputs):.3f} ms"
    return told + (f", onnxruntime {onnx_latency(done.path, inputs):.3f} ms" if done.format == "onnx" else "")
