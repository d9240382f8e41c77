"""Channels whose removal costs the least loss go first, to second order: Fisher information, per example."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from lightning_prune.criteria.mask_gradients import MaskGradients


class Fisher(MaskGradients):
    """Fisher information of a mask on the channel: score_k = 1/(2N) sum_n g_nk^2.

    Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning" (arXiv 1801.05787), equation 9;
    over all readers of coupled channels as in Liu et al. 2021 ("Group Fisher Pruning"): g_nk is the gradient of the
    loss of example n with respect to a factor on channel k, sum over readers and positions of a_nk dl_n/da_nk, summed
    before it is squared.

    It estimates what the removal costs in units of the loss, near a minimum and up to a factor: on training data that
    the network fits well, gradients vanish and so do the scores, but their order stays.

    BatchNorm in train mode couples the examples of a batch; the part of the gradient that goes through the batch's
    statistics counts for the example at which it arrives.
    """

    @override
    def _concluded(self, gradients: Tensor) -> Tensor:
        return gradients.square().sum(0)

    @override
    def _averaged(self, sums: Tensor) -> Tensor:
        return sums / (2 * max(self.examples, 1))
