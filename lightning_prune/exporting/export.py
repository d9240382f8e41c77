"""Write a network to a file that others can run, and check the file."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune.cost import batch_of
from lightning_prune.errors import ExportError
from lightning_prune.exporting.formats import FORMATS, Format, opened, write
from lightning_prune.history import load_pruned
from lightning_prune.inputs import ExampleInputs, Inputs, bind, tensors_in
from lightning_prune.layers.gates import gates_of
from lightning_prune.loading import load_weights
from lightning_prune.tensors import unwrapped

Batch = Literal["dynamic", "fixed"]

TOLERANCE = 1e-4
"""How far the outputs of a file may be off, relative to the largest."""

_TRIED = (1, 3, 5)
"""Batch sizes that a file with a free batch dimension is tried with."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        path: The file.
        format: Its format.
        difference: Largest difference of its outputs from the network's, relative to the largest of these.
    """

    path: Path
    format: Format
    difference: float

    def __str__(self) -> str:
        return f"{self.path}: {self.format}, off by {self.difference:.1e} of the largest output"


def export(
    source: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    format: Format = "onnx",
    example_inputs: ExampleInputs | None = None,
    into: nn.Module | type[nn.Module] | None = None,
    batch: Batch = "dynamic",
) -> Exported:
    """Write the plain network to a file, and check the file against it on random inputs.

    The network runs in eval mode on the CPU; the source is not changed. What is written is its forward: no Trainer, no
    optimizer; weights under a mask are zeros.

    Args:
        source: A module, pruned or dense, a LightningModule too; or a checkpoint that a Trainer or `save_pruned` has
            written.
        path: The file to write; one that is there is replaced.
        format: "onnx" (for onnxruntime and other engines), "torch_export" (`torch.export.load`) or "torchscript"
            (`torch.jit.load`, from C++ too).
        example_inputs: What forward is called with, with any number of examples; None takes `example_input_array`.
        into: For a checkpoint, a model built as it was for training; its weights are loaded into a copy. For one with a
            pruning history also its class (see `load_pruned`).
        batch: "dynamic" leaves the size of dimension 0 of all inputs free; "fixed" keeps that of the example.

    Raises:
        ExportError: The network cannot be written in this format, or what was written does not do what it does; no
            file is left then.
        HistoryError: `source` is no checkpoint, or does not fit `into`.
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: An argument is unknown or missing.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> folder = tempfile.mkdtemp()
        >>> export(net, f"{folder}/net.pt2", format="torch_export", example_inputs=torch.rand(2, 4)).difference < 1e-4
        True
    """
    if format not in FORMATS:
        raise ValueError(f"`format` is one of {', '.join(map(repr, FORMATS))}; got {format!r}.")
    if batch not in ("dynamic", "fixed"):
        raise ValueError(f"`batch` is 'dynamic' or 'fixed'; got {batch!r}.")
    if Path(path).is_dir():
        raise ValueError(f"`path` is the file to write; {os.fspath(path)} is a folder.")
    model = _plain(source, into)
    inputs = _inputs(model, example_inputs)
    if batch == "dynamic":
        inputs = batch_of(inputs, 2)  # of one example exporters would conclude that there is never another number
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    unfinished_folder = tempfile.TemporaryDirectory(prefix=".unfinished-", dir=Path(path).parent)
    with unfinished_folder as folder, torch.random.fork_rng(devices=()):
        unfinished = Path(folder) / Path(path).name
        _write(format, model, inputs, unfinished, batch)
        difference = _checked(format, model, inputs, unfinished, batch)
        for part in Path(folder).iterdir():
            part.replace(Path(path).parent / part.name)
    return Exported(Path(path), format, difference)


def _plain(source: nn.Module | str | os.PathLike[str], into: nn.Module | type[nn.Module] | None) -> nn.Module:
    """Return a copy of the network, in eval mode on the CPU, that nothing from training hangs on."""
    if isinstance(source, nn.Module):
        return _copy(unwrapped(source))
    if into is None:
        raise ValueError(
            f"{os.fspath(source)} holds weights, and no network to put them into: pass `into`, a model built as it "
            "was for training."
        )
    if isinstance(into, type):
        return _copy(load_pruned(into, source))
    model = _copy(unwrapped(into))
    load_weights(model, source)
    return _copy(model)


def _copy(model: nn.Module) -> nn.Module:
    if gates_of(model) is not None:
        raise ExportError(
            f"{type(model).__name__} still has gates, which are for training: let the fit go on to the last event of "
            "L0PruneCallback, which cuts what is closed and folds the rest into the weights."
        )
    trainer = model.__dict__.get("_trainer")
    try:
        copy: Any = deepcopy(model, {} if trainer is None else {id(trainer): None})
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be copied: {_reason(error)}. Let it hold no results of a forward pass, no "
            "open files and no locks while it is exported."
        ) from error
    if hasattr(copy, "_jit_is_scripting"):  # else a LightningModule refuses to be traced without its Trainer
        copy._jit_is_scripting = True
    plain: nn.Module = copy.cpu().eval().requires_grad_(False)
    return plain


def _inputs(model: nn.Module, example: ExampleInputs | None) -> Inputs:
    given = getattr(model, "example_input_array", None) if example is None else example
    if given is None:
        raise ValueError(
            f"`example_inputs` is what the forward of {type(model).__name__} is called with: pass a tensor, a tuple or "
            "a dict of inputs."
        )
    return bind(model, given).map(lambda tensor: tensor.detach().cpu())


def _write(format: Format, model: nn.Module, inputs: Inputs, path: Path, batch: Batch) -> None:
    try:
        write(format, model, inputs, path, dynamic=batch == "dynamic")
    except ModuleNotFoundError:
        raise
    except Exception as error:
        hint = " With batch='fixed' the batch size need not be free." if batch == "dynamic" else ""
        raise ExportError(
            f"{type(model).__name__} cannot be written as {format}: {_reason(error)}. Try another format "
            f"({', '.join(each for each in FORMATS if each != format)}), or change the forward.{hint}"
        ) from error


def _checked(format: Format, model: nn.Module, inputs: Inputs, path: Path, batch: Batch) -> float:
    """Run the file beside the network on random inputs and return how far it is off.

    Raises:
        ExportError: It is off by more than the tolerance, or does not run.
    """
    try:
        run = opened(format, path)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ExportError(
            f"The {format} file cannot be opened: {_reason(error)}. Try another format, or a model of float32."
        ) from error
    worst = 0.0
    for number, size in enumerate(_TRIED if batch == "dynamic" else (None,)):
        drawn, wanted = _tried(model, inputs if size is None else batch_of(inputs, size), seed=number)
        try:
            found = run(drawn)
        except Exception as error:
            raise ExportError(
                f"The {format} file does not run{'' if size is None else f' with {size} examples'}: {_reason(error)}. "
                + (
                    "Try another format."
                    if size is None
                    else "The forward depends on the batch size; pass batch='fixed'."
                )
            ) from error
        worst = max(worst, _difference(found, wanted))
    if not worst <= TOLERANCE:
        raise ExportError(
            f"The {format} file does something else than {type(model).__name__}: its outputs are off by {worst:.1e} of "
            f"the largest, more than {TOLERANCE}. Something in the forward depends on values, on the batch size, or on "
            "chance in eval mode; try batch='fixed' or another format."
        )
    return worst


def _tried(model: nn.Module, inputs: Inputs, seed: int) -> tuple[Inputs, list[Tensor]]:
    """Return random inputs and what the network makes of them.

    Raises:
        ExportError: It makes no finite number of noise, nor of the values of the example.
    """
    for noise in (True, False):
        drawn = _random(inputs, seed, noise)
        with torch.no_grad():
            wanted = list(tensors_in(drawn.call(model)))
        if all(tensor.isfinite().any() or not tensor.numel() for tensor in wanted):
            return drawn, wanted
    raise ExportError(
        f"{type(model).__name__} returns no finite number, so that a file cannot be checked. Look at its weights, and "
        "pass real data as `example_inputs`."
    )


def _random(inputs: Inputs, seed: int, noise: bool) -> Inputs:
    """Return other inputs of the same shapes: noise for numbers, the given ones shuffled for indices."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        if noise and tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        order = torch.randperm(tensor.numel(), generator=generator)
        return tensor.flatten()[order].view_as(tensor)

    return inputs.map(draw)


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest difference relative to the largest number of the same output; infinity for other shapes."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in wanted]:
        return math.inf
    return max((_off(one.double(), other.double()) for one, other in zip(found, wanted, strict=True)), default=0.0)


def _off(found: Tensor, wanted: Tensor) -> float:
    """Return the difference of one output; what is not finite must be the same."""
    finite = wanted.isfinite()
    same = found.isfinite().equal(finite) and torch.equal(found[~finite].nan_to_num(), wanted[~finite].nan_to_num())
    if not same or not finite.any():
        return 0.0 if same else math.inf
    largest = wanted[finite].abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found[finite] - wanted[finite]).abs().max() / largest)


def _reason(error: BaseException) -> str:
    """Return the first line of what went wrong; torch.onnx's own is only that something did."""
    if type(error).__module__.startswith("torch.onnx") and error.__cause__ is not None:
        return _reason(error.__cause__)
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
