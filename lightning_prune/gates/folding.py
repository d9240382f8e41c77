"""The end of gates: what they let through is multiplied into the weights, and they are gone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.layers.gated import weight_name
from lightning_prune.layers.gates import attach, detach, gates_of
from lightning_prune.surgery import Undo
from lightning_prune.tensors import named_modules, named_tensors, unwrapped


@dataclass(frozen=True, eq=False)
class Folded:
    """What became of the gates of a network.

    Attributes:
        masks: Name of a weight -> bool tensor of its shape: False where a gate on an input or a weight is closed.
        undo: Puts the gates back on, and the weights that were.
    """

    masks: dict[str, Tensor]
    undo: Undo


@torch.no_grad()
def fold(model: nn.Module) -> Folded:
    """Multiply the test gates into the weights that read through them, and take the gates off.

    In eval mode the network's outputs stay what they were. A weight that several layers share is multiplied once.

    Args:
        model: The network, changed in place; without gates nothing happens.
    """
    model = unwrapped(model)
    gates = gates_of(model)
    if gates is None:
        return Folded({}, lambda: None)
    layers, names = named_modules(model), {id(tensor): name for name, tensor in named_tensors(model).items()}
    before: dict[Tensor, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name, reading in gates.read_by().items():
        weight = getattr(layers[name], weight_name(layers[name]))
        if weight in before:
            continue
        before[weight] = weight.detach().clone()
        weight.mul_(reading.of_weight(layers[name], weight, False).to(weight.dtype))
        if reading.inputs is not None or reading.weights is not None:
            masks[names[id(weight)]] = reading.own_mask(layers[name], weight)
    detach(model)

    def undo() -> None:
        with torch.no_grad():
            for weight, values in before.items():
                weight.copy_(values)
        attach(model, gates)

    return Folded(masks, undo)
