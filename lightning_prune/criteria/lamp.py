"""Channels with small weights go first, measured against the larger ones of their group."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.criteria.magnitude import Magnitude
from lightning_prune.types import ChannelGroup


class LAMP(Magnitude):
    """Squared norm as a share of that of all channels that would stay: score_k = ||W_k||^2 / sum_(j >= k) ||W_j||^2.

    Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning" (ICLR, arXiv 2010.07611), equation 4, for
    channels in place of weights: j runs over those of the group that come after k by norm. The largest channel of every
    group has a score of 1, so that with `Global` no group is emptied before the others.
    """

    def __init__(self) -> None:
        super().__init__(p=2, normalize=None)

    @override
    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        """Return the shares; None where no parameter belongs to the group."""
        norms = super().score(model, group)
        if norms is None or norms.is_meta:
            return norms
        order = norms.argsort(stable=True)
        squares = norms[order].double().square()
        left = squares.flip(0).cumsum(0).flip(0)
        scores = torch.where(left > 0, squares / left, 0.0)
        return torch.empty_like(scores).index_copy_(0, order, scores)
