"""Channels with small weights go first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.criteria.base import Criterion, gather
from lightning_prune.tensors import named_tensors
from lightning_prune.types import ChannelGroup, Member

_IN_CACHE = 2**16
"""So many elements are raised to their power at a time."""


class Magnitude(Criterion):
    """Norm of all parameters that a channel owns, in every layer of its group.

    score_k = (sum over members of ||W[k]||_p^p)^(1/p), after Li et al. 2017 ("Pruning Filters for Efficient
    ConvNets") for p = 1, over coupled layers as in Fang et al. 2023 ("DepGraph", section 3.3).

    Args:
        p: 1 or 2.
        normalize: "mean" divides by the group's mean, so that groups of different scale compare; None does not.

    Raises:
        ValueError: `p` or `normalize` is none of these.
    """

    def __init__(self, p: Literal[1, 2] = 2, normalize: Literal["mean"] | None = "mean") -> None:
        if p not in (1, 2):
            raise ValueError(f"`p` is the order of the norm, 1 or 2; got {p!r}.")
        if normalize not in ("mean", None):
            raise ValueError(f'`normalize` is "mean" or None; got {normalize!r}.')
        self.p = p
        self.normalize = normalize
        self._tensors: dict[str, Tensor] = {}
        self._powers: dict[tuple[str, int], Tensor] = {}

    @override
    @contextmanager
    def scoring(self, model: nn.Module) -> Iterator[None]:
        """Look up the tensors once, and read each of them once for each of its dimensions."""
        self._tensors, self._powers = named_tensors(model), {}
        try:
            yield
        finally:
            self._tensors, self._powers = {}, {}

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        """Return the norms; None where no parameter belongs to the group."""
        tensors = self._tensors or named_tensors(model)
        owned = [(tensors[member.tensor], member) for member in group.members]
        if any(tensor.is_meta for tensor, _ in owned):
            return torch.empty(group.size, device="meta")
        powers = [
            gather(self._along(tensor, member), member) for tensor, member in owned if isinstance(tensor, nn.Parameter)
        ]
        if not powers:
            return None
        norms = torch.stack([power.to(powers[0].device) for power in powers]).sum(0).pow(1 / self.p)
        mean = norms.mean()
        return norms / mean if self.normalize and mean > 0 else norms

    def _along(self, tensor: Tensor, member: Member) -> Tensor:
        """Return ||W[k]||_p^p of every position along a member's dimension, read once while all groups are scored."""
        place = (member.tensor, member.dim)
        if place not in self._powers:
            powers = self._summed(tensor, member.dim)
            if not self._tensors:
                return powers
            self._powers[place] = powers
        return self._powers[place]

    def _summed(self, tensor: Tensor, dim: int) -> Tensor:
        """Sum |w|^p over all other dimensions, in float32 at least."""
        weight = tensor.detach()
        weight = weight.abs() if weight.is_complex() else weight
        if not weight.is_floating_point() or weight.dtype.itemsize < 4:
            weight = weight.float()
        if weight.dim() == 1:
            return weight.square() if self.p == 2 else weight.abs()
        size, outer = weight.shape[dim], prod(weight.shape[:dim])
        if outer == 1:
            norms: Tensor = torch.linalg.vector_norm(weight.reshape(size, -1), ord=self.p, dim=1)
            return norms.pow(self.p)
        flat = weight.reshape(outer, -1)
        powers = flat.new_zeros(flat.shape[1])
        for rows in flat.split(max(_IN_CACHE // flat.shape[1], 1)):
            powers += (rows.square() if self.p == 2 else rows.abs()).sum(0)
        return powers.view(size, -1).sum(1)
