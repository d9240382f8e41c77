"""Channels with a small BatchNorm scale go first."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.criteria.base import Criterion
from lightning_prune.layers import Equilibrated
from lightning_prune.tensors import tensor_at
from lightning_prune.types import ChannelGroup, Member


def bn_scales(model: nn.Module, group: ChannelGroup) -> list[Member]:
    """List the members of a group that are scales of BatchNorm layers (1d, 2d, 3d or Sync)."""

    def is_scale(member: Member) -> bool:
        owner, _, leaf = member.tensor.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(owner), _BatchNorm)

    return [member for member in group.members if is_scale(member)]


def effective_scale(model: nn.Module, scale: str) -> Tensor:
    """Return |gamma| of a BatchNorm, times that by which an equilibrium block behind it raises each channel: (c,).

    Args:
        model: The network.
        scale: The name of the BatchNorm's weight.
    """
    gamma = tensor_at(model, scale).detach().float().abs()
    behind = model.get_submodule(scale.rpartition(".")[0].rpartition(".")[0])
    return gamma * behind.equilibrium.scale().detach().float() if isinstance(behind, Equilibrated) else gamma


class BNScale(Criterion):
    """Absolute BatchNorm scale: score_k = mean of |gamma| over all BatchNorm scales that channel k owns.

    Liu et al. 2017 ("Network Slimming", section 3), |gamma_k|: the paper's networks have one BatchNorm a group. Where
    a residual sum ties several, or a flatten gives a channel several positions of a BatchNorm1d, each layer counts
    with the mean of its positions and all layers count alike: the score stays on the scale of a single gamma, so that
    groups compare, and a channel is cheap only where it is weak in most of the branches that are summed.

    Where a Channel Equilibrium block follows, gamma is not what is left of a channel: whitening raises weak ones. Such
    scales count as diag(P) gamma (Shao et al. 2020, proposition 1), with the other branch in its share.

    A group without a BatchNorm scale is passed over. One that is partly under `ignore` is frozen by the graph and
    does not come here: a score never leaves a layer out.
    """

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        """Return the mean absolute scales; None where the group has no BatchNorm."""
        scales = [effective_scale(model, member.tensor)[member.positions].mean(1) for member in bn_scales(model, group)]
        return torch.stack(scales).mean(0) if scales else None
