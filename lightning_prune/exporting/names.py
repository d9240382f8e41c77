"""What the inputs and outputs of an ONNX file are called."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.inputs import Inputs


def bound(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return what each argument of a network's forward is given, in the order of its signature."""
    return dict(inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments)


def in_order(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return the same inputs with the keywords in the order of forward's signature."""
    known = [name for name in bound(model, inputs) if name in inputs.kwargs]
    return Inputs(inputs.args, {name: inputs.kwargs[name] for name in [*known, *inputs.kwargs]})


def input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """Name each tensor by the argument that it comes in; several in one by their keys or numbers too."""
    parameters = inspect.signature(model.forward).parameters
    names: list[str] = []
    for name, value in bound(model, inputs).items():
        keywords = parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        names += _paths(value, "" if keywords else name)
    return distinct(names, ())


def output_names(outputs: Any, taken: Iterable[str]) -> list[str]:
    """Name what comes out by its keys, or number it; no name is one of those that are taken."""
    names = _paths(outputs, "" if isinstance(outputs, Mapping) else "output")
    return distinct(names, taken)


def distinct(names: Iterable[str], taken: Iterable[str]) -> list[str]:
    """Return the names, those that are taken with an ending.

    >>> distinct(["x", "y"], ["x"])
    ['x_out', 'y']
    """
    found: list[str] = []
    for name in names:
        while name in {*taken, *found}:
            name = f"{name}_out"
        found.append(name)
    return found


def _paths(value: Any, name: str) -> list[str]:
    count = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return [name] if count == 1 else [f"{name}_{number}" for number in range(count)]
    if count == 1 and name:
        return [name]
    return [path for key, item in items for path in _paths(item, f"{name}_{key}" if name else str(key))]
