"""Picks the channels of a shared trunk that one reader of it needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelSelect(nn.Module):
    """The channel selection layer of Liu et al. 2017 ("Network Slimming", section 3.3), as an index in a buffer.

    It picks without a copy to the host, compiles and exports. Fewer channels cost fewer operations behind it, and a
    gather in it. Before the first convolution of a residual branch it is the sampler of He, Zhang, Sun 2017 ("Channel
    Pruning for Accelerating Very Deep Neural Networks", section 3.3).

    Args:
        channels: Channels of the trunk; all of them are picked at first.
        dim: The dimension along which they lie.
    """

    indices: Tensor

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("indices", torch.arange(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, ...) to (batch, len(indices), ...)."""
        return x.index_select(self.dim, self.indices)

    def extra_repr(self) -> str:
        """Tell how many channels are picked."""
        return f"{len(self.indices)} channels"
