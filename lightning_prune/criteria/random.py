"""Channels go by lot: the baseline that every criterion must beat."""

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor, nn

from lightning_prune.criteria.base import Criterion
from lightning_prune.types import ChannelGroup


class Random(Criterion):
    """Uniform scores, drawn from the seed and the group's name alone: the same on every rank and in every order.

    Args:
        seed: Of the draw.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        """Return numbers in [0, 1)."""
        generator = torch.Generator().manual_seed(crc32(f"{self.seed}:{group.name}:{group.size}".encode()))
        return torch.rand(group.size, generator=generator, dtype=torch.float64)
