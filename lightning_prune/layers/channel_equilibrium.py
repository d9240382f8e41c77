"""Channel Equilibrium: behind a norm, channels are decorrelated and reweighted, so that all of them carry signal."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.layers.layout import in_planes, layout_of
from lightning_prune.layers.whitening import Moments, inverse_root, mean_of_ranks

log = logging.getLogger(__name__)


class _Block(nn.Module):
    """What the block and its branches share: how channels lie, and in which precision they are worked on."""

    def __init__(self, num_channels: int, channel_dim: int) -> None:
        super().__init__()
        if num_channels < 1:
            raise ValueError(f"`num_channels` is 1 or more; got {num_channels}.")
        if channel_dim not in (1, -1):
            raise ValueError(f"`channel_dim` is 1 or -1; got {channel_dim}. Permute other layouts before and after.")
        self.channel_dim = channel_dim

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c), (n, c, ...) or, with `channel_dim=-1`, (n, ..., c), to the same shape and dtype."""
        if self.channel_dim == -1:
            return self._precisely(x.movedim(-1, 1)).movedim(1, -1).contiguous()
        layout = layout_of(x)
        return self._precisely(in_planes(x, layout)).contiguous(memory_format=layout)

    def _precisely(self, x: Tensor) -> Tensor:
        """Work in float32 at least: covariances of half precision would be noise."""
        flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(-1)
        precise = flat.float() if x.dtype in (torch.float16, torch.bfloat16) else flat
        device = x.device.type
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            return self._balance(precise).to(x.dtype).reshape(x.shape)

    def _balance(self, x: Tensor) -> Tensor:
        """Map (n, c, s), s positions of n examples, to the same shape."""
        raise NotImplementedError

    def scale(self) -> Tensor:
        """Return by what the block multiplies channels, as far as it is so for all examples: (c,) or (), >= 0."""
        raise NotImplementedError


class BatchDecorrelation(_Block):
    """The branch that decorrelates the channels of a batch (Shao et al. 2020, equation 6).

        BD(x) = P_T x,  P_T -> (Sigma / tr Sigma)^(-1/2)

    Sigma is the covariance of d channels over all examples and positions. It is not scaled back by its trace, so that
    the output's covariance goes to tr(Sigma) I: channels share the energy that all of them have. In eval mode the mean
    P_T of past batches is taken, and the branch is a 1 x 1 convolution in groups; before the first it is the identity.

    Args:
        num_channels: c.
        group_size: d; where it does not divide c, the largest number below that does is taken, and logged.
        iterations: T, of Newton's iteration, >= 1; see `inverse_root`.
        momentum: Weight of a new batch in the running statistics, in [0, 1].
        eps: Added to the variances, > 0.
        channel_dim: Where channels lie: 1, or -1.
        over_ranks: Whether Sigma is that of all ranks, in distributed training.

    Raises:
        ValueError: An argument is out of its range.
    """

    running_whitening: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        group_size: int = 16,
        iterations: int = 3,
        momentum: float = 0.1,
        eps: float = 1e-5,
        channel_dim: int = 1,
        over_ranks: bool = True,
    ) -> None:
        super().__init__(num_channels, channel_dim)
        _check(momentum, eps)
        if iterations < 1:
            raise ValueError(f"`iterations` of Newton's method are 1 or more; got {iterations}.")
        self.iterations = iterations
        self.momentum = momentum
        self.eps = eps
        self.over_ranks = over_ranks
        size = _divisor(num_channels, group_size)
        self.register_buffer("running_whitening", torch.eye(size).repeat(num_channels // size, 1, 1))

    @override
    def _balance(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.remembered(x)
        grouped = self.grouped(x)
        return (self.whitening(Moments.of(grouped)) @ grouped).flatten(1, 2)

    def remembered(self, x: Tensor) -> Tensor:
        """Decorrelate channels (n, c, s) as those of past batches were: a 1 x 1 convolution in groups."""
        symmetric = 0.5 * (self.running_whitening + self.running_whitening.mT)  # to the last digit
        weight = torch.cat(symmetric.unbind())  # no view: of one, label flow could not tell which factor is cut
        return F.conv1d(x, weight.unsqueeze(-1).to(x.dtype), groups=len(symmetric))

    def grouped(self, x: Tensor) -> Tensor:
        """Put channels (n, c, s) into groups: (n, g, d, s)."""
        groups, size, _ = self.running_whitening.shape
        grouped: Tensor = x.unflatten(1, (groups, size))
        return grouped

    def whitening(self, moments: Moments) -> Tensor:
        """Return P_T of a batch, (g, d, d); the running mean follows."""
        covariance = moments.covariance(over_ranks=self.over_ranks)
        whitening = inverse_root(covariance, iterations=self.iterations, eps=self.eps)
        follow(self.running_whitening, whitening, self.momentum)
        return whitening

    @override
    def scale(self) -> Tensor:
        """Return diag(P), by which the norm's scales are raised (Shao et al. 2020, proposition 1): (c,), >= 0."""
        return self.running_whitening.diagonal(dim1=-2, dim2=-1).flatten().clamp_min(0.0)

    @override
    def extra_repr(self) -> str:
        groups, size, _ = self.running_whitening.shape
        return f"{groups} x {size} channels, iterations={self.iterations}"


class InstanceReweighting(_Block):
    """The branch that reweights the channels of each example (Shao et al. 2020, equation 7).

        IR(x) = gate(v) / sqrt(s) x,  gate(v) = sigmoid(W_2 ReLU(LN(W_1 v)))

    v are the variances of the example's channels over its positions, s their mean over channels and examples, in eval
    mode the mean of past batches, before the first 1. Where there is one position only, nothing varies, and the branch
    is the identity.

    Args:
        num_channels: c.
        reduction: c / reduction is the width of the hidden layer, which has 4 units or more; >= 1.
        momentum: Weight of a new batch in the running statistics, in [0, 1].
        eps: Added to s, > 0.
        channel_dim: Where channels lie: 1, or -1.
        over_ranks: Whether s is that of all ranks, in distributed training.

    Raises:
        ValueError: An argument is out of its range.
    """

    running_scale: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        reduction: int = 4,
        momentum: float = 0.1,
        eps: float = 1e-5,
        channel_dim: int = 1,
        over_ranks: bool = True,
    ) -> None:
        super().__init__(num_channels, channel_dim)
        _check(momentum, eps)
        if reduction < 1:
            raise ValueError(f"`reduction` divides the channels, 1 or more; got {reduction}.")
        self.momentum = momentum
        self.eps = eps
        self.over_ranks = over_ranks
        hidden = max(num_channels // reduction, 4)
        self.gate = nn.Sequential(
            nn.Linear(num_channels, hidden, bias=False),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_channels, bias=False),
            nn.Sigmoid(),
        )
        self.register_buffer("running_scale", torch.ones(()))

    @override
    def _balance(self, x: Tensor) -> Tensor:
        if x.shape[-1] == 1:
            return x + self.idle()
        return self.weights(x.var(-1, correction=0)).unsqueeze(-1) * x

    def idle(self) -> Tensor:
        """Return 0, for which the gate is read: DDP waits for gradients, and label flow takes what is unread amiss."""
        return 0.0 * torch.stack([each.sum() for each in self.gate.parameters()]).sum()

    def weights(self, variance: Tensor) -> Tensor:
        """Return what each example's channels are multiplied by, from their variances: (n, c) -> (n, c), >= 0."""
        scale = self.running_scale
        if self.training:
            mean = variance.mean()
            scale = ((mean_of_ranks(mean, len(variance)) if self.over_ranks else mean) + self.eps).sqrt()
            follow(self.running_scale, scale, self.momentum)
        gates: Tensor = self.gate(variance.to(next(self.gate.parameters()).dtype))
        return gates.to(variance.dtype) * scale.reciprocal()  # not `/`: the running one may change before backward

    @override
    def scale(self) -> Tensor:
        """Return the middle of what gates, in (0, 1), let through, for all channels alike: a scalar, > 0."""
        return 0.5 / self.running_scale


class ChannelEquilibrium(_Block):
    """The Channel Equilibrium block: put behind a norm, before the activation, it keeps all channels at work.

        CE(x) = sigmoid(l) BD(x) + (1 - sigmoid(l)) IR(x)

    Shao, Tang, Pan, Li, Wang, Luo 2020, "Channel equilibrium networks for learning deep representation" (ICML, arXiv
    2003.00214), equation 5; l is learned, and starts from 0. Per example both are one matrix on the channels of a
    group, so that the block costs two batched products forward. Without several positions, as behind a linear layer,
    it is BD alone.

    Variances are not corrected for bias, s and the traces are kept above 0, and Sigma and s are those of all ranks; see
    `BatchDecorrelation` and `InstanceReweighting`.

    Args:
        num_channels: c.
        group_size: d, of the channels that are decorrelated together.
        iterations: T, of Newton's iteration.
        reduction: c / reduction is the width of the gate's hidden layer.
        momentum: Weight of a new batch in the running statistics, in [0, 1].
        eps: Added to the variances, > 0.
        channel_dim: Where channels lie: 1, or -1.
        over_ranks: Whether Sigma and s are those of all ranks, in distributed training.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> block = ChannelEquilibrium(64)
        >>> block(torch.randn(8, 64, 14, 14)).shape
        torch.Size([8, 64, 14, 14])
    """

    def __init__(
        self,
        num_channels: int,
        *,
        group_size: int = 16,
        iterations: int = 3,
        reduction: int = 4,
        momentum: float = 0.1,
        eps: float = 1e-5,
        channel_dim: int = 1,
        over_ranks: bool = True,
    ) -> None:
        super().__init__(num_channels, channel_dim)
        self.decorrelation = BatchDecorrelation(
            num_channels,
            group_size=group_size,
            iterations=iterations,
            momentum=momentum,
            eps=eps,
            over_ranks=over_ranks,
        )
        self.reweighting = InstanceReweighting(
            num_channels, reduction=reduction, momentum=momentum, eps=eps, over_ranks=over_ranks
        )
        self.mixing = nn.Parameter(torch.zeros(()))

    @override
    def _balance(self, x: Tensor) -> Tensor:
        if x.shape[-1] == 1:
            return self.decorrelation._balance(x) + self.reweighting.idle() + 0.0 * self.mixing
        share = self.mixing.sigmoid().to(x.dtype)
        if not self.training:
            return share * self.decorrelation.remembered(x) + (1 - share) * self.reweighting._balance(x)
        grouped = self.decorrelation.grouped(x)
        moments = Moments.of(grouped)
        weights = self.reweighting.weights(moments.variance().flatten(1)).reshape(grouped.shape[:-1])
        mixed = share * self.decorrelation.whitening(moments) + torch.diag_embed((1 - share) * weights)
        return (mixed @ grouped).flatten(1, 2)

    @override
    def scale(self) -> Tensor:
        """Return the mix of the branches' scales: (c,), >= 0."""
        share = self.mixing.detach().sigmoid()
        return share * self.decorrelation.scale() + (1 - share) * self.reweighting.scale()


def follow(running: Tensor, now: Tensor, momentum: float) -> None:
    """Let a running mean take in a new value."""
    running.lerp_(now.detach().to(running.dtype), momentum)


def _divisor(num_channels: int, group_size: int) -> int:
    if group_size < 1:
        raise ValueError(f"`group_size` is 1 or more; got {group_size}.")
    wanted = min(group_size, num_channels)
    size = next(size for size in range(wanted, 0, -1) if num_channels % size == 0)
    if size < wanted:
        log.info("Groups of %d do not divide %d channels; these take groups of %d.", wanted, num_channels, size)
    return size


def _check(momentum: float, eps: float) -> None:
    if not 0 <= momentum <= 1:
        raise ValueError(f"`momentum` is the weight of a new batch, in [0, 1]; got {momentum}.")
    if not eps > 0:
        raise ValueError(f"`eps` is above 0; got {eps}.")
