"""Channels that the others can stand in for go first."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.criteria.inputs_seen import InputsSeen

_AT_ONCE = 2**24
"""So many elements are decomposed at a time."""


class CHIP(InputsSeen):
    """Independence of the feature map: score_k = mean over examples and readers of ||A_n||_* - ||A_n without k||_*.

    Sui et al. 2021, "CHIP: CHannel Independence-based Pruning for Compact Neural Networks" (NeurIPS, arXiv
    2110.13981), equation 3: A_n of shape (channels, positions) holds the maps of example n as rows, and || ||_* is the
    nuclear norm. That is as many decompositions as there are channels, for each example: look at few steps, with
    `window`.
    """

    @override
    def _of_inputs(self, inputs: Tensor) -> Tensor:
        maps = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        maps = maps.flatten(2) if maps.dim() > 2 else maps.unsqueeze(2)
        return torch.stack([_independence(example) for example in maps]).sum(0)

    @override
    def _averaged(self, sums: Tensor, module: nn.Module) -> Tensor:
        return sums / max(self.examples, 1)


def _independence(maps: Tensor) -> Tensor:
    """Return what the nuclear norm of a matrix (channels, positions) loses without each of its rows."""
    if maps.shape[0] > maps.shape[1]:  # the singular values are those of a smaller matrix too
        gram = maps.mT @ maps
        without = gram - maps.unsqueeze(2) * maps.unsqueeze(1)
    else:
        gram = maps @ maps.mT
        stays = 1 - torch.eye(len(maps), dtype=maps.dtype, device=maps.device)
        without = gram * stays.unsqueeze(2) * stays.unsqueeze(1)
    parts = without.split(max(1, _AT_ONCE // gram.numel()))
    return _nuclear(gram) - torch.cat([_nuclear(part) for part in parts])


def _nuclear(grams: Tensor) -> Tensor:
    """Return the sum of the singular values of matrices, from their products with themselves."""
    values: Tensor = torch.linalg.eigvalsh(grams.double())
    return values.clamp(min=0).sqrt().sum(-1)
