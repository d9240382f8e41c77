"""The BatchNorm scales of a network: which are penalised, which of them an optimizer moves, and what they start at."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from lightning_prune.graph import ignored_tensors
from lightning_prune.history import history_of


def penalised_layers(pl_module: pl.LightningModule, ignore: Sequence[str]) -> dict[str, _BatchNorm]:
    """Name all BatchNorm layers (1d, 2d, 3d, Sync) outside `ignore` that have a scale.

    Raises:
        MisconfigurationException: There is none.
    """
    protected = ignored_tensors(pl_module, ignore)
    layers = {name: module for name, module in pl_module.named_modules() if isinstance(module, _BatchNorm)}
    found = {name: layer for name, layer in layers.items() if layer.affine and f"{name}.weight" not in protected}
    if not found:
        raise MisconfigurationException(
            f"BNSlimmingCallback needs BatchNorm scales, and {type(pl_module).__name__} has none "
            f"(ignore={list(ignore)}). Add BatchNorm layers, or use MagnitudePruneCallback."
        )
    return found


def penalised_scales(pl_module: pl.LightningModule, ignore: Sequence[str]) -> list[Parameter]:
    """List the scales of `penalised_layers`; one that several layers share stands once."""
    scales = [layer.weight for layer in penalised_layers(pl_module, ignore).values()]
    return list({id(scale): scale for scale in scales}.values())


class OptimizedScales:
    """Those of some scales that an optimizer moves, searched for only where a param group has changed.

    Args:
        scales: What is penalised.
    """

    def __init__(self, scales: Sequence[Parameter]) -> None:
        self.scales = tuple(scales)
        self._searched: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def of(self, group: dict[str, Any]) -> list[Tensor]:
        """List the scales of a param group that are not frozen."""
        parameters = group["params"]
        known, found = self._searched.get(id(parameters), ([], []))
        if len(known) != len(parameters) or not all(map(is_, known, parameters)):
            wanted = set(map(id, self.scales))
            found = [parameter for parameter in parameters if id(parameter) in wanted]
            self._searched[id(parameters)] = (list(parameters), found)
        return [scale for scale in found if scale.requires_grad]


def start_at(initial_scale: float, pl_module: pl.LightningModule, ignore: Sequence[str]) -> None:
    """Set the penalised scales of an untrained network; a trained one is left as it is, with a warning.

    A layer counts as trained once it has seen a batch, or where its scales differ among each other.

    Raises:
        MisconfigurationException: There is no scale, or a lazy layer has none yet.
    """
    layers = penalised_layers(pl_module, ignore)
    lazy = [name for name, layer in layers.items() if isinstance(layer.weight, UninitializedParameter)]
    if lazy:
        raise MisconfigurationException(
            f"initial_scale={initial_scale} cannot be set: {lazy[0]} is lazy and has seen no input yet. Run the "
            "network once in `configure_model`."
        )
    trained = [name for name, layer in layers.items() if _is_trained(layer)]
    if trained or history_of(pl_module):
        seen = f"{trained[0]} is trained already" if trained else "it has been pruned already"
        rank_zero_warn(
            f"initial_scale={initial_scale} was not set: it is for networks trained from scratch, and {seen}. Leave "
            "it out, or start from a fresh network."
        )
        return
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.fill_(initial_scale)


def _is_trained(layer: _BatchNorm) -> bool:
    seen = layer.num_batches_tracked is not None and bool(layer.num_batches_tracked)
    return seen or bool(layer.weight.min() != layer.weight.max())
