"""Channels that are read with small weights go first; or simply the last ones: two baselines of reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_prune.criteria.base import Criterion, gather
from lightning_prune.sampling import is_product
from lightning_prune.tensors import named_modules, named_tensors
from lightning_prune.types import ChannelGroup


class MaxResponse(Criterion):
    """Sum of the absolute weights with which a channel is read, over all layers that do.

    The baseline "max response" of He, Zhang, Sun 2017 ("Channel Pruning", arXiv 1707.06168, section 4.1.1), after Li et
    al. 2017: it does not see what the channel holds.
    """

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        """Return the sums; None where no linear or convolutional layer reads the group."""
        tensors, modules = named_tensors(model), named_modules(model)
        sums: list[Tensor] = []
        for member in group.members:
            layer = modules.get(member.tensor.removesuffix(".weight"))
            if is_product(layer) and member.dim == (0 if isinstance(layer, _ConvTransposeNd) else 1):
                weight = tensors[member.tensor].detach().abs()
                others = [dim for dim in range(weight.dim()) if dim != member.dim]
                sums.append(gather(weight.sum(others), member))
        return torch.stack([part.to(sums[0].device) for part in sums]).sum(0) if sums else None


class FirstK(Criterion):
    """The first channels stay: the baseline "first k" of the same paper."""

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        """Return numbers that fall with the channel's index."""
        return torch.arange(group.size, 0, -1, dtype=torch.float64)
