"""Dropout follows the capacity of the layer that it acts on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import sqrt

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from lightning_prune.errors import PruningError
from lightning_prune.flow import Flow
from lightning_prune.inputs import ExampleInputs, bind
from lightning_prune.labels import LabelSpace
from lightning_prune.masks.held import Masks
from lightning_prune.masks.maskable import maskable
from lightning_prune.tensors import named_modules, named_tensors
from lightning_prune.trace import SUBSTRATES, Setting, run


def dropout_layers(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, list[str]]:
    """Return the name of each dropout module -> the names of the weights of the layer that it acts on.

    That is the layer that runs last before it, or first after it where there is none before. A module that is called
    several times acts on several layers.

    Raises:
        PruningError: A dropout has no such layer.
    """
    dropouts = {name for name, module in named_modules(model).items() if isinstance(module, _DropoutNd)}
    if not dropouts:
        return {}
    weights: dict[str, list[str]] = {}
    for name in maskable(model):
        weights.setdefault(name.rpartition(".")[0], []).append(name)
    order = _order_of_calls(model, example_inputs, [*dropouts, *weights])
    acts_on: dict[str, list[str]] = {}
    for place, name in enumerate(order):
        if name in dropouts:
            before = [other for other in order[:place] if other in weights]
            after = [other for other in order[place:] if other in weights]
            if not before and not after:
                raise PruningError(f"The dropout {name!r} has no layer to act on that can be pruned. {_WAY_OUT}")
            acts_on.setdefault(name, []).extend(weights[(before[-1:] or after[:1])[0]])
    return acts_on


_WAY_OUT = 'Set `dropout="keep"` to leave dropouts as they are.'


def _order_of_calls(model: nn.Module, example_inputs: ExampleInputs, names: Sequence[str]) -> list[str]:
    """Return in which order modules are called, by a run on tensors without memory."""
    modules, calls = named_modules(model), list[str]()

    def note(name: str, *_: object) -> None:
        calls.append(name)

    handles: list[RemovableHandle] = [modules[name].register_forward_pre_hook(partial(note, name)) for name in names]
    try:
        for substrate in SUBSTRATES:
            calls.clear()
            try:
                run(
                    model, bind(model, example_inputs), Setting(substrate), Flow(LabelSpace()), named_tensors(model), {}
                )
            except Exception:
                if substrate == SUBSTRATES[-1]:
                    raise
            else:
                break
    finally:
        for handle in handles:
            handle.remove()
    return calls


def ratios(
    acts_on: Mapping[str, Sequence[str]], dense: Mapping[str, float], masks: Masks, sizes: Mapping[str, int]
) -> dict[str, float]:
    """Return what dropouts should be: D_r = D_o sqrt(C_ir / C_io), C being the connections of the layer they act on.

    Han et al. 2015 ("Learning both Weights and Connections", equation 2): as connections go, the capacity of a layer
    falls, and with it what dropout has to hold down.

    Args:
        acts_on: Name of the dropout -> names of the weights that it acts on; their connections are counted together.
        dense: Name of the dropout -> its probability in the dense model, in [0, 1).
        masks: The masks; a weight without one has all of its connections.
        sizes: Name of each of these weights -> how many connections it has in the dense model.

    >>> import torch
    >>> masks = {"1.weight": torch.tensor([[True, False]])}
    >>> {name: round(p, 3) for name, p in ratios({"0": ["1.weight"]}, {"0": 0.5}, masks, {"1.weight": 2}).items()}
    {'0': 0.354}
    """
    left = {**sizes, **{name: int(mask.count_nonzero()) for name, mask in masks.items()}}
    return {
        name: dense[name] * sqrt(sum(left[weight] for weight in weights) / sum(sizes[weight] for weight in weights))
        for name, weights in acts_on.items()
    }
