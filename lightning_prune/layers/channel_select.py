"""Picks the channels of a shared trunk that one reader of it needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelSelect(nn.Module):
    """The channel selection layer of Liu et al. 2017 ("Network Slimming", section 3.3), as an index in a buffer.

    It picks along dimension 1 without a copy to the host, compiles and exports. Fewer channels cost fewer operations
    behind it, and a gather in it.

    Args:
        channels: Channels of the trunk; all of them are picked at first.
    """

    indices: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("indices", torch.arange(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, ...) to (batch, len(indices), ...)."""
        return x.index_select(1, self.indices)

    def extra_repr(self) -> str:
        """Tell how many channels are picked."""
        return f"{len(self.indices)} channels"
