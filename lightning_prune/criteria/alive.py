"""Channels that no weight leads to, or from, are dead."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.criteria.base import Criterion, gather
from lightning_prune.tensors import named_modules, named_tensors
from lightning_prune.types import ChannelGroup, Member


class Alive(Criterion):
    """score_k = 1 if channel k has weights that lead to it and weights that lead from it, 0 if it is dead.

    Han et al. 2015 ("Learning both Weights and Connections", section 3.5): neurons with zero input connections or zero
    output connections can be removed. A channel with no input emits a constant, one with no output is not heard.
    Only linear and convolutional layers are known to lead; a group that lives in other weights too is passed over.
    """

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        """Return ones and zeros; None where something else than linear and convolutional layers makes or reads."""
        tensors, modules = named_tensors(model), named_modules(model)
        leading: dict[bool, list[Tensor]] = {True: [], False: []}
        for member in group.members:
            tensor, owner = tensors[member.tensor], modules[member.tensor.rpartition(".")[0]]
            if tensor.dim() < 2:
                continue
            if not isinstance(owner, (nn.Linear, _ConvNd)) or member.dim > 1 or _is_depthwise(owner):
                return None
            inward = (member.dim == 0) is not isinstance(owner, _ConvTransposeNd)
            leading[inward].append(_any_along(tensor, member))
        alive = torch.ones(group.size)
        for ways in leading.values():
            if ways:
                alive *= torch.stack(ways).any(0).float().cpu()
        return alive


def _is_depthwise(owner: nn.Module) -> bool:
    return isinstance(owner, _ConvNd) and owner.groups > 1


def _any_along(tensor: Tensor, member: Member) -> Tensor:
    """Tell of each channel whether any of its weights is not 0."""
    others = [dim for dim in range(tensor.dim()) if dim != member.dim]
    return gather((tensor.detach() != 0).sum(others), member) > 0
