"""A trained decorrelation is linear: it goes, with its BatchNorm, into the layer before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.behind import Behind
from lightning_prune.equilibrium.inserting import blocks_of, exchange
from lightning_prune.graph import read
from lightning_prune.inputs import ExampleInputs
from lightning_prune.layers import BatchDecorrelation, Equilibrated
from lightning_prune.layers.norms import scale_and_shift
from lightning_prune.tensors import named_modules, named_tensors

_Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Folded:
    """What has been folded.

    Attributes:
        layers: Name of the norm -> name of the layer that it went into.
        kept: Name of the norm -> why it has stayed.
    """

    layers: Mapping[str, str]
    kept: Mapping[str, str]


def fold(model: nn.Module, example_inputs: ExampleInputs) -> Folded:
    """Fold batch decorrelation, and the BatchNorm before it, into the convolution or linear layer before, in place.

    In eval mode all three are one linear map, W -> P diag(gamma / sigma) W, so that the outputs stay the same to
    rounding. The network is for inference from then on: what was folded no longer follows the batch. Blocks that
    depend on the example (`ChannelEquilibrium`, `InstanceReweighting`) cannot be folded, and stay.

    Args:
        model: A network with blocks; it may be in train mode.
        example_inputs: What it is run with, on tensors without memory; see `find_groups` for the forms.

    Returns:
        What has been folded, and what has stayed, with the reason.
    """
    before = _layers_before(model, Behind(next(iter(read(model, example_inputs).runs.values())), named_tensors(model)))
    layers: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, block in blocks_of(model).items():
        place, layer = before.get(name, ("", None))
        reason = _obstacle(block, layer)
        if layer is None or reason:
            kept[name] = reason
        else:
            layers[name] = place
            _fold(layer, block)
            exchange(model, block, nn.Identity())
    return Folded(layers, kept)


def _layers_before(model: nn.Module, behind: Behind) -> dict[str, tuple[str, _Layer]]:
    """Return for each norm with a block the layer that goes into it alone, if there is one, and its name."""
    modules = named_modules(model)
    owned = [id(parameter) for module in set(modules.values()) for parameter in module._parameters.values()]
    before: dict[str, tuple[str, _Layer]] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if isinstance(module, _Layer) and weight is not None and owned.count(id(weight)) == 1:
            products = behind.products(f"{name}.weight")
            norm = behind.norm(products[0].results[0]) if len(products) == 1 else None
            if norm is not None:
                before[norm.running_mean.removesuffix(".norm.running_mean")] = name, module
    return before


def _obstacle(block: Equilibrated, layer: _Layer | None) -> str:
    """Return why a block cannot be folded; nothing if it can."""
    if not isinstance(block.equilibrium, BatchDecorrelation):
        return "its weights depend on the example"
    if not isinstance(block.norm, _BatchNorm) or block.norm.running_mean is None:
        return "the norm before it is no BatchNorm with running statistics"
    if layer is None:
        return "no convolution or linear layer goes into its norm alone"
    together = block.equilibrium.running_whitening.shape[-1]
    if not isinstance(layer, nn.Linear) and layer.out_channels // layer.groups % together:
        return f"its groups of {together} channels mix convolution groups"
    return ""


def _fold(layer: _Layer, block: Equilibrated) -> None:
    norm, equilibrium = block.norm, block.equilibrium
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert isinstance(equilibrium, BatchDecorrelation)
    whitening = 0.5 * (equilibrium.running_whitening + equilibrium.running_whitening.mT).double()
    gamma, beta = scale_and_shift(norm) or (torch.ones(()), torch.zeros(()))
    scale = gamma.double() * (norm.running_var.double() + norm.eps).rsqrt()
    own = 0.0 if layer.bias is None else layer.bias.detach().double()
    bias = beta.double() + scale * (own - norm.running_mean.double())
    rows = scale.unsqueeze(-1) * layer.weight.detach().double().flatten(1)

    def mixed(channels: Tensor) -> Tensor:
        return whitening @ channels.reshape(*whitening.shape[:2], -1)

    with torch.no_grad():
        layer.weight.copy_(mixed(rows).reshape(layer.weight.shape))
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_empty(len(bias)), layer.weight.requires_grad)
        layer.bias.copy_(mixed(bias).flatten())
