"""Channels whose removal changes the loss of a batch least go first, to first order."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from lightning_prune.criteria.mask_gradients import MaskGradients


class Taylor(MaskGradients):
    """First-order Taylor expansion: score_k = mean over batches of (mean_n g_nk)^2.

    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning" (CVPR), equation 8, in the form with a
    gate on each channel: g_nk is the gradient of the loss of example n with respect to a factor on channel k, so that
    the mean over the batch is sum_(s in S_k) g_s w_s over the weights that read the channel.
    """

    @override
    def _concluded(self, gradients: Tensor) -> Tensor:
        return gradients.mean(0).square()

    @override
    def _averaged(self, sums: Tensor) -> Tensor:
        return sums / max(self.steps, 1)
