"""The formats: how each is written, and how a file of it is run again."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.exporting.names import bound, in_order, input_names, output_names
from lightning_prune.inputs import Inputs

Format: TypeAlias = Literal["onnx", "torch_export", "torchscript"]

FORMATS: tuple[Format, ...] = ("onnx", "torch_export", "torchscript")

Run: TypeAlias = Callable[[Inputs], list[Tensor]]
"""Runs a file on some inputs and returns the tensors that come out, in order."""

_LARGEST = 1_900_000_000
"""Bytes of weights above which an ONNX file keeps them in a file beside it: protobuf holds 2 GiB at most."""


def write(format: Format, model: nn.Module, inputs: Inputs, path: Path, *, dynamic: bool) -> None:
    """Write a network, in eval mode on the CPU, with a batch size that is free or that of the inputs."""
    with torch.no_grad(), _quiet():
        {"onnx": _write_onnx, "torch_export": _write_torch_export, "torchscript": _write_torchscript}[format](
            model, in_order(model, inputs), path, dynamic
        )


def opened(format: Format, path: Path) -> Run:
    """Open a file for being run."""
    return {"onnx": _open_onnx, "torch_export": _open_torch_export, "torchscript": _open_torchscript}[format](path)


def session_of(path: Path, threads: int) -> Any:
    """Open an ONNX file with onnxruntime, on the CPU with so many threads.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
    """
    runtime = _needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed(session: Any, inputs: Inputs) -> dict[str, Any]:
    """Return the arrays that an onnxruntime session takes: keywords by their names, all else in order."""
    names = [each.name for each in session.get_inputs()]
    named = {name: value for name, value in inputs.kwargs.items() if name in names and isinstance(value, Tensor)}
    others = _leaves((inputs.args, {name: value for name, value in inputs.kwargs.items() if name not in named}))
    found = named | dict(zip([name for name in names if name not in named], others, strict=True))
    return {name: tensor.numpy() for name, tensor in found.items()}


def _write_onnx(model: nn.Module, inputs: Inputs, path: Path, dynamic: bool) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _needed(name)
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    names = input_names(model, inputs)
    outputs = output_names(inputs.call(model), names)
    program: Any = torch.onnx.export(
        model,
        inputs.args if inputs.kwargs else (*inputs.args, {}),  # else a dict that comes last is read as keywords
        kwargs=dict(inputs.kwargs),
        dynamic_shapes=_shapes(model, inputs) if dynamic else None,
        input_names=names,
        output_names=outputs,
        dynamo=True,
        verbose=False,
    )
    _keep_apart(program.model.graph, outputs)
    program.save(path, external_data=size > _LARGEST)


def _keep_apart(graph: Any, outputs: list[str]) -> None:
    """Rename what lies inside under the name of an output: the exporter calls values by their operations."""
    ends = {id(value) for value in graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value.name in outputs and id(value) not in ends:
                value.name = f"{value.name}_inside"


def _open_onnx(path: Path) -> Run:
    session = session_of(path, torch.get_num_threads())
    return lambda inputs: [torch.as_tensor(array) for array in session.run(None, feed(session, inputs))]


def _write_torch_export(model: nn.Module, inputs: Inputs, path: Path, dynamic: bool) -> None:
    shapes = _shapes(model, inputs) if dynamic else None
    program = torch.export.export(model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)


def _open_torch_export(path: Path) -> Run:
    with _quiet():
        module = torch.export.load(path).module()
    return lambda inputs: _leaves(module(*inputs.args, **inputs.kwargs))


def _write_torchscript(model: nn.Module, inputs: Inputs, path: Path, dynamic: bool) -> None:
    """A trace takes any batch size that nothing in the forward has read; the check finds out."""
    given: dict[str, Any] = {"example_inputs": inputs.args}
    if inputs.kwargs:
        given = {"example_kwarg_inputs": bound(model, inputs)}
    traced = torch.jit.trace(model, **given, check_trace=False, strict=False)
    torch.jit.save(traced, path)


def _open_torchscript(path: Path) -> Run:
    with _quiet():
        module = torch.jit.load(path, map_location="cpu")

    def run(inputs: Inputs) -> list[Tensor]:
        with _quiet():
            return _leaves(module(*inputs.args, **inputs.kwargs))

    return run


def _shapes(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Say of each input that its first dimension is the batch."""
    batch = torch.export.Dim("batch")

    def shape(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) and value.dim() else None

    return {name: tree_map(shape, value) for name, value in bound(model, inputs).items()}


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _needed(name: str) -> Any:
    try:
        return __import__(name)
    except ModuleNotFoundError as error:
        way_out = "pip install 'lightning-prune[onnx]'"
        raise ModuleNotFoundError(f"ONNX files are written and checked with {name}: {way_out}.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep exporters from talking: that TorchScript ages, how far they are, what they have optimised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
