"""Channels whose feature maps have a low rank go first."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.criteria.inputs_seen import InputsSeen


class HRank(InputsSeen):
    """Average rank of the feature map: score_k = mean over examples and readers of rank(A_nk).

    Lin et al. 2020, "HRank: Filter Pruning using High-Rank Feature Map" (CVPR, arXiv 2002.10179), equation 4. The paper
    looks at 500 images: the rank hardly depends on them. What a linear layer reads has no map, and a rank of 1 where
    it is not 0.
    """

    @override
    def _of_inputs(self, inputs: Tensor) -> Tensor:
        maps = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        maps = maps if maps.dim() > 2 else maps.unsqueeze(2)
        rows = maps.flatten(2, -2) if maps.dim() > 3 else maps.unsqueeze(2)
        ranks: Tensor = torch.linalg.matrix_rank(rows)
        return ranks.sum(0).to(torch.float32)

    @override
    def _averaged(self, sums: Tensor, module: nn.Module) -> Tensor:
        return sums / max(self.examples, 1)
