"""Channels that are summed up without a weight have no reader that could be told to leave one out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.criteria.readers import readers_of
from lightning_prune.criteria.summing import summed_up
from lightning_prune.graph import read


class Net(nn.Module):
    """Two convolutions, and something between them that may hear the channels of the first."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return (batch, 4, height, width)."""
        x = self.first(images)
        if self.way == "mean over channels":
            x = x * torch.sigmoid(x.mean(1, keepdim=True))
        elif self.way == "largest channel":
            x = x * torch.sigmoid(x.amax(1, keepdim=True))
        elif self.way == "similarity of places":
            flat = x.flatten(2)
            similar = torch.softmax(flat.transpose(1, 2) @ flat, -1)
            x = (flat @ similar).view_as(x)
        elif self.way == "mean over places":
            x = x * torch.sigmoid(x.mean((2, 3), keepdim=True))
        elif self.way == "residual sum":
            x = x + torch.relu(x)
        return self.second(x)


@pytest.mark.parametrize("way", ["mean over channels", "largest channel", "similarity of places"])
def test_what_hears_all_channels_is_found(way: str) -> None:
    net = Net(way)
    graph = read(net, torch.zeros(2, 3, 6, 6))
    assert "first" in {group.name for group in graph.groups if not group.frozen}
    assert summed_up(graph) == {"first"}
    assert "first" not in readers_of(net, graph)


@pytest.mark.parametrize("way", ["nothing", "mean over places", "residual sum"])
def test_what_keeps_channels_apart_is_not(way: str) -> None:
    net = Net(way)
    graph = read(net, torch.zeros(2, 3, 6, 6))
    assert not summed_up(graph)
    assert [reader.module for reader in readers_of(net, graph)["first"]] == ["second"]
