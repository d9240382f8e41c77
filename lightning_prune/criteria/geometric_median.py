"""Channels that are like many others go first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_prune.criteria.base import Criterion
from lightning_prune.tensors import named_tensors
from lightning_prune.types import ChannelGroup, Member


class GeometricMedian(Criterion):
    """Distance to all others of the group: score_k = sum_j ||W_k - W_j||_2, divided by the group's mean.

    He et al. 2019, "Filter Pruning via Geometric Median for Deep Neural Networks Acceleration" (CVPR, arXiv
    1811.00250), equation 7: what is close to the geometric median can be replaced by the others. W_k holds all weights
    that a channel owns in weights of two and more dimensions, over coupled layers; biases and norms are left out.
    """

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        """Return the distances; None where the group has no such weight."""
        tensors = named_tensors(model)
        rows = [
            _rows(tensors[member.tensor], member)
            for member in group.members
            if isinstance(tensors[member.tensor], nn.Parameter) and tensors[member.tensor].dim() > 1
        ]
        if not rows:
            return None
        squares = torch.stack([torch.cdist(part, part).square().to(rows[0].device) for part in rows]).sum(0)
        distances = squares.sqrt().sum(1)
        mean = distances.mean()
        return distances / mean if mean > 0 else distances


def _rows(tensor: Tensor, member: Member) -> Tensor:
    """Return the weights of each channel as a row."""
    weight = tensor.detach().movedim(member.dim, 0).float()
    return weight[member.positions.to(weight.device)].flatten(1)
