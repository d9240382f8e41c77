"""Channels whose weights and inputs are small together go first."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.criteria.inputs_seen import InputsSeen
from lightning_prune.criteria.readers import along_input, weight_of


class Wanda(InputsSeen):
    """Weights times the norm of what they read: score_k = mean over readers of sum_i |W_ik| ||X_k||_2.

    Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models" (ICLR, arXiv 2306.11695),
    equation 1, summed over the weights that read a channel, kernels included; X_k is what the channel held in all
    examples and at all positions that were seen.
    """

    @override
    def _of_inputs(self, inputs: Tensor) -> Tensor:
        squares = inputs.to(torch.promote_types(inputs.dtype, torch.float32)).square()
        return squares.sum([dim for dim in range(inputs.dim()) if dim != 1])

    @override
    def _averaged(self, sums: Tensor, module: nn.Module) -> Tensor:
        return sums.sqrt() * along_input(module, weight_of(module).detach().abs()).to(sums)
